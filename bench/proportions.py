"""Times SDXL's own blocks on this CPU, at their real shapes, and estimates a forward of its UNet from these times.

    python -m latentrt.bench.proportions [--rounds 7] [--out bench/results/sdxl_blocks_cpu.json]

The demo's tensors are so small that much of a picture's time passes between operators. At 1024x1024 matrix products are
hundreds of times larger, so a back end gains something else. A whole step of SDXL takes minutes on a CPU. Instead, one
block of each kind is timed on each side, in turns: eager diffusers, in the layout that is faster here; ONNX Runtime
with PyTorch's export of the same module; and latentrt's own module with the same weights, exported and run by its back
end onnxruntime. A forward of the base UNet is estimated from these by its floating-point operations.

Text encoders, the VAE and memory limits are not part of the estimate. PyTorch's export has fixed sizes, latentrt's has
dynamic ones, as in use.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..errors import BenchmarkError
from ..export.measures import relative_error
from ..export.verify import LIMITS
from ..kernels.atomic_file import write_json
from ..runtime.engines.base import Engine
from ..runtime.engines.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine
from .machine import describe_machine, module_command
from .markup import as_markdown
from .onnxruntime_side import export_plainly
from .results import read_json
from .sdxl_blocks import BLOCKS, Block, Pair
from .side import MEMORY_FORMATS
from .stats import Interval, ratio

__all__ = ["BENCHMARK", "FORWARD_TFLOP", "BlockTimes", "estimate", "main", "measure", "read_blocks", "table"]

BENCHMARK = "SDXL's blocks on a CPU"
SCHEMA = 2
FORWARD_TFLOP = 6.761
"""Work of the base UNet for a batch of 1 at 1024x1024, as `latentrt plan sdxl` counts it."""
_SIDES = {"eager": "diffusers eager", "onnxruntime": "ONNX Runtime", "latentrt": "latentrt"}
_CPU = torch.device("cpu")
_LIMIT = LIMITS["unet"][torch.float32].relative_error


@dataclass(frozen=True)
class BlockTimes:
    """The times of one block.

    Attributes:
        flops: of one call, matrix products and convolutions only.
        layout: the faster one for eager's weights and activations.
        eager, onnxruntime, latentrt: seconds of each round.
        difference: the largest difference of a side's result from eager's.
    """

    name: str
    calls: int | None
    flops: float
    layout: str
    eager: list[float]
    onnxruntime: list[float]
    latentrt: list[float]
    difference: float


@torch.no_grad()
def measure(block: Block, rounds: int) -> BlockTimes:
    """Time a block on all sides in turns, after a warm-up of each.

    Raises:
        BenchmarkError: a side's result differs from eager's by more than the limit.
    """
    torch.manual_seed(0)
    pair = block.build()
    with FlopCounterMode(display=False) as counter:
        expected = pair.diffusers(*pair.inputs.values())
    with tempfile.TemporaryDirectory(prefix="latentrt-proportions-") as folder:
        engines = {
            "onnxruntime": _onnxruntime_engine(pair, Path(folder) / "block.onnx"),
            "latentrt": OnnxRuntimeBackend().load(pair.component(), device=_CPU, cache_dir=Path(folder)),
        }
        difference = max(
            _difference(f"{block.name}, {_SIDES[name]}", engine(pair.inputs)["out"], expected)
            for name, engine in engines.items()
        )
        layout, eager = _fastest_eager(pair)
        sides: dict[str, Callable[[], Any]] = {"eager": eager}
        sides |= {name: partial(engine, pair.inputs) for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(rounds):
            first = round_ % len(sides)
            for name in [*sides][first:] + [*sides][:first]:
                seconds[name].append(_seconds(sides[name]))
    flops = float(counter.get_total_flops())
    return BlockTimes(block.name, block.calls, flops, layout, **seconds, difference=difference)


def _difference(side: str, out: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, if it is within the limit of `latentrt verify` for the UNet."""
    error = relative_error(out, expected)
    if not error <= _LIMIT:  # so that NaN fails
        raise BenchmarkError(
            f"{side} differs from eager by {error:.3g} of its largest value, at most {_LIMIT:g}; it has no speed"
        )
    return float((out - expected).abs().max())


