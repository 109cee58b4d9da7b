"""Noise: the same numbers as diffusers draws, for each image by itself."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from helpers.sampler_oracle import (
    CLASSES,
    config_of,
    diffusers_steps,
    generators,
    make_scheduler,
    noise_like,
    refiner_timesteps,
)
from latentrt.errors import RequestError
from latentrt.runtime.latents import NoiseSource, initial_latents, noised_latents
from latentrt.runtime.sampler import build_table, step_range

CPU = torch.device("cpu")


def test_a_generator_for_each_image() -> None:
    theirs = randn_tensor((3, 4, 6, 6), generator=generators(3))
    assert NoiseSource(generators(3), 3).draw((4, 6, 6)).equal(theirs)


def test_one_generator_for_all_images() -> None:
    theirs = randn_tensor((3, 4, 6, 6), generator=generators(1)[0])
    assert NoiseSource(generators(1)[0], 3).draw((4, 6, 6)).equal(theirs)


@pytest.mark.parametrize(("name", "eta"), [(n, 0.0) for n in CLASSES] + [("ddim", 0.5)])
def test_generators_end_where_diffusers_leaves_them(name: str, eta: float) -> None:
    """Every draw that diffusers makes is made, and no other: a refiner goes on with the same generators."""
    for n in (1, 2, 7):
        for begin in (0, 1):
            theirs, ours = generators(2), generators(2)
            scheduler = make_scheduler(name)
            scheduler.set_timesteps(n)
            timesteps, _ = refiner_timesteps(scheduler, n, strength=(n - begin) / n)
            diffusers_steps(scheduler, noise_like(2, 4, 4, 4), timesteps, theirs, eta=eta)
            table = build_table(config_of(scheduler), n, begin=begin, eta=eta)
            NoiseSource(ours, 2).draw_steps(table, (4, 4, 4), CPU)
            for a, b in zip(ours, theirs, strict=True):
                assert a.get_state().equal(b.get_state()), (n, begin)


def test_ddpm_draws_nothing_at_timestep_zero() -> None:
    at_zero = config_of(make_scheduler("ddpm", steps_offset=0))
    assert build_table(at_zero, 4).draws_noise == (True, True, True, False)
    assert build_table(config_of(make_scheduler("ddpm")), 4).draws_noise == (True,) * 4


def test_noise_of_the_steps_is_drawn_in_their_order() -> None:
    table = build_table(config_of(make_scheduler("lcm")), 4)
    source = NoiseSource(generators(2), 2)
    drawn = source.draw_steps(table, (4, 6, 6), CPU)
    assert drawn is not None
    again = NoiseSource(generators(2), 2)
    for step in range(3):
        assert drawn[step].equal(again.draw((4, 6, 6)))
    assert not drawn[3].any()


def test_no_buffer_where_nothing_is_drawn() -> None:
    table = build_table(config_of(make_scheduler("euler")), 4)
    assert NoiseSource(generators(1), 1).draw_steps(table, (4, 6, 6), CPU) is None


def test_an_image_draws_the_same_alone() -> None:
    table = build_table(config_of(make_scheduler("euler-a")), 3)
    together, alone = NoiseSource(generators(3), 3), NoiseSource(generators(3)[2:], 1)
    assert together.draw((4, 6, 6))[2:].equal(alone.draw((4, 6, 6)))
    batch, single = (s.draw_steps(table, (4, 6, 6), CPU) for s in (together, alone))
    assert batch is not None
    assert single is not None
    assert batch[:, 2:].equal(single)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", CLASSES)
def test_initial_and_noised_latents(name: str, spacing: str) -> None:
    noise, clean = noise_like(2, 4, 6, 6), noise_like(2, 4, 6, 6, seed=1)
    scheduler = make_scheduler(name, timestep_spacing=spacing)
    config = config_of(scheduler)
    for n in (1, 8, 30):
        scheduler.set_timesteps(n)
        table = build_table(config, n)
        torch.testing.assert_close(initial_latents(noise, table), noise * scheduler.init_noise_sigma)
        timesteps, _ = refiner_timesteps(scheduler, n, strength=1.0 if n == 1 else 0.6)
        begin, end = step_range(config, n, strength=1.0 if n == 1 else 0.6)
        theirs = scheduler.add_noise(clean, noise, timesteps[:1].repeat(2))
        late = build_table(config, n, begin=begin, end=end)
        torch.testing.assert_close(noised_latents(clean, noise, late), theirs)


def test_generators_and_images_must_match() -> None:
    with pytest.raises(RequestError, match="2 generators for 3 images"):
        NoiseSource(generators(2), 3)
