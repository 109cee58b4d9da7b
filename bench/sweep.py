"""Time against quality over numbers of steps and shares of the refiner, on the demo.

Each setting generates the same prompts and seeds. Settings are interleaved, one batch at a time, forwards and backwards
in turn, so that a change in the machine's speed meets all of them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import RequestError
from ..kernels.atomic_file import write_atomic, write_json
from .demo_model.checker import judge
from .demo_model.scenes import Scene
from .features import ClipNetwork
from .plots import lines
from .report import STYLE
from .side import Images, as_bytes
from .tables import as_markdown

__all__ = ["Make", "Point", "page", "sweep", "table", "write_sweep"]

Make = Callable[[Sequence[str], Sequence[int], int, float], Images]
"""(prompts, seeds, steps, high_noise_frac) -> pictures."""


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        high_noise_frac: the base's share of the schedule; at 1 the refiner does nothing.
        seconds: of a picture, the median over batches.
        clip: mean CLIP score.
        objects: share of the pictures in which every object has its colour and its shape, by `demo_model/checker.py`.
        pictures: how many were generated.
    """

    steps: int
    high_noise_frac: float
    seconds: float
    clip: float
    objects: float
    pictures: int


def sweep(
    make: Make,
    scenes: Sequence[tuple[str, Scene]],
    clip: ClipNetwork,
    *,
    steps: Sequence[int],
    fracs: Sequence[float],
    batch: int,
    seed: int,
    tell: Callable[[str], None] = lambda state: None,
    keep: Callable[[list[Point]], None] = lambda points: None,
) -> list[Point]:
    """Every combination, over all prompts.

    Args:
        scenes: prompts, with the scenes that they describe.
        batch: pictures generated at once.
        keep: called if it is interrupted, with the points over the batches that every setting has completed.

    Raises:
        KeyboardInterrupt: after `keep`.
        RequestError: a share is not in [0, 1], steps or the batch are below 1, or there is no prompt.
    """
    wrong = [frac for frac in fracs if not 0 <= frac <= 1]
    if wrong or not all(count >= 1 for count in (*steps, batch)) or not scenes:
        raise RequestError(
            f"steps {list(steps)}, shares {list(fracs)}, {len(scenes)} prompts, batch {batch}; steps, prompts and the "
            "batch must be at least 1, shares 0 to 1"
        )
    settings = list(itertools.product(steps, fracs))
    found = {setting: _Made([], []) for setting in settings}
    prompts = [prompt for prompt, _ in scenes]

    def points() -> list[Point]:
        done = min(len(made.images) for made in found.values())
        return [_point(setting, found[setting], done, scenes, clip) for setting in settings] if done else []

    # Warm-up: what only some shares ask for, the refiner, is loaded by then.
    for frac in dict.fromkeys(fracs):
        make(prompts[:batch], list(range(seed, seed + min(batch, len(prompts)))), max(steps), frac)
    try:
        for number, first in enumerate(range(0, len(prompts), batch)):
            some = prompts[first : first + batch]
            seeds = [seed + first + k for k in range(len(some))]
            for setting in settings if number % 2 == 0 else reversed(settings):
                tell(f"{setting[0]} steps, share {setting[1]:g}: pictures {first + 1} to {first + len(some)}")
                begun = time.perf_counter()
                images = make(some, seeds, *setting)
                found[setting].seconds.append((time.perf_counter() - begun) / len(some))
                found[setting].images.append(images)
    except KeyboardInterrupt:
        if completed := points():
            keep(completed)
        raise
    return points()


@dataclass(frozen=True)
class _Made:
    """A setting's batches, and the seconds of a picture in each."""

    images: list[Images]
    seconds: list[float]


def _point(
    setting: tuple[int, float], made: _Made, done: int, scenes: Sequence[tuple[str, Scene]], clip: ClipNetwork
) -> Point:
    """Of the first `done` batches."""
    pictures = as_bytes(np.concatenate(made.images[:done]))
    prompts, shown = zip(*scenes[: len(pictures)], strict=True)
    score = float(clip.scores(pictures, prompts).mean())
    right = [judge(picture, scene).objects for picture, scene in zip(pictures, shown, strict=True)]
    return Point(*setting, median(made.seconds[:done]), score, float(np.mean(right)), len(pictures))


def table(points: Sequence[Point]) -> list[str]:
    """A Markdown table."""
    rows = [["steps", "base's share", "s/picture", "CLIP score", "objects right"]]
    for p in points:
        rows.append(
            [f"{p.steps}", f"{p.high_noise_frac:g}", f"{p.seconds:.3f}", f"{p.clip:.2f}", f"{p.objects:.1%}"]
        )
    return as_markdown(rows)


def page(points: Sequence[Point], title: str) -> str:
    """A page with CLIP score and objects right against seconds, a line for each share of the base through its steps."""
    plots = []
    for name, unit in (("clip", "CLIP score"), ("objects", "share of pictures with every object right")):
        series = []
        for frac in dict.fromkeys(p.high_noise_frac for p in points):
            line = sorted((p for p in points if p.high_noise_frac == frac), key=lambda p: p.steps)
            series.append(
                (f"base's share {frac:g}", [p.seconds for p in line], [getattr(p, name) for p in line])
            )
        plots.append(f"<h3>{unit}</h3>{lines(series, 's/picture', name)}")
    head = f'<meta charset="utf-8"><title>latentrt bench sweep</title><style>{STYLE}</style>'
    steps = ", ".join(map(str, sorted({p.steps for p in points})))
    note = (
        f"{points[0].pictures} pictures of each setting. The points of a line have {steps} steps. What the base's "
        "share leaves of the schedule is the refiner's."
    )
    body = f'<h1>{escape(title)}</h1><p class="soft">{escape(note)}</p>{"".join(plots)}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write_sweep(folder: Path, points: Sequence[Point], about: dict[str, Any], title: str) -> None:
    """`sweep.json` and `sweep.html`."""
    content = {
        "schema": 2,
        "benchmark": "latentrt bench sweep",
        **about,
        "points": [asdict(p) for p in points],
    }
    write_json(folder / "sweep.json", content)
    write_atomic(folder / "sweep.html", page(points, title))
