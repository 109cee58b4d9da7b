"""The sweep over something whose time and quality are known."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_clock import FakeClock
from latentrt.bench.demo_model.scenes import random_scene, render
from latentrt.bench.sweep import Point, page, sweep, table, write_sweep
from latentrt.errors import RequestError

SCENES = [(f"scene {k}", random_scene(random.Random(k))) for k in range(8)]


class Brightness:
    """A score that grows with how bright a picture is."""

    name = "brightness"

    def scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        assert len(pictures) == len(prompts)
        return np.array([p.mean() for p in pictures])


def drawn(prompts: Sequence[str]) -> np.ndarray:
    """The scenes themselves, as a perfect model has them."""
    known = dict(SCENES)
    return np.stack([render(known[prompt]) for prompt in prompts]).astype(np.float32) / 255


def test_more_steps_take_longer_and_are_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock().install(monkeypatch)
    calls = []
    loaded: set[bool] = set()

    def make(prompts: Sequence[str], seeds: Sequence[int], steps: int, frac: float) -> np.ndarray:
        calls.append((list(seeds), steps, frac))
        if (frac < 1) not in loaded:  # base and refiner, when they are first used
            loaded.add(frac < 1)
            time.sleep(1)
        time.sleep(0.02 * steps * len(prompts))
        return drawn(prompts) if steps == 8 else np.full((len(prompts), 128, 128, 3), 0.0, np.float32)

    points = sweep(make, SCENES[:3], Brightness(), steps=(2, 8), fracs=(0.5, 1.0), batch=2, seed=7)
    settings = [(2, 0.5), (2, 1.0), (8, 0.5), (8, 1.0)]
    assert [(p.steps, p.high_noise_frac) for p in points] == settings
    assert [p.seconds for p in points] == pytest.approx([0.04, 0.04, 0.16, 0.16], abs=1e-4)
    assert [p.objects for p in points] == [0, 0, 1, 1]
    assert points[3].clip > points[1].clip
    # After the warm-up the settings take turns over the same seeds, forwards and backwards.
    assert calls[2:] == [([7, 8], *x) for x in settings] + [([9], *x) for x in reversed(settings)]
    assert len(table(points)) == 6
    assert table(points)[-1].endswith("| 100.0% |")
    write_sweep(tmp_path / "new", points, {"seed": 7}, "a <title>")
    assert len(json.loads((tmp_path / "new" / "sweep.json").read_text())["points"]) == 4
    page = (tmp_path / "new" / "sweep.html").read_text()
    assert page.count("<polyline") == 4
    assert "The points of a line have 2, 8 steps." in page
    assert "a &lt;title&gt;" in page


def test_settings_that_cannot_be() -> None:
    for options in ({"fracs": (1.5,)}, {"steps": (0,)}, {"batch": 0}, {"scenes": []}):
        arguments = {"scenes": SCENES, "steps": (1,), "fracs": (1.0,), "batch": 1, **options}
        scenes = arguments.pop("scenes")
        with pytest.raises(RequestError, match="must be at least 1, shares 0 to 1"):
            sweep(lambda *_: None, scenes, Brightness(), seed=0, **arguments)


def test_an_interrupted_sweep_reports_the_batches_that_every_setting_completed() -> None:
    reported: list[list[Point]] = []

    def interrupted(at_call: int) -> None:
        calls = count()

        def make(prompts: Sequence[str], *_: object) -> np.ndarray:
            if next(calls) == at_call:
                raise KeyboardInterrupt
            return drawn(prompts)

        with pytest.raises(KeyboardInterrupt):
            sweep(
                make,
                SCENES,
                Brightness(),
                steps=(2, 8),
                fracs=(1.0,),
                batch=2,
                seed=0,
                on_interrupt=reported.append,
            )

    interrupted(at_call=6)  # in the third batch
    interrupted(at_call=2)  # in the first
    assert [[(p.steps, p.pictures) for p in points] for points in reported] == [[(2, 4), (8, 4)]]
    assert page(reported[0], "a title").count("<svg") == 2