def _fastest_eager(pair: Pair) -> tuple[str, Callable[[], Tensor]]:
    """diffusers' module in the faster layout. Only images have more than one layout."""
    measured: dict[str, tuple[float, Callable[[], Tensor]]] = {}
    images = any(x.dim() == 4 for x in pair.inputs.values())
    for layout in MEMORY_FORMATS if images else ("contiguous",):
        memory_format = MEMORY_FORMATS[layout]
        module = copy.deepcopy(pair.diffusers).to(memory_format=memory_format)  # type: ignore[call-overload]
        inputs = [x.to(memory_format=memory_format) if x.dim() == 4 else x for x in pair.inputs.values()]
        call = partial(module, *inputs)
        call()
        measured[layout] = min(_seconds(call) for _ in range(3)), call
    best = min(measured, key=lambda layout: measured[layout][0])
    return best, measured[best][1]


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _onnxruntime_engine(pair: Pair, file: Path) -> Engine:
    """PyTorch's export of diffusers' module, run by the same engine as latentrt's."""
    export_plainly(file, pair.diffusers, pair.inputs, output_names=["out"])
    return OnnxRuntimeEngine(pair.component(), file, _CPU)


def estimate(measured: Sequence[BlockTimes]) -> dict[str, Any]:
    """Estimate a forward of the base UNet. Work outside of the counted blocks is taken to be of the kind with no count.

    Returns:
        "seconds": side -> seconds; "speedups": side -> speedup over eager; "counted_share": the share of the work that
        is in counted blocks.
    """
    counted = [m for m in measured if m.calls is not None]
    (filler,) = (m for m in measured if m.calls is None)
    work = sum(m.flops * (m.calls or 0) for m in counted)
    times = [m.calls or 0 for m in counted] + [(1e12 * FORWARD_TFLOP - work) / filler.flops]
    whole = {
        side: [
            sum(count * seconds for count, seconds in zip(times, round_, strict=True))
            for round_ in zip(*(getattr(m, side) for m in (*counted, filler)), strict=True)
        ]
        for side in _SIDES
    }
    return {
        "seconds": {side: median(values) for side, values in whole.items()},
        "speedups": {side: asdict(ratio(whole["eager"], whole[side])) for side in _SIDES if side != "eager"},
        "counted_share": work / (1e12 * FORWARD_TFLOP),
    }


def table(measured: Sequence[Mapping[str, Any]], whole: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: a table of blocks, in the form of `BlockTimes`, and a sentence on the estimate."""
    other_sides = [side for side in _SIDES if side != "eager"]
    head = ["block", "GFLOP", "eager's layout", *(f"{name}, GFLOP/s" for name in _SIDES.values())]
    head += [f"{_SIDES[side]} against eager" for side in other_sides]
    rows = [head]
    for m in measured:
        rates = [f"{m['flops'] / median(m[side]) / 1e9:.0f}" for side in _SIDES]
        ratios = [_interval_text(ratio(m["eager"], m[side])) for side in other_sides]
        rows.append([m["name"], f"{m['flops'] / 1e9:.1f}", m["layout"], *rates, *ratios])
    s = whole["seconds"]
    seconds_text = ", ".join(
        f"{s[side]:.0f} s by {_SIDES[side]} ({_interval_text(Interval(**whole['speedups'][side]))})"
        for side in other_sides
    )
    return [
        *as_markdown(rows),
        "",
        f"A forward of SDXL's base UNet at 1024x1024 made up of them ({whole['counted_share']:.0%} of its work is in "
        f"blocks counted, the rest is taken for residual ones): {s['eager']:.0f} s eager, {seconds_text}.",
    ]


def read_blocks(path: Path) -> dict[str, Any]:
    """What `main` wrote.

    Raises:
        BenchmarkError: the file is something else, or of another schema.
    """
    content: dict[str, Any] = read_json(path)
    kind = [content.get(key) for key in ("benchmark", "schema")] if isinstance(content, dict) else None
    if kind != [BENCHMARK, SCHEMA]:
        raise BenchmarkError(
            f"{path} holds no blocks of SDXL in schema {SCHEMA}; write it with python -m latentrt.bench.proportions"
        )
    return content


def _interval_text(r: Interval) -> str:
    return f"{r.value:.2f} x, {r.low:.2f} to {r.high:.2f}"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="SDXL's blocks on this CPU: eager, ONNX Runtime, latentrt.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; at least 1 is needed")
    measured = [measure(block, args.rounds) for block in BLOCKS]
    content = {
        "schema": SCHEMA,
        "benchmark": BENCHMARK,
        "command": module_command("latentrt.bench.proportions", argv),
        "machine": describe_machine(_CPU),
        "rounds": args.rounds,
        "blocks": [asdict(m) for m in measured],
        "forward": estimate(measured),
    }
    print("\n".join(table(content["blocks"], content["forward"])))
    if args.out is not None:
        write_json(args.out, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
