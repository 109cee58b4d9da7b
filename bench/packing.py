"""Measures what packing gains on the back end `triton`: SDXL's blocks as they are, and packed by `engines/packing.py`.

    python -m latentrt.bench.packing [--device cuda --dtype float16 --seconds 0.5 --out FOLDER]

Both are channels_last and use latentrt's norms, so they differ in where biases and shortcuts are added and in how an
image is upsampled. A packed block is given images that lack a bias, as in the network, and adds it. They take turns. A
packed block with another result is not timed. On a GPU, calls are timed like kernels: as CUDA graphs, over inputs that
are several times its cache. On the CPU they are called directly.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.atomic_file import write_json
from ..runtime.engines.packing import FusedUpsample, defer_in_resnet
from ..runtime.models.layers import ResnetBlock, Upsample
from ..runtime.place import dtype_name
from .kernel_timing import Calls, cuda_microseconds, gpu_is_alive, gpu_slug, input_count
from .machine import describe_machine, module_command

__all__ = ["BLOCKS", "Block", "main", "measure"]

_TIME_EMBEDDING = 1280
"""Channels in SDXL."""
_MAX_ERROR_RATIO = 2.0
"""The packed block's error may be so many times the plain block's, both compared with float32."""
_MAX_FLOAT32_ERROR = 1e-5
"""Errors up to this share of the largest value are always allowed, for float32 itself."""


@dataclass(frozen=True)
class Block:
    """One of SDXL's blocks, at 1024x1024.

    Attributes:
        of: where it runs: in a "step" with guidance, or in a "decoding".
        calls: how often it runs there.
        kind: "residual" or "doubling".
        widths: channels of input and output.
        side: height and width of the input.
    """

    of: str
    calls: int
    kind: str
    widths: tuple[int, int]
    side: int

    @property
    def name(self) -> str:
        channels = " to ".join(str(n) for n in dict.fromkeys(self.widths))
        return f"{self.of}: {self.kind}, {channels} x {self.side} x {self.side}"

    @property
    def adds_pending_bias(self) -> bool:
        """Whether its input lacks a bias, packed. Before an upsampling in a step a transformer adds it."""
        return self.of == "decoding" or self.kind == "residual"

    def build(self) -> ResnetBlock | Upsample:
        """The block with random weights, in float32."""
        if self.kind == "doubling":
            return Upsample(self.widths[0])
        return ResnetBlock(*self.widths, 32, 1e-6, _TIME_EMBEDDING if self.of == "step" else None)


BLOCKS = (
    # Of a step, the most frequent block of each level and two with a shortcut; of a decoding, all blocks.
    Block("step", 5, "residual", (320, 320), 128),
    Block("step", 5, "residual", (640, 640), 64),
    Block("step", 7, "residual", (1280, 1280), 32),
    Block("step", 1, "residual", (960, 320), 128),
    Block("step", 2, "residual", (2560, 1280), 32),
    Block("step", 1, "doubling", (1280, 1280), 32),
    Block("step", 1, "doubling", (640, 640), 64),
    Block("decoding", 5, "residual", (512, 512), 128),
    Block("decoding", 3, "residual", (512, 512), 256),
    Block("decoding", 1, "residual", (512, 256), 512),
    Block("decoding", 2, "residual", (256, 256), 512),
    Block("decoding", 1, "residual", (256, 128), 1024),
    Block("decoding", 2, "residual", (128, 128), 1024),
    Block("decoding", 1, "doubling", (512, 512), 128),
    Block("decoding", 1, "doubling", (512, 512), 256),
    Block("decoding", 1, "doubling", (256, 256), 512),
)


@torch.inference_mode()
def measure(block: Block, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time a block as it is and packed.

    Args:
        seconds: for the rounds of each.

    Returns:
        A row: the largest errors compared with float32, relative to its largest value; and microseconds of "plain" and
        "packed" with the "speedup", or an "error".
    """
    torch.manual_seed(0)
    module = block.build().to(dtype)
    pending = torch.randn(block.widths[0]).to(dtype).float() if block.adds_pending_bias else None
    packed, deferred_bias = _packed(module, pending)
    rows = 2 if block.of == "step" else 1
    time_ = F.silu(torch.randn(rows, _TIME_EMBEDDING).to(dtype))
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": _call(module, time_, device),
        "packed": _call(packed, time_, device),
    }
    shape = (rows, block.widths[0], block.side, block.side)
    nbytes = rows * block.widths[0] * block.side**2 * dtype.itemsize
    inputs = [(_image(shape, dtype, device),) for _ in range(input_count(nbytes, device))]
    exact = _call(copy.deepcopy(module).float(), time_.float(), device)
    deferred_bias = deferred_bias.to(device)[:, None, None]
    image = inputs[0][0]
    whole = image.float() if pending is None else image.float() + pending.to(device)[:, None, None]
    rounded = whole.to(dtype)
    row: dict[str, Any] = {"block": block.name, "calls": block.calls}
    row["plain_error"] = _error(sides["plain"](rounded).float(), exact(rounded.float()))
    row["packed_error"] = _error(sides["packed"](image).float() + deferred_bias, exact(whole))
    if not row["packed_error"] <= max(_MAX_ERROR_RATIO * row["plain_error"], _MAX_FLOAT32_ERROR):
        return row | {"error": "it computes something else"}
    timer = cuda_microseconds if device.type == "cuda" else _microseconds
    times = timer(sides, inputs, seconds)
    plain_us, packed_us = times["plain"], times["packed"]
    if isinstance(plain_us, str) or isinstance(packed_us, str):
        return row | {"error": f"{plain_us}; {packed_us}"}
    return row | times | {"speedup": plain_us / packed_us}


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).abs().max() / exact.abs().max())


