"""What the demo's ratio says of SDXL itself on this CPU: its blocks at their real shapes, weighted by its work.

    python -m latentrt.bench.proportions [--rounds 7] [--out FILE.json]

The demo's tensors are so small that much of a picture's time goes between operators. At 1024x1024 the products are
hundreds of times larger, and what a back end saves is another thing. A whole step of SDXL is minutes on a CPU, so one
block of each kind is timed instead, diffusers' eager beside ONNX Runtime on an export of the same module (which is what
latentrt's CPU back end runs on), in turns, and a forward of the base UNet is made up of them by its floating-point
operations. What is left out: the text encoders, the VAE, memory that does not fit, and whatever latentrt's own graph
does better than a plain export.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..runtime.engines.onnxruntime import open_session
from .machine import describe_machine
from .stats import Interval, ratio

__all__ = ["BLOCKS", "FORWARD_TFLOP", "Block", "Measured", "estimate", "main", "measure"]

FORWARD_TFLOP = 6.761
"""Of the base UNet for one row at 1024x1024; `latentrt plan sdxl` counts it."""


@dataclass(frozen=True)
class Block:
    """One kind of block at one of SDXL's shapes.

    Attributes:
        calls: in a forward of the base UNet; None for the kind that the rest of the work is taken to be of.
        make: the module and its inputs.
    """

    name: str
    calls: int | None
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Measured:
    """One block.

    Attributes:
        flops: of one call, products only.
        eager, onnxruntime: seconds of each round.
        difference: largest, of the two results.
    """

    name: str
    calls: int | None
    flops: float
    eager: list[float]
    onnxruntime: list[float]
    difference: float


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, text: int) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        self.block = BasicTransformerBlock(
            width, heads, width // heads, cross_attention_dim=text, activation_fn="geglu"
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """[B, S, C] and [B, 77, T] -> [B, S, C]."""
        out: Tensor = self.block(x, encoder_hidden_states=text)
        return out


class _Residual(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.block = ResnetBlock2D(in_channels=width, temb_channels=embedding, eps=1e-5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, C, H, W] and [B, E] -> [B, C, H, W]."""
        out: Tensor = self.block(x, embedding)
        return out


def transformer(
    tokens: int, width: int, heads: int, text: int = 2048
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A transformer block over a prompt of 77 tokens."""
    return _Transformer(width, heads, text), (torch.randn(1, tokens, width), torch.randn(1, 77, text))


def residual(side: int, width: int, embedding: int = 1280) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A residual block, two convolutions of 3x3."""
    return _Residual(width, embedding), (torch.randn(1, width, side, side), torch.randn(1, embedding))


BLOCKS = (
    Block("transformer, 4096 x 640", 10, lambda: transformer(4096, 640, 10)),
    Block("transformer, 1024 x 1280", 60, lambda: transformer(1024, 1280, 20)),
    Block("residual, 128 x 128 x 320", None, lambda: residual(128, 320)),
)


@torch.no_grad()
def measure(block: Block, rounds: int) -> Measured:
    """Both in turns, after a warm-up each."""
    torch.manual_seed(0)
    module, inputs = block.make()
    module.eval()
    with FlopCounterMode(display=False) as counter:
        wanted = module(*inputs)
    with tempfile.TemporaryDirectory(prefix="latentrt-proportions-") as folder:
        run = _exported(module, inputs, Path(folder) / "block.onnx")
        difference = float((run(*inputs) - wanted).abs().max())
        seconds: dict[str, list[float]] = {"eager": [], "onnxruntime": []}
        for _ in range(rounds):
            for name, call in (("eager", module), ("onnxruntime", run)):
                begun = time.perf_counter()
                call(*inputs)
                seconds[name].append(time.perf_counter() - begun)
    flops = float(counter.get_total_flops())
    return Measured(block.name, block.calls, flops, **seconds, difference=difference)


def _exported(module: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> Callable[..., Tensor]:
    torch.onnx.export(module, inputs, file, dynamo=True, opset_version=20, external_data=True, verbose=False)
    session = open_session(file, torch.device("cpu"))
    names = [value.name for value in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        fed = dict(zip(names, (x.numpy() for x in tensors), strict=True))
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def estimate(found: Sequence[Measured]) -> dict[str, Any]:
    """A forward of the base UNet made up of the blocks: what is in none of those counted is of the kind with no count.

    Returns:
        Seconds of each side, their ratio, and the share of the work that is in counted blocks.
    """
    counted = [m for m in found if m.calls is not None]
    (filler,) = (m for m in found if m.calls is None)
    work = sum(m.flops * (m.calls or 0) for m in counted)
    times = [m.calls or 0 for m in counted] + [(1e12 * FORWARD_TFLOP - work) / filler.flops]
    whole = {
        side: [
            sum(count * seconds for count, seconds in zip(times, round_, strict=True))
            for round_ in zip(*(getattr(m, side) for m in (*counted, filler)), strict=True)
        ]
        for side in ("eager", "onnxruntime")
    }
    speedup: Interval = ratio(whole["eager"], whole["onnxruntime"])
    return {
        "seconds": {side: median(values) for side, values in whole.items()},
        "speedup": asdict(speedup),
        "counted_share": work / (1e12 * FORWARD_TFLOP),
    }


def table(found: Sequence[Measured], whole: Mapping[str, Any]) -> list[str]:
    """In Markdown."""
    lines = ["| block | GFLOP | eager GFLOP/s | ONNX Runtime GFLOP/s | ratio |", "|" + " --- |" * 5]
    for m in found:
        rates = [m.flops / median(seconds) / 1e9 for seconds in (m.eager, m.onnxruntime)]
        r = ratio(m.eager, m.onnxruntime)
        lines.append(
            f"| {m.name} | {m.flops / 1e9:.1f} | {rates[0]:.0f} | {rates[1]:.0f} | {r.value:.2f} ({r.low:.2f} to "
            f"{r.high:.2f}) |"
        )
    r, s = whole["speedup"], whole["seconds"]
    lines += [
        "",
        f"A forward of SDXL's base UNet at 1024x1024 made up of them ({whole['counted_share']:.0%} of its work is in "
        f"blocks counted, the rest is taken for residual ones): {s['eager']:.0f} s eager, {s['onnxruntime']:.0f} s by "
        f"ONNX Runtime, {r['value']:.2f} x ({r['low']:.2f} to {r['high']:.2f}).",
    ]
    return lines


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="SDXL's blocks on this CPU, eager and by ONNX Runtime.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(argv)
    found = [measure(block, args.rounds) for block in BLOCKS]
    whole = estimate(found)
    print("\n".join(table(found, whole)))
    if args.out is not None:
        content = {
            "schema": 1,
            "benchmark": "SDXL's blocks on a CPU",
            "machine": describe_machine(torch.device("cpu")),
            "blocks": [asdict(m) for m in found],
            "forward": whole,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
