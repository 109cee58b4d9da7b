"""Attention compiled into an engine of TensorRT, which then needs no Python at all: a quick deployable plugin.

Written against the documentation of `tensorrt.plugin` (10.9 and later) and never run: TensorRT builds on a GPU only,
and TensorRT for RTX has no such plugins. The group norms cannot go this way: they take two launches and memory
between them, and such a plugin has one launch and none.

TensorRT passes a kernel its inputs, then integers, then outputs: so this one has parameters in that order, of
contiguous tensors, and its scale is compiled in (`kernels._attention_aot`). It takes PTX, which the driver compiles:
Triton 3.9 writes version 9.4 for sm_90 and newer, and a driver older than that refuses it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import BackendError
from ..runtime.engines.plugin_launch import DTYPES, OPERATORS, Shapes
from ..runtime.engines.plugins import AOT_ATTENTION, NAMESPACE, PluginCalls

__all__ = ["key_of", "register"]

_NODE = AOT_ATTENTION.partition(":")[0]
_FORMATS = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


def key_of(dtype: str, shapes: Shapes, attributes: Mapping[str, int | float]) -> str:
    """Which kernels a node needs: as its other plugin, with the scale."""
    kind, *fields = OPERATORS[_NODE].key(dtype, shapes, attributes).split()
    return " ".join([f"{kind}-aot", *fields[:-1], f"scale={float(attributes['scale'])!r}"])


def register(trtp: Any, calls: PluginCalls, arch: int) -> None:
    """Register the plugin with `trtp`, which is the module `tensorrt.plugin`. Once a process.

    Args:
        calls: has the kernels, and counts.
        arch: of the GPU that builds.
    """
    name = f"{NAMESPACE}::{_NODE}"
    counts = calls.counts[AOT_ATTENTION]

    def describe(q: Any, k: Any, v: Any, scale: float) -> Any:
        counts["created"] += 1
        return q.like()

    def formats(q: Any, k: Any, v: Any, scale: float, outputs: Any) -> Any:
        counts["configured"] += 1
        # The graph says which: kernels of another dtype were not compiled, and might be asked for.
        return [trtp.AutoTuneCombination(", ".join([_FORMATS[_dtype_of(q.dtype)]] * 4), "LINEAR")]

    def compiled(q: Any, k: Any, v: Any, scale: float, outputs: Any, tactic: int) -> Any:
        counts["serialized"] += 1
        with calls.watching(AOT_ATTENTION):
            B, Sq, H, D = (q.shape_expr[i] for i in range(4))
            Sk = k.shape_expr[1]
            shapes = [(-1, -1, -1, _known(D)), (-1, _known(Sk), -1, _known(D))]
            constants, image = _image(
                calls, key_of(_dtype_of(q.dtype), shapes, {"scale": float(scale)}), arch
            )
            launch = trtp.KernelLaunchParams()
            slices = -(-_known(D) // constants["BLOCK_V"])
            launch.grid_x = B * H * trtp.cdiv(Sq, constants["BLOCK_M"]) * slices
            launch.block_x = 32 * image["warps"]
            launch.shared_mem = image["shared"]
            sizes = trtp.SymIntExprs(3)
            for i, size in enumerate((H, Sq, Sk)):
                sizes[i] = trtp.SymInt32(size)
            return image["entry"], image["ptx"], launch, sizes

    # It reads annotations as objects, not as the text that they are in this file.
    tensors = dict.fromkeys(("q", "k", "v"), trtp.TensorDesc)
    outputs = tuple[trtp.TensorDesc]
    describe.__annotations__ = {**tensors, "scale": float, "return": trtp.TensorDesc}
    formats.__annotations__ = {
        **tensors,
        "scale": float,
        "outputs": outputs,
        "return": list[trtp.AutoTuneCombination],
    }
    result = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    compiled.__annotations__ = {
        **tensors,
        "scale": float,
        "outputs": outputs,
        "tactic": int,
        "return": result,
    }
    trtp.register(name)(describe)
    trtp.autotune(name)(formats)
    trtp.aot_impl(name)(compiled)


def _known(size: Any) -> int:
    """A dimension's value, or -1 where it varies."""
    return int(size.constant_value()) if size.is_constant else -1


def _dtype_of(dtype: Any) -> str:
    names = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}
    if dtype.name not in names:
        raise BackendError(f"attention of {dtype.name}; a plugin takes {', '.join(DTYPES)}")
    return names[dtype.name]


def _image(calls: PluginCalls, key: str, arch: int) -> tuple[Mapping[str, int], Mapping[str, Any]]:
    path = calls.files(key).get(arch)
    if path is None:
        raise BackendError(f"no kernels were compiled for {key} and sm_{arch}")
    found = json.loads(path.read_bytes())
    return found["constants"], found["images"]["attention"]
