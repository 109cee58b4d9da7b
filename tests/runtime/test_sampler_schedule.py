"""`runtime/schedule.py`: timesteps, noise levels, the cuts for base, refiner and image to image, and what is
refused."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.sampler_oracle import CLASSES, base_timesteps, config_of, make_scheduler, refiner_timesteps
from latentrt.errors import RequestError
from latentrt.kernels.sampler_step import COLUMNS, StepRow
from latentrt.runtime.sampler import SamplerConfig, build_table, step_range
from latentrt.runtime.schedule import make_schedule
from tolerances import SCHEDULE_KARRAS_EULER, SCHEDULE_SIGMAS

# All small counts, then some; the last ones are where float32 rounding decides about a half.
COUNTS = (*range(1, 61), *range(64, 1000, 61), 444, 768, 887, 996, 999, 1000)
SPACINGS = ("leading", "linspace", "trailing")


def sdxl(name: str = "euler", **fields: object) -> SamplerConfig:
    return config_of(make_scheduler(name, **fields))


@pytest.mark.parametrize(
    ("name", "spacing"),
    [(n, s) for n in CLASSES for s in (SPACINGS[:1] if n in ("lcm", "dpm++2m-karras") else SPACINGS)],
)
def test_timesteps_for_every_count(name: str, spacing: str) -> None:
    scheduler = make_scheduler(name, timestep_spacing=spacing)
    config = config_of(scheduler)
    compared = 0
    for n in COUNTS:
        try:
            ours = make_schedule(config, n)
        except RequestError:
            # Steps beyond the last timestep or twice at one level, where diffusers fails later, or more than LCM has.
            twice = name == "dpm++2m" and spacing == "linspace" and n == 1000
            assert n > 50 if name == "lcm" else (n > 998 and spacing == "leading") or twice
            continue
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps.double().numpy()
        if spacing == "trailing" and theirs[-1] == -1:
            theirs = theirs[:-1]  # a step too many, by rounding
        assert np.array_equal(ours.timesteps, theirs), n
        if len(ours.sigmas):
            sigmas = scheduler.sigmas.double().numpy()[: len(ours.sigmas)]
            assert np.allclose(ours.sigmas[:-1], sigmas[: len(theirs)], **SCHEDULE_SIGMAS), n
        compared += 1
    assert compared >= (50 if name == "lcm" else len(COUNTS) - 2)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["euler", "dpm++2m"])
def test_karras_timesteps(name: str, schedule: str) -> None:
    scheduler = make_scheduler(name, use_karras_sigmas=True, beta_schedule=schedule)
    config = config_of(scheduler)
    for n in range(1, 61):
        scheduler.set_timesteps(n)
        ours = make_schedule(config, n)
        assert np.allclose(
            ours.timesteps, scheduler.timesteps.numpy(), atol=SCHEDULE_KARRAS_EULER if name == "euler" else 0
        ), n


@pytest.mark.parametrize("name", CLASSES)
def test_cuts_are_diffusers(name: str) -> None:
    scheduler = make_scheduler(name)
    config = config_of(scheduler)
    for n in (1, 2, 3, 5, 20, 25, 50):
        scheduler.set_timesteps(n)
        full = scheduler.timesteps
        for fraction in (0.01, 0.1, 0.5, 0.8, 0.801, 0.95, 0.9995):
            base, (refiner, _) = (
                base_timesteps(scheduler, fraction),
                refiner_timesteps(scheduler, n, denoising_start=fraction),
            )
            assert step_range(config, n, denoising_end=fraction) == (0, len(base))
            assert step_range(config, n, denoising_start=fraction) == (len(full) - len(refiner), len(full))
            for strength in (0.0, 0.05, 0.3, 0.99, 1.0):
                late, _ = refiner_timesteps(scheduler, n, strength=strength)
                if int(n * strength) == 0:
                    late = late[:0]  # an error in diffusers' pipelines for SDXL; here no step, with PNDM too
                both = base_timesteps(scheduler, fraction, late)
                begin = len(full) - len(late)
                expected = (begin, begin + len(both))
                assert step_range(config, n, strength=strength, denoising_end=fraction) == expected
        start, end = 0.2, 0.7
        middle, _ = refiner_timesteps(scheduler, n, denoising_start=start)
        begin = len(full) - len(middle)
        expected = (begin, begin + len(base_timesteps(scheduler, end, middle)))
        assert step_range(config, n, denoising_start=start, denoising_end=end) == expected


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("n", [1, 2, 20])
def test_the_ends_of_the_schedule(name: str, n: int) -> None:
    """Where diffusers takes 0 and 1 for "not given"."""
    config = sdxl(name)
    length = len(make_schedule(config, n))
    assert step_range(config, n, denoising_end=1.0) == (0, length)
    assert step_range(config, n, denoising_end=0.0) == (0, 0)
    assert step_range(config, n, denoising_start=1.0) == (length, length)
    assert step_range(config, n, denoising_start=0.0) == (0, length)
    nothing = build_table(config, n, begin=length)
    assert (len(nothing), nothing.rows.shape, nothing.add_noise) == (0, (0, COLUMNS), (1.0, 0.0))


def test_one_step_at_08_is_the_refiners() -> None:
    assert step_range(sdxl(timestep_spacing="leading"), 1, denoising_end=0.8) == (0, 0)
    assert step_range(sdxl(timestep_spacing="leading"), 1, denoising_start=0.8) == (0, 1)


def test_a_table_of_part_of_the_steps_has_the_same_rows() -> None:
    for name in ("euler", "euler-a", "ddim", "ddpm", "lcm"):
        whole, part = build_table(sdxl(name), 12), build_table(sdxl(name), 12, begin=3, end=9)
        assert part.rows.equal(whole.rows[3:9])
        assert part.draws_noise == whole.draws_noise[3:9]


def test_rows_are_float64_and_rounded_once() -> None:
    table = build_table(sdxl("dpm++2m"), 20)
    assert str(table.rows.dtype) == "torch.float64"
    on_device = table.on(table.rows.device)
    assert str(on_device.dtype) == "torch.float32"
    assert on_device.equal(table.rows.float())
    assert table.timesteps == table.rows[:, StepRow._fields.index("timestep")].tolist()


@pytest.mark.parametrize("n", [0, -3, 1001])
@pytest.mark.parametrize("name", CLASSES)
def test_step_counts_without_a_schedule(name: str, n: int) -> None:
    with pytest.raises(RequestError, match=f"{n} steps"):
        build_table(sdxl(name), n)


def test_lcm_has_as_many_steps_as_it_was_distilled_on() -> None:
    with pytest.raises(RequestError, match=r"51 steps.*distilled on 50"):
        build_table(sdxl("lcm"), 51)


def test_steps_beyond_the_last_timestep() -> None:
    with pytest.raises(RequestError, match=r"1000 steps.*leading.*steps_offset 1.*1000.*999"):
        build_table(sdxl("ddim"), 1000)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_dpm_has_a_level_for_each_step(spacing: str) -> None:
    config = sdxl("dpm++2m", timestep_spacing=spacing, steps_offset=0)
    assert build_table(config, 999).rows.isfinite().sum() == 999 * (COLUMNS - 1)  # nothing bounds x0
    with pytest.raises(RequestError, match=rf"1000 steps.*{spacing} spacing.*up to 999"):
        build_table(config, 1000)


@pytest.mark.parametrize(("begin", "end"), [(-1, 3), (4, 3), (0, 11)])
def test_ranges_outside_the_schedule(begin: int, end: int) -> None:
    with pytest.raises(RequestError, match="the schedule has 10"):
        build_table(sdxl(), 10, begin=begin, end=end)
