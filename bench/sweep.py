"""What steps cost and give: time against quality over numbers of steps and shares of the refiner, on the demo.

Each setting makes the same prompts and seeds. Settings take turns, one batch of pictures at a time, so that a change
in the machine's speed meets all of them.
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
from .features import Judges
from .gates import FID_LEAST
from .plots import lines
from .quality import frechet_distance
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
        fid: to true pictures, from `FID_LEAST` pictures on.
        pictures: that were made.
    """

    steps: int
    high_noise_frac: float
    seconds: float
    clip: float
    fid: float | None
    pictures: int


def sweep(
    make: Make,
    prompts: Sequence[str],
    judges: Judges,
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
        batch: pictures made at once.
        keep: told what there is when it is interrupted, of the batches that every setting has made.

    Raises:
        KeyboardInterrupt: after `keep`.
        RequestError: a share is not in [0, 1], steps or the batch are below 1, or there are fewer than two prompts.
    """
    wrong = [frac for frac in fracs if not 0 <= frac <= 1]
    if wrong or not all(count >= 1 for count in (*steps, batch)) or len(prompts) < 2:
        raise RequestError(
            f"steps {list(steps)}, shares {list(fracs)}, {len(prompts)} prompts, batch {batch}; steps and the batch "
            "must be at least 1, shares 0 to 1, and prompts two"
        )
    if judges.clip is None or judges.fid is None or judges.truth is None:
        raise RequestError("a sweep needs judges for CLIP score and FID, and true pictures")
    settings = list(itertools.product(steps, fracs))
    found = {setting: _Made([], []) for setting in settings}

    def points() -> list[Point]:
        """Of the batches that every setting has made."""
        done = min(len(made.images) for made in found.values())
        return (
            [_point(setting, found[setting], done, prompts, judges) for setting in settings] if done else []
        )

    # Warm-up: what only some shares ask for, the refiner, is loaded by then.
    for frac in dict.fromkeys(fracs):
        make(prompts[:batch], list(range(seed, seed + min(batch, len(prompts)))), max(steps), frac)
    try:
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            seeds = [seed + first + k for k in range(len(some))]
            for setting in settings:
                tell(f"{setting[0]} steps, share {setting[1]:g}: pictures {first + 1} to {first + len(some)}")
                begun = time.perf_counter()
                images = make(some, seeds, *setting)
                found[setting].seconds.append((time.perf_counter() - begun) / len(some))
                found[setting].images.append(images)
    except KeyboardInterrupt:
        if kept := points():
            keep(kept)
        raise
    return points()


@dataclass(frozen=True)
class _Made:
    """A setting's batches, and the seconds of a picture in each."""

    images: list[Images]
    seconds: list[float]


def _point(
    setting: tuple[int, float], made: _Made, done: int, prompts: Sequence[str], judges: Judges
) -> Point:
    """Of the first `done` batches."""
    clip, fid, truth = judges.clip, judges.fid, judges.truth
    assert clip is not None
    assert fid is not None
    assert truth is not None
    pictures = as_bytes(np.concatenate(made.images[:done]))
    score = float(clip.scores(pictures, prompts[: len(pictures)]).mean())
    enough = len(pictures) >= FID_LEAST
    distance = frechet_distance(truth, fid.see(pictures)) if enough else None
    return Point(*setting, median(made.seconds[:done]), score, distance, len(pictures))


def table(points: Sequence[Point]) -> list[str]:
    """A Markdown table."""
    rows = [["steps", "base's share", "s/picture", "CLIP", "FID"]]
    for p in points:
        fid = "-" if p.fid is None else f"{p.fid:.4g}"
        rows.append([f"{p.steps}", f"{p.high_noise_frac:g}", f"{p.seconds:.3f}", f"{p.clip:.2f}", fid])
    return as_markdown(rows)


def page(points: Sequence[Point], title: str) -> str:
    """A page with CLIP score and FID against seconds, a line for each share of the base through its steps."""
    plots = []
    for name, unit in (("clip", "CLIP score, more is better"), ("fid", "FID, less is better")):
        if any(getattr(p, name) is None for p in points):
            continue
        series = []
        for frac in dict.fromkeys(p.high_noise_frac for p in points):
            line = sorted((p for p in points if p.high_noise_frac == frac), key=lambda p: p.steps)
            series.append(
                (f"base's share {frac:g}", [p.seconds for p in line], [getattr(p, name) for p in line])
            )
        plots.append(f"<h3>{unit}</h3>{lines(series, 's/picture', name)}")
    head = f'<meta charset="utf-8"><title>latentrt bench sweep</title><style>{STYLE}</style>'
    steps = ", ".join(map(str, sorted({p.steps for p in points})))
    told = (
        f"{points[0].pictures} pictures of each setting. The points of a line have {steps} steps. What the base's "
        "share leaves of the schedule is the refiner's."
    )
    if any(p.fid is None for p in points):
        told += f" FID takes {FID_LEAST} pictures."
    body = f'<h1>{escape(title)}</h1><p class="soft">{escape(told)}</p>{"".join(plots)}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write_sweep(folder: Path, points: Sequence[Point], about: dict[str, Any], title: str) -> None:
    """`sweep.json` and `sweep.html`."""
    content = {
        "schema": 1,
        "benchmark": "latentrt bench sweep",
        **about,
        "points": [asdict(p) for p in points],
    }
    write_json(folder / "sweep.json", content)
    write_atomic(folder / "sweep.html", page(points, title))
