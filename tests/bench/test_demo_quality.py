"""`bench/demo_model/evaluate.py`: the shipped demo draws what its prompts say: a short form here, the whole of it in
`make test-full`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from latentrt.bench.demo_model.evaluate import measure_accuracy, measure_fid, measure_sizes, measure_vae
from latentrt.bench.demo_model.generate import Picture, PipelineGenerator
from latentrt.bench.demo_model.scenes import random_scene, render
from latentrt.bench.demo_model.tokenizer import DEMO
from latentrt.bench.quality import ImageTower, fid_difference, fid_features, frechet_distance
from scipy import ndimage


@pytest.fixture(scope="module")
def refined() -> PipelineGenerator:
    return PipelineGenerator(refine=True, backend="eager")


@pytest.fixture(scope="module")
def tower() -> ImageTower:
    return ImageTower.load(DEMO / "image_tower")


def test_prompts_steer_the_picture(refined: PipelineGenerator) -> None:
    """Right for the picture's own prompt, wrong for another's; `make test-full` holds how often."""

    def shuffled(prompts: list[str], seeds: Sequence[int], *, steps: int) -> list[np.ndarray]:
        return refined(prompts[1:] + prompts[:1], seeds, steps=steps)

    own, other = (measure_accuracy(g, count=10, steps=12) for g in (refined, shuffled))
    print(own, other)
    assert own.colours >= 0.6
    assert own.objects >= 0.5
    assert own.relations >= 0.7
    assert other.colours <= 0.25
    assert other.objects <= 0.1


def test_fid_of_drawn_scenes_is_below_that_of_damaged_ones(tower: ImageTower) -> None:
    rng = random.Random(0)
    drawn = [render(random_scene(rng)) for _ in range(240)]
    noise = np.random.default_rng(0)
    damages: list[Callable[[Picture], Picture]] = [
        lambda p: np.clip(p + noise.normal(0, 24, p.shape), 0, 255).astype(np.uint8),
        lambda p: ndimage.gaussian_filter(p, (1.5, 1.5, 0)),
    ]
    truth, clean = (fid_features(tower, part) for part in (drawn[:120], drawn[120:]))
    for damage in damages:
        damaged = fid_features(tower, [damage(p) for p in drawn[120:]])
        assert frechet_distance(truth, clean) < frechet_distance(truth, damaged)
        _, low, _ = fid_difference(truth, damaged, clean, seed=0, rounds=8)
        assert low > 0


def test_fid_prefers_the_side_that_draws_the_truth(tower: ImageTower) -> None:
    """Sides without a model: one draws scenes, the other draws them blurred."""

    def drawn(prompts: list[str], seeds: Sequence[int], *, steps: int) -> list[Picture]:
        return [render(random_scene(random.Random(seed))) for seed in seeds]

    def blurred(prompts: list[str], seeds: Sequence[int], *, steps: int) -> list[Picture]:
        return [ndimage.gaussian_filter(p, (1.5, 1.5, 0)) for p in drawn(prompts, seeds, steps=steps)]

    result = measure_fid(blurred, drawn, tower, count=60, steps=1, rounds=8)
    print(result)
    assert result.refined < result.base
    assert result.low > 0


def test_frechet_distance_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (4000, 3)), rng.normal(2, 3, (4000, 3))
    assert frechet_distance(a, b) == pytest.approx(3 * (4 + (3 - 1) ** 2), rel=0.05)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_a_crop_moves_the_object_and_a_small_original_blurs(refined: PipelineGenerator) -> None:
    result = measure_sizes(refined, count=3, steps=10)
    print(result)
    assert result.shift_right < -result.offset / 2
    assert result.shift_down < -result.offset / 2
    assert result.energy_small < 0.75 * result.energy_full


def test_what_the_vae_keeps(refined: PipelineGenerator) -> None:
    kept = measure_vae(refined.base.vae, count=8)
    print(kept)
    assert kept.psnr > 28
    assert kept.objects["all"] >= 0.6
    assert kept.drawn_small < 0.3


@pytest.mark.full
@pytest.mark.timeout(1000)
def test_full_vae(refined: PipelineGenerator) -> None:
    result = measure_vae(refined.base.vae)
    print(result)
    assert result.psnr >= 30


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_full_accuracy(refined: PipelineGenerator) -> None:
    result = measure_accuracy(refined)
    print(result)
    assert result.objects >= 0.9
    assert result.objects_held_out >= 0.85
    assert result.relations >= 0.9


@pytest.mark.full
@pytest.mark.timeout(6000)
def test_full_refiner_improves_fid(refined: PipelineGenerator, tower: ImageTower) -> None:
    result = measure_fid(PipelineGenerator(refine=False, backend="eager"), refined, tower)
    print(result)
    assert result.low > 0


@pytest.mark.full
@pytest.mark.timeout(1000)
def test_full_sizes(refined: PipelineGenerator) -> None:
    result = measure_sizes(refined)
    print(result)
    assert result.energy_small < 0.6 * result.energy_full
    assert result.shift_right == pytest.approx(-result.offset, abs=8)
    assert result.shift_down == pytest.approx(-result.offset, abs=8)
