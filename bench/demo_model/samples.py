"""A grid of sample pictures: `python -m latentrt.bench.demo_model.samples DEMO_FOLDER OUT.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from .generate import PipelineGenerator

PROMPTS = (
    "a red circle on a white background",
    "a large blue square on a gray background",
    "a small yellow star on black",
    "a green cross",
    "a red circle above a blue square on a white background",
    "a yellow star left of a purple ring on a black background",
    "a large orange triangle below a small cyan square, gray background",
    "a pink cross to the right of a green circle on a brown background",
    "a red star on a white background",  # held out, as are the next three
    "a blue ring above a yellow square, black background",
    "a purple circle on gray",
    "a red triangle left of a cyan ring on a white background",
    "a small pink square and a large green ring",
    "an orange ring under a purple triangle on a brown background",
    "a cyan cross right of an orange star on a gray background",
    "a drawing of a large pink circle",
)
_COLUMNS = 8


def sample_grid(demo: Path, picture: Path, *, refine: bool, steps: int = 20) -> None:
    """Draw the prompts above, seed k for prompt k, and write them as one PNG."""
    generator = PipelineGenerator(demo, refine=refine, backend="eager")
    pictures = generator(list(PROMPTS), list(range(len(PROMPTS))), steps=steps)
    rows = [np.concatenate(pictures[k : k + _COLUMNS], axis=1) for k in range(0, len(pictures), _COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(picture, optimize=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-refiner", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    sample_grid(options.demo, options.out, refine=not options.no_refiner, steps=options.steps)


if __name__ == "__main__":
    main()
