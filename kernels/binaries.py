"""Kernels compiled to be launched without PyTorch and Triton: what a TensorRT plugin carries in its engine.

`aot` compiles an operator for one call's sizes. Here one set of kernels serves every size: what Triton would look up
at each launch (sizes, strides, their divisibility) stays an argument, or is a choice between two variants made from
the sizes at hand. What depends on channels, heads or the dtype is fixed, as a model fixes it.

| operator | roles | which |
| --- | --- | --- |
| group norm | stats/even, apply/even | positions S fill whole blocks: no masks, aligned rows |
| | stats/any, apply/any | otherwise |
| attention | attention | every number of queries and keys |
| attention, ahead | attention | the same, with the parameters that TensorRT passes by itself |

A set is JSON: the constants that a grid is computed from, and for each role the entry point, its parameters in order
with their types, shared memory, warps, the machine code (and the PTX, of which TensorRT makes its own).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendError
from . import tuning
from ._attention_aot import attention_aot, attention_wide_aot
from ._attention_softmax import log2_scale
from ._attention_triton import SHORT, WIDE, plan_kernel, tuning_key
from ._group_norm_triton import MOST_SPLITS
from ._group_norm_triton import plan as plan_group_norm
from ._triton import Launch
from .aot import SHARED_LIMIT, cache_folder, compile_jobs, compiled, digest, signature

__all__ = [
    "AheadAttentionKernels",
    "AttentionKernels",
    "GroupNormKernels",
    "Kernels",
    "binaries",
    "parameters",
]

_POSITIONS = 1024
"""Positions that group norm's tiles are chosen for: at 1024x1024 SDXL's UNets have 16384, 4096 or 1024."""

# Sizes that stand for any: neither 1 nor a multiple of 16, which Triton would compile in.
_ODD = 1023
_HEADS = 3


@dataclass(frozen=True)
class GroupNormKernels:
    """Group norm of contiguous [N, C, ...] of any N and any positions.

    Attributes:
        shift: whether a vector is added to x first.
    """

    dtype: torch.dtype
    channels: int
    groups: int
    silu: bool
    shift: bool
    arch: int

    def launches(self) -> tuple[dict[str, Launch], dict[str, int]]:
        """Arguments by role, and the constants that a grid is computed from."""
        C = self.channels
        x = torch.empty(2, C, _POSITIONS, dtype=self.dtype, device="meta")
        weight = torch.empty(C, dtype=self.dtype, device="meta")
        shift = torch.empty(2, C, dtype=self.dtype, device="meta") if self.shift else None
        _, planned = plan_group_norm(
            x, weight, weight, self.groups, 1e-5, shift, silu=self.silu, arch=self.arch
        )
        found = {}
        for name, launch in zip(("stats", "apply"), planned, strict=True):
            block = launch.constants["BLOCK_S"]
            for which, S in (("even", _POSITIONS), ("any", _ODD)):
                args = {**launch.args, "S": S, "chunk": block, "splits": 3, "partials": 7}
                constants = dict(launch.constants)
                if name == "stats":
                    constants["EVEN"] = which == "even" and constants["EVEN"]
                else:
                    constants["PAD_SPLITS"] = MOST_SPLITS
                found[f"{name}/{which}"] = replace(launch, args=args, constants=constants)
        tile = planned[0].constants
        sizes = tuning.constants("group_norm", self.arch, self.dtype, "contiguous")
        return found, {
            "BLOCK_S": tile["BLOCK_S"],
            "TILE_C": tile["TILE_GROUPS"] * tile["GROUP"],
            "PROGRAM": sizes["PROGRAM"],
            "PROGRAMS": sizes["PROGRAMS"],
            "MOST_SPLITS": MOST_SPLITS,
        }


@dataclass(frozen=True)
class AttentionKernels:
    """Attention of contiguous [B, S, H, D] of any B, S and H.

    Attributes:
        short: for few keys, which a text has; a choice of block sizes, not a limit.
        negative: whether the scale is.
    """

    dtype: torch.dtype
    columns: int
    short: bool
    negative: bool
    arch: int

    def launches(self) -> tuple[dict[str, Launch], dict[str, int]]:
        """Arguments by role, and the constants that a grid is computed from."""
        D = self.columns
        q = torch.empty(2, _ODD, _HEADS, D, dtype=self.dtype, device="meta")
        k = q[:, : SHORT - 1].contiguous() if self.short else q
        scale = -1.0 if self.negative else 1.0
        _, (launch,) = plan_kernel(q, k, k, scale, tuning.plain(*tuning_key(q, k, self.arch)))
        constants = {"BLOCK_M": launch.constants["BLOCK_M"], "BLOCK_V": D}
        if D > WIDE:
            constants["BLOCK_V"] = launch.constants["BLOCK_V"]
        return {"attention": launch}, constants


@dataclass(frozen=True)
class AheadAttentionKernels:
    """`AttentionKernels` with its scale compiled in, for a plugin that TensorRT launches itself."""

    dtype: torch.dtype
    columns: int
    short: bool
    scale: float
    arch: int

    def launches(self) -> tuple[dict[str, Launch], dict[str, int]]:
        """Arguments by role, and the constants that a grid is computed from."""
        plain = AttentionKernels(self.dtype, self.columns, self.short, self.scale < 0, self.arch)
        found, constants = plain.launches()
        launch = found["attention"]
        args = {name: launch.args[name] for name in ("q_ptr", "k_ptr", "v_ptr", "H", "Sq", "Sk", "o_ptr")}
        ahead = replace(
            launch,
            kernel=attention_wide_aot if self.columns > WIDE else attention_aot,
            args=args,
            constants={"SCALE": log2_scale(self.scale), **launch.constants},
        )
        return {"attention": ahead}, constants


Kernels = GroupNormKernels | AttentionKernels | AheadAttentionKernels


def binaries(wanted: Sequence[Kernels], cache: Path | None = None, processes: int = 1) -> list[Path]:
    """A file for each, compiled where the cache has none.

    Raises:
        BackendUnavailableError: Triton is not installed.
        BackendError: one does not compile; the message has the compiler's.
    """
    folder = cache or cache_folder()
    paths = [folder / f"{_digest(kernels)}.kernels" for kernels in wanted]
    missing = {path: partial(_content, kernels) for path, kernels in zip(paths, wanted, strict=True)}
    failed = compile_jobs(missing, processes)
    for path, kernels in zip(paths, wanted, strict=True):
        if path in failed:
            raise BackendError(f"compiling {kernels} failed: {failed[path]}")
    return paths


def _without_scratch(ptx: str) -> str:
    """PTX whose entry has the kernel's own parameters, without the two scratch pointers that Triton adds.

    For a kernel that uses no scratch: its launcher need not pass them.
    """
    begin = ptx.index("(", ptx.index(".entry"))
    end = ptx.index(")", begin)
    kept = ptx[begin + 1 : end].split(",")[:-2]
    return ptx[: begin + 1] + ",".join(kept) + "\n" + ptx[end:]


def parameters(launch: Launch) -> list[tuple[str, str]]:
    """Names and Triton types of the arguments that a launch passes, in order; compile-time constants are left out."""
    types, _, _ = signature(launch)
    return [(name, kind) for name, kind in types.items() if kind != "constexpr"]


def _digest(kernels: Kernels) -> str:
    launches, constants = kernels.launches()
    return digest(launches.values(), kernels.arch, repr(sorted(constants.items())), *launches)


def _content(kernels: Kernels) -> bytes:
    launches, constants = kernels.launches()
    images = {role: _image(launch, kernels.arch) for role, launch in launches.items()}
    return json.dumps({"constants": constants, "images": images}).encode()


def _image(launch: Launch, arch: int) -> Mapping[str, Any]:
    built = compiled(launch, arch)
    meta = built.metadata
    scratch = (getattr(meta, "global_scratch_size", 0) or 0) + (getattr(meta, "profile_scratch_size", 0) or 0)
    limit = SHARED_LIMIT.get(arch, math.inf)
    if scratch or meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.shared > 1024 * limit:
        raise BackendError(
            f"{launch.kernel.name} for sm_{arch} wants {scratch} bytes of scratch, clusters of {meta.num_ctas} or "
            f"{meta.shared} bytes of shared memory (there are {limit} KiB), which a plugin cannot give"
        )
    return {
        "entry": meta.name,
        "parameters": parameters(launch),
        "shared": meta.shared,
        "warps": meta.num_warps,
        "cubin": base64.b64encode(built.asm["cubin"]).decode(),
        "ptx": _without_scratch(built.asm["ptx"]),
    }
