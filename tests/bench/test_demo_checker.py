"""`bench/demo_model/checker.py`: the pixel checker against drawn scenes: right where they are right, and wrong where a
fault is planted."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from latentrt.bench.demo_model import scenes
from latentrt.bench.demo_model.checker import find_objects, judge
from latentrt.bench.demo_model.evaluate import grammar_prompts, high_frequency_energy
from latentrt.bench.demo_model.scenes import (
    CANVASES,
    COLOURS,
    HELD_OUT_OBJECTS,
    SHAPES,
    Scene,
    Thing,
    caption,
    held_out,
    random_scene,
    render,
)
from latentrt.bench.machine import RESULTS

DEMO_MODEL = Path(scenes.__file__).parent


def _scenes(number: int, things: int | None = None) -> list[Scene]:
    rng = random.Random(3)
    return [random_scene(rng, CANVASES[k % 3], count=things, want_held_out=None) for k in range(number)]


def test_drawn_scenes_are_read_right() -> None:
    verdicts = [judge(render(scene), scene) for scene in _scenes(150)]
    assert np.mean([v.objects for v in verdicts]) > 0.99
    assert np.mean([v.relation for v in verdicts if v.relation is not None]) > 0.99


@pytest.mark.parametrize("colour", COLOURS)
def test_every_shape_of_every_size_in_every_colour(colour: str) -> None:
    for shape in SHAPES:
        for size, radius in (("small", 16.0), ("large", 24.0)):
            scene = Scene(128, 128, "white", (8.0, -8.0), (Thing(shape, colour, size, radius, 60, 66),), None)
            assert judge(render(scene), scene).objects, (colour, shape, size)


def test_blur_and_noise_as_a_model_leaves_them_are_tolerated() -> None:
    from PIL import Image, ImageFilter

    noise = np.random.default_rng(0)
    right = []
    for scene in _scenes(40):
        picture = np.asarray(Image.fromarray(render(scene)).filter(ImageFilter.GaussianBlur(1.0)))
        picture = np.clip(picture + noise.normal(0, 5, picture.shape), 0, 255).astype(np.uint8)
        right.append(judge(picture, scene).objects)
    assert np.mean(right) > 0.9


def test_planted_faults_are_seen() -> None:
    for scene in _scenes(30, things=2):
        first, second = scene.things
        colour = next(c for c in COLOURS if c not in (first.colour, second.colour))
        shape = next(s for s in SHAPES if s not in (first.shape, second.shape))
        for wrong in (
            (replace(first, colour=colour), second),
            (replace(first, shape=shape), second),
            (first, replace(second, colour=colour, shape=shape)),
            (second,),
        ):
            verdict = judge(render(replace(scene, things=wrong)), scene)
            assert not verdict.objects
            assert verdict.relation is False  # of what is not there nothing is rightly placed
        moved = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
        verdict = judge(render(replace(scene, things=moved)), scene)
        assert verdict.relation is False


def test_an_empty_background_shows_nothing() -> None:
    assert find_objects(render(Scene(128, 128, "gray", (12.0, 12.0), (), None))) == []


def test_held_out_pairings_stay_out_of_training() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng)
        assert not held_out(scene)
        assert not {(t.colour, t.shape) for t in scene.things} & HELD_OUT_OBJECTS
    rows = grammar_prompts(40, 0)
    assert [held_out(scene) for _, scene in rows] == [False, True] * 20


def test_the_demos_readme_counts_relations_from_the_failures_listed() -> None:
    found = json.loads((RESULTS / "demo_quality.json").read_text("utf-8"))["accuracy"]
    rows = grammar_prompts(found["prompts"], found["seed"])
    failed = {seed - found["seed"]: words for seed, words in found["failures"]}
    assert all(rows[k][0] == words for k, words in failed.items())
    two = [k for k, (_, scene) in enumerate(rows) if scene.relation is not None]
    right = [k for k in two if k not in failed]
    (line,) = re.findall("both objects and their relation.*", (DEMO_MODEL / "README.md").read_text("utf-8"))
    assert f"the {len(two)} prompts with two | {len(right) / len(two):.0%} |".replace("%", " %") in line


def test_captions_name_what_is_drawn() -> None:
    rng = random.Random(1)
    for scene in _scenes(100):
        words = caption(rng, scene, say_relation=True)
        for thing in scene.things:
            assert f"{thing.colour} {thing.shape}" in words
    scene = next(s for s in _scenes(20, things=2) if s.relation == "above")
    upper, lower = (f"{thing.colour} {thing.shape}" for thing in scene.things)
    for _ in range(30):
        words = caption(rng, scene, say_relation=True)
        upper_is_subject = "above" in words or "over" in words
        subject = upper if upper_is_subject else lower
        if "with" in words:  # "B with A above it"
            assert words.index(subject) > words.index("with")
        else:
            assert words.index(subject) == min(words.index(upper), words.index(lower))


def test_the_same_seed_draws_the_same_picture() -> None:
    a, b = (render(random_scene(random.Random(7))) for _ in range(2))
    assert np.array_equal(a, b)


def test_high_frequency_energy_falls_with_blur() -> None:
    from PIL import Image, ImageFilter

    picture = render(_scenes(1)[0])
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2)))
    assert high_frequency_energy(blurred) < 0.4 * high_frequency_energy(picture)
