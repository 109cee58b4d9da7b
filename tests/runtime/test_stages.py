"""Latents from one expert to the next, whose samplers scale them differently."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.loops import denoise
from helpers.sampler_oracle import config_of, make_scheduler
from latentrt.errors import RequestError
from latentrt.runtime.latents import NoiseSource, initial_latents
from latentrt.runtime.sampler import build_table
from latentrt.runtime.schedule import make_schedule
from latentrt.runtime.stages import Stage, stages_of
from torch import Tensor

STEPS = 10
KINDS = ("euler", "euler-a", "ddim", "ddpm", "pndm", "dpm++2m", "lcm")
IMAGE = 100.0


def divided(base: str, refiner: str, split: float, steps: int = STEPS, **fields: Any) -> list[Stage]:
    experts: list[Any] = []
    for name in (base, refiner):
        config = config_of(make_scheduler(name, **fields))
        experts.append(SimpleNamespace(name=name, sampler_config=lambda _, config=config: config))
    return stages_of(experts, None, steps=steps, high_noise_frac=split)


def seen(stages: list[Stage]) -> list[list[tuple[int, float]]]:
    """The timestep and the share of the image in every sample that the experts of a perfect model see.

    The model knows a single picture, of one colour, and no noise is drawn: so any sampler keeps the latents at the
    picture, scaled as it is at their level of noise.
    """
    levels = torch.tensor(make_schedule(config_of(make_scheduler("euler")), STEPS).alphas_cumprod)
    told: list[tuple[int, float]] = []

    def perfect(sample: Tensor, timestep: Tensor) -> Tensor:
        t = int(timestep[0])
        told.append((t, float(sample.double().mean()) / IMAGE))
        a = float(levels[t])
        return (sample - a**0.5 * IMAGE) / (1 - a) ** 0.5

    # The picture at the first level, without noise.
    first = stages[0].table
    start = IMAGE * first.add_noise[0]
    latents, calls = torch.full((1, 4, 2, 2), start), []
    for stage in stages:
        told.clear()
        noise = torch.zeros(len(stage.table), 1, 4, 2, 2)
        latents = denoise(perfect, latents, stage.table, noise=noise)
        calls.append(list(told))
    return calls


def alone(steps: int, **window: float) -> int:
    """Steps that are left to a base alone, from an image."""
    config = config_of(make_scheduler("euler"))
    expert: Any = SimpleNamespace(name="base", sampler_config=lambda _: config)
    (stage,) = stages_of([expert], None, steps=steps, high_noise_frac=1.0, from_image=True, **window)
    return len(stage.table)


@pytest.mark.parametrize(
    ("strength", "end", "steps"),
    [(0.3, 0.6, 10), (0.8, 0.2, 50), (0.9, 0.1, 30), (0.3, 0.75, 4), (0.2, 0.9, 4)],
)
def test_a_strength_that_begins_at_the_end_is_refused(strength: float, end: float, steps: int) -> None:
    """Whether a step is left is a matter of whole steps: the picture would come back as it was."""
    told = rf"strength {strength} leaves no step before denoising_end {end} of {steps} steps"
    with pytest.raises(RequestError, match=told):
        alone(steps, strength=strength, denoising_end=end)


def test_a_strength_of_nothing_and_one_that_begins_before_the_end_are_taken() -> None:
    assert alone(50, strength=0.0, denoising_end=0.6) == 0
    assert alone(50, strength=0.8, denoising_end=0.3) == 5
    assert alone(10, denoising_end=0.6) == 6
    assert alone(4, strength=0.1) == 0


@pytest.mark.parametrize("split", [0.8, 0.5])
@pytest.mark.parametrize(("base", "refiner"), list(product(KINDS, KINDS)))
def test_the_refiner_starts_at_the_noise_level_of_its_first_timestep(
    base: str, refiner: str, split: float
) -> None:
    """With trailing spacing and ten steps all samplers, LCM's too, stop at the same timesteps."""
    stages = divided(base, refiner, split, timestep_spacing="trailing")
    levels = make_schedule(config_of(make_scheduler("euler")), STEPS).alphas_cumprod
    of_base, of_refiner = seen(stages)
    assert of_refiner[0][0] == of_base[-1][0] - 100
    # A PNDM that starts late goes on a step beyond what it tells the model, as diffusers' does.
    for timestep, share in (*of_base, of_refiner[0]):
        assert share == pytest.approx(float(levels[timestep]) ** 0.5, rel=1e-5), timestep


@pytest.mark.parametrize(("base", "refiner"), list(product(KINDS, KINDS)))
def test_only_what_is_scaled_differently_is_converted(base: str, refiner: str) -> None:
    stages = divided(base, refiner, 0.5, timestep_spacing="trailing")
    config = config_of(make_scheduler(base, timestep_spacing="trailing"))
    alone = build_table(config, STEPS, end=len(stages[0].table))
    eulers = [name.startswith("euler") for name in (base, refiner)]
    assert stages[0].table.rows[:-1].equal(alone.rows[:-1])
    assert stages[0].table.rows[-1].equal(alone.rows[-1]) == (eulers[0] == eulers[1])


def test_another_spacing_than_the_refiners() -> None:
    """Leading DPM++ stops elsewhere than Euler does; the picture still has its own strength when it is handed over."""
    stages = divided("dpm++2m", "euler", 0.8, timestep_spacing="leading")
    start = stages[1].table.add_noise
    (_, share), *_ = seen(stages)[1]
    assert share == pytest.approx(1 / (1 + start[1] ** 2) ** 0.5, rel=1e-5)


def test_noise_is_converted_with_the_picture() -> None:
    """The last step of a sampler that draws noise: all of its result is scaled, in float64 as in the table."""
    stages = divided("ddpm", "euler", 0.5, timestep_spacing="trailing")
    config = config_of(make_scheduler("ddpm", timestep_spacing="trailing"))
    alone = build_table(config, STEPS, end=len(stages[0].table))
    source = NoiseSource([torch.Generator().manual_seed(5)], 1)
    noise = source.draw_steps(alone, (4, 8, 8), torch.device("cpu"))
    start = initial_latents(source.draw((4, 8, 8)), alone)

    def run(table: Any) -> Tensor:
        return denoise(lambda sample, _: sample.sin(), start, table, noise=noise)

    sigma = float(
        make_schedule(config_of(make_scheduler("euler", timestep_spacing="trailing")), STEPS).sigmas[5]
    )
    expected = run(alone) * (1 + sigma**2) ** 0.5
    torch.testing.assert_close(run(stages[0].table), expected, rtol=1e-5, atol=1e-5)
