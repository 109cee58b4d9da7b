"""Time against quality over numbers of steps and shares of the refiner, on the demo.

Every setting generates the same prompts and seeds. Settings take turns, one batch at a time, in an order that is
reversed for every other batch, so that a change of the machine's speed affects all of them alike.
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
from .markup import as_markdown
from .plots import lines
from .report import STYLE
from .side import Images, as_bytes

__all__ = ["Generate", "Point", "page", "sweep", "table", "write_sweep"]

Generate = Callable[[Sequence[str], Sequence[int], int, float], Images]
"""(prompts, seeds, steps, high_noise_frac) -> pictures."""


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        high_noise_frac: the base's share of the schedule; at 1 the refiner does nothing.
        seconds: for one picture, the median over batches.
        clip: mean CLIP score.
        objects: share of the pictures in which every object has its colour and shape, by `demo_model/checker.py`.
        pictures: how many were generated.
    """

    steps: int
    high_noise_frac: float
    seconds: float
    clip: float
    objects: float
    pictures: int


def sweep(
    generate: Generate,
    scenes: Sequence[tuple[str, Scene]],
    clip: ClipNetwork,
    *,
    steps: Sequence[int],
    fracs: Sequence[float],
    batch: int,
    seed: int,
    on_progress: Callable[[str], None] = lambda state: None,
    on_interrupt: Callable[[list[Point]], None] = lambda points: None,
) -> list[Point]:
    """Measure every combination of steps and shares, over all prompts.

    Args:
        scenes: prompts, with the scenes that they describe.
        batch: pictures generated at once.
        on_progress: called with a description of each batch before it is generated.
        on_interrupt: called on Ctrl-C, with the points over the batches that every setting has completed.

    Raises:
        KeyboardInterrupt: after `on_interrupt`.
        RequestError: a share is not in [0, 1], steps or the batch are below 1, or there is no prompt.
    """
    invalid = [frac for frac in fracs if not 0 <= frac <= 1]
    if invalid or not all(count >= 1 for count in (*steps, batch)) or not scenes:
        raise RequestError(
            f"steps {list(steps)}, shares {list(fracs)}, {len(scenes)} prompts, batch {batch}; steps, prompts and the "
            "batch must be at least 1, shares 0 to 1"
        )
    settings = list(itertools.product(steps, fracs))
    measured = {setting: _Measurements([], []) for setting in settings}
    prompts = [prompt for prompt, _ in scenes]

    def points() -> list[Point]:
        """Over the batches that every setting has completed; none if there is no such batch."""
        batches = min(len(measurements.images) for measurements in measured.values())
        if batches == 0:
            return []
        return [_point(setting, measured[setting], batches, scenes, clip) for setting in settings]

    # The warm-up takes every share, because some of them do not load the refiner.
    for frac in dict.fromkeys(fracs):
        generate(prompts[:batch], list(range(seed, seed + min(batch, len(prompts)))), max(steps), frac)
    try:
        for batch_number, first in enumerate(range(0, len(prompts), batch)):
            batch_prompts = prompts[first : first + batch]
            seeds = [seed + first + k for k in range(len(batch_prompts))]
            for setting in settings if batch_number % 2 == 0 else reversed(settings):
                last = first + len(batch_prompts)
                on_progress(f"{setting[0]} steps, share {setting[1]:g}: pictures {first + 1} to {last}")
                started = time.perf_counter()
                images = generate(batch_prompts, seeds, *setting)
                measured[setting].seconds.append((time.perf_counter() - started) / len(batch_prompts))
                measured[setting].images.append(images)
    except KeyboardInterrupt:
        if completed := points():
            on_interrupt(completed)
        raise
    return points()


@dataclass(frozen=True)
class _Measurements:
    """A setting's batches of pictures, and the seconds for one picture in each batch."""

    images: list[Images]
    seconds: list[float]


def _point(
    setting: tuple[int, float],
    measurements: _Measurements,
    batches: int,
    scenes: Sequence[tuple[str, Scene]],
    clip: ClipNetwork,
) -> Point:
    """The point of a setting over its first `batches` batches."""
    pictures = as_bytes(np.concatenate(measurements.images[:batches]))
    prompts, expected_scenes = zip(*scenes[: len(pictures)], strict=True)
    score = float(clip.scores(pictures, prompts).mean())
    correct = [
        judge(picture, scene).objects for picture, scene in zip(pictures, expected_scenes, strict=True)
    ]
    return Point(
        *setting, median(measurements.seconds[:batches]), score, float(np.mean(correct)), len(pictures)
    )


def table(points: Sequence[Point]) -> list[str]:
    """The points as a Markdown table."""
    rows = [["steps", "base's share", "s/picture", "CLIP score", "objects right"]]
    for p in points:
        rows.append(
            [f"{p.steps}", f"{p.high_noise_frac:g}", f"{p.seconds:.3f}", f"{p.clip:.2f}", f"{p.objects:.1%}"]
        )
    return as_markdown(rows)


def page(points: Sequence[Point], title: str) -> str:
    """An HTML page that plots CLIP score and correct objects against seconds.

    Each share of the base is a line, with a point for each number of steps.
    """
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


def write_sweep(folder: Path, points: Sequence[Point], metadata: dict[str, Any], title: str) -> None:
    """Write `sweep.json` and `sweep.html`."""
    content = {
        "schema": 2,
        "benchmark": "latentrt bench sweep",
        **metadata,
        "points": [asdict(p) for p in points],
    }
    write_json(folder / "sweep.json", content)
    write_atomic(folder / "sweep.html", page(points, title))
