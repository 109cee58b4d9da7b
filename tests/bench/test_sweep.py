"""The sweep over something whose time and quality are known."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_clock import FakeClock
from latentrt.bench.features import Judges
from latentrt.bench.quality import Moments
from latentrt.bench.sweep import Point, page, sweep, table, write_sweep
from latentrt.errors import RequestError


class Brightness:
    """Sees how bright a picture is; truth is white."""

    name = "brightness"

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.truth = rng.normal(255, 0.1, (50, 2))

    def see(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([[p.mean(), p.mean()] for p in pictures])

    def scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        assert len(pictures) == len(prompts)
        return np.array([p.mean() for p in pictures])


def test_more_steps_take_longer_and_are_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock().install(monkeypatch)
    monkeypatch.setattr("latentrt.bench.sweep.FID_LEAST", 3)
    asked = []
    loaded: set[bool] = set()

    def make(prompts: Sequence[str], seeds: Sequence[int], steps: int, frac: float) -> np.ndarray:
        asked.append((list(seeds), steps, frac))
        if (frac < 1) not in loaded:  # base and refiner, when they are first asked for
            loaded.add(frac < 1)
            time.sleep(1)
        time.sleep(0.02 * steps * len(prompts))
        return np.full((len(prompts), 4, 4, 3), min(1.0, steps / 10) * frac, np.float32)

    judge = Brightness()
    judges = Judges(clip=judge, fid=judge, truth=Moments.of(judge.truth))
    points = sweep(make, ["a", "b", "c"], judges, steps=(2, 8), fracs=(0.5, 1.0), batch=2, seed=7)
    assert [(p.steps, p.high_noise_frac) for p in points] == [(2, 0.5), (2, 1.0), (8, 0.5), (8, 1.0)]
    assert [p.seconds for p in points] == pytest.approx([0.04, 0.04, 0.16, 0.16], abs=1e-4)
    few, many = points[1], points[3]
    assert many.clip > few.clip
    assert many.fid < few.fid
    # After the warm-up, settings take turns over the same seeds.
    assert asked[2:] == [
        (seeds, steps, frac) for seeds in ([7, 8], [9]) for steps in (2, 8) for frac in (0.5, 1.0)
    ]
    assert len(table(points)) == 6
    write_sweep(tmp_path / "new", points, {"seed": 7}, "a <title>")
    assert len(json.loads((tmp_path / "new" / "sweep.json").read_text())["points"]) == 4
    page = (tmp_path / "new" / "sweep.html").read_text()
    assert page.count("<polyline") == 4
    assert "The points of a line have 2, 8 steps." in page
    assert "a &lt;title&gt;" in page


def test_settings_that_cannot_be() -> None:
    for options in ({"fracs": (1.5,)}, {"steps": (0,)}, {"batch": 0}, {"prompts": ["a"]}):
        arguments = {"prompts": ["a", "b"], "steps": (1,), "fracs": (1.0,), "batch": 1, **options}
        prompts = arguments.pop("prompts")
        with pytest.raises(
            RequestError, match="steps and the batch must be at least 1, shares 0 to 1, and prompts"
        ):
            sweep(lambda *_: None, prompts, Judges(), seed=0, **arguments)


def test_what_was_made_before_an_interruption_is_kept() -> None:
    """Of batches that every setting has made; so few that FID is not told."""
    judge = Brightness()
    judges = Judges(clip=judge, fid=judge, truth=Moments.of(judge.truth))
    kept: list[list[Point]] = []

    def interrupted(at_call: int) -> None:
        calls = count()

        def make(prompts: Sequence[str], *_: object) -> np.ndarray:
            if next(calls) == at_call:
                raise KeyboardInterrupt
            return np.full((len(prompts), 4, 4, 3), 0.5, np.float32)

        with pytest.raises(KeyboardInterrupt):
            sweep(make, ["a"] * 8, judges, steps=(2, 8), fracs=(1.0,), batch=2, seed=0, keep=kept.append)

    interrupted(at_call=6)  # in the third batch
    interrupted(at_call=2)  # in the first
    assert [[(p.steps, p.pictures, p.fid) for p in points] for points in kept] == [
        [(2, 4, None), (8, 4, None)]
    ]
    assert "| 2 | 1 |" in table(kept[0])[2]
    assert table(kept[0])[2].endswith("| - |")
    shown = page(kept[0], "a title")
    assert shown.count("<svg") == 1
    assert "FID takes 50 pictures." in shown
