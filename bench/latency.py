"""End-to-end latency of the demo on this machine: latentrt's back ends beside diffusers eager.

    python -m latentrt.bench.latency [--steps 30] [--repeats 7] [--backends onnxruntime,eager] [--out FILE.json]

All sides have the same weights, noise, steps and threads, and run in turn (A B C A B C ...) after a warm-up, so
that a change in the machine's speed meets all of them. Images are compared before a time is given: a side that is
more than 1e-2 of the [0, 1] image away from diffusers has no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime.pipeline import Pipeline
from .machine import describe_machine

__all__ = ["Row", "main", "measure"]

PROMPT = "a large red circle above a small blue square"
MAX_DIFFERENCE = 1e-2
SPLIT = 0.8
GUIDANCE = 5.0

Image = NDArray[np.float32]
Side = Callable[[int], Image]


@dataclass(frozen=True)
class Row:
    """One side's figures.

    Attributes:
        seconds: of each counted run, in order.
        median: of those.
        ratio: median over the pairs of diffusers' seconds by this side's in the same round; above 1 is faster.
        difference: largest pixel difference to diffusers' image, of [0, 1].
    """

    side: str
    seconds: list[float]
    median: float
    ratio: float
    difference: float


def diffusers_side(steps: int) -> Side:
    """diffusers eager on the demo's weights, base and refiner, in float32."""
    from .demo_model.generate import DiffusersGenerator

    generator = DiffusersGenerator(demo_folder(), refine=True, guidance=GUIDANCE)

    def run(seed: int) -> Image:
        return generator.arrays([PROMPT], [seed], steps=steps)

    return run


def latentrt_side(backend: str, steps: int) -> Side:
    """latentrt on one back end."""
    pipe = Pipeline.from_pretrained("demo", refiner="demo", backend=backend, device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int) -> Image:
        out = pipe(
            PROMPT,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            high_noise_frac=SPLIT,
            output_type="np",
        )
        images: Image = out.images
        return images

    return run


def demo_folder() -> Path:
    """Where the shipped checkpoint is."""
    return Path(__file__).resolve().parents[1] / "runtime" / "demo"


def measure(sides: dict[str, Side], repeats: int) -> list[Row]:
    """Run all sides in turn; the first one is what the others are compared with.

    Raises:
        ValueError: a side's image differs from the first one's by more than MAX_DIFFERENCE.
    """
    images = {name: side(0) for name, side in sides.items()}  # warm-up as well
    first = next(iter(sides))
    differences = {name: float(np.abs(image - images[first]).max()) for name, image in images.items()}
    for name, difference in differences.items():
        if difference > MAX_DIFFERENCE:
            raise ValueError(f"{name} is {difference:.2g} away from {first}: a wrong image has no time")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeats):
        for name, side in sides.items():
            begun = time.perf_counter()
            side(round_)
            seconds[name].append(time.perf_counter() - begun)
    return [
        Row(
            side=name,
            seconds=times,
            median=statistics.median(times),
            ratio=statistics.median(a / b for a, b in zip(seconds[first], times, strict=True)),
            difference=differences[name],
        )
        for name, times in seconds.items()
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Latency of the demo beside diffusers, on the CPU.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backends", default="onnxruntime,eager")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(argv)
    sides = {"diffusers eager": diffusers_side(args.steps)}
    for backend in args.backends.split(","):
        sides[f"latentrt {backend}"] = latentrt_side(backend, args.steps)
    rows = measure(sides, args.repeats)
    print(f"demo, base + refiner, {args.steps} steps, guidance {GUIDANCE}, {torch.get_num_threads()} threads")
    print(f"{'side':<24}{'median s':>10}{'min':>8}{'max':>8}{'x diffusers':>13}{'difference':>12}")
    for row in rows:
        low, high = min(row.seconds), max(row.seconds)
        print(
            f"{row.side:<24}{row.median:>10.3f}{low:>8.3f}{high:>8.3f}{row.ratio:>13.2f}{row.difference:>12.1e}"
        )
    if args.out is not None:
        command = " ".join(
            ["python -m latentrt.bench.latency", *(argv if argv is not None else sys.argv[1:])]
        )
        result: dict[str, Any] = {
            "schema": 1,
            "benchmark": "latency of the demo, CPU",
            "command": command,
            "machine": describe_machine(),
            "steps": args.steps,
            "rows": [asdict(row) for row in rows],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