def _packed(module: ResnetBlock | Upsample, pending: Tensor | None) -> tuple[nn.Module, Tensor]:
    """A packed copy that adds `pending`, float32 [Cin], to its input; and the bias [Cout] in float32 that it leaves to
    the following operator."""
    packed = copy.deepcopy(module)
    if isinstance(packed, ResnetBlock):
        deferred_bias = defer_in_resnet(packed, pending)
        return packed, torch.zeros(packed.conv2.out_channels) if deferred_bias is None else deferred_bias
    bias = packed.conv.bias
    assert bias is not None
    packed.conv.bias = None
    return FusedUpsample(packed, pending), bias.float()


def _call(module: nn.Module, time_: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The module on the device, in channels_last; the shift from the time's embedding is computed beforehand."""
    module = module.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not isinstance(module, ResnetBlock) or module.time_emb_proj is None:
        return module
    shift = module.time_emb_proj(time_.to(device))
    return lambda x: module(x, shift)


def _image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).normal_()


def _microseconds(calls: Calls, inputs: Sequence[tuple[Any, ...]], seconds: float) -> dict[str, float | str]:
    """A `kernel_timing.Timer` for the CPU: medians, in turns, after a warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds * len(calls)
    while len(next(iter(times.values()))) < 4 or time.monotonic() < end:
        for name, call in calls.items():
            started = time.perf_counter()
            call(*inputs[0])
            times[name].append(1e6 * (time.perf_counter() - started))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each block, and how much time a step and a decoding save."""
    lines = [f"{'block':<48}{'plain us':>10}{'packed us':>11}{'faster':>9}"]
    saved: dict[str, float] = {}
    for row in rows:
        if "error" in row:
            lines.append(f"{row['block']:<48}{row['error']}")
            continue
        lines.append(f"{row['block']:<48}{row['plain']:>10.1f}{row['packed']:>11.1f}{row['speedup']:>8.2f}x")
        of = row["block"].partition(":")[0]
        saved[of] = saved.get(of, 0.0) + row["calls"] * (row["plain"] - row["packed"])
    return [*lines, *(f"a {of}'s blocks above save {us / 1e3:.2f} ms" for of, us in saved.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a packed block has another result or cannot run."""
    parser = argparse.ArgumentParser(description="What packing gains, block by block.")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=0.5, help="for the rounds of each block")
    parser.add_argument("--only", metavar="TEXT", default="", help="blocks with this in their name")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results (default out)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float16" if args.device == "cuda" else "float32"))
    machine = describe_machine(device)
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine,
        "command": module_command("latentrt.bench.packing", argv),
        "dtype": dtype_name(dtype),
        "rows": rows,
    }
    where = gpu_slug(machine) if args.device == "cuda" else "cpu"
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        for block in BLOCKS:
            if args.only not in block.name:
                continue
            try:
                row = measure(block, dtype, device, args.seconds)
            except Exception as error:  # only this block fails; the others are still measured
                row = {"block": block.name, "calls": block.calls}
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            # After each block, in case the process is ended.
            write_json(args.out / f"packing_{where}.json", result)
            print("\n".join(table([row])[1:2]), flush=True)
            if "error" in row and not gpu_is_alive(device):
                break
    print("\n" + "\n".join(table(rows)))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
