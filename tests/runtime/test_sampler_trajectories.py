"""`runtime/sampler.py`: coefficient tables against diffusers' schedulers over whole trajectories, both in float32."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.sampler_oracle import (
    CLASSES,
    Fields,
    base_timesteps,
    config_of,
    diffusers_steps,
    generators,
    image_to_image,
    make_scheduler,
    model,
    noise_like,
    refiner_timesteps,
    table_steps,
    text_to_image,
)
from latentrt.runtime.sampler import build_table, step_range
from tolerances import SAMPLER_TRAJECTORY, SAMPLER_ZERO_SNR_EULER, relative_error
from torch import Tensor

STEPS = (1, 2, 5, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
X = noise_like(2, 4, 8, 8)
CASES = [
    (name, prediction, spacing)
    for name in CLASSES
    for prediction in PREDICTIONS
    # LCM and Karras have steps of their own.
    for spacing in (SPACINGS[:1] if name in ("lcm", "dpm++2m-karras") else SPACINGS)
    # diffusers' ancestral Euler and PNDM do not know sample prediction.
    if not (prediction == "sample" and name in ("euler-a", "pndm"))
]


def worst(name: str, steps: tuple[int, ...] = STEPS, eta: float = 0.0, **fields: Any) -> float:
    errors = {n: relative_error(*text_to_image(make_scheduler(name, **fields), n, X, eta=eta)) for n in steps}
    print(name, *(str(v)[:20] for v in fields.values()), " ".join(f"{n}: {e:.1e}" for n, e in errors.items()))
    return max(errors.values())


@pytest.mark.parametrize(("name", "prediction", "spacing"), CASES)
def test_every_sampler_prediction_and_spacing(name: str, prediction: str, spacing: str) -> None:
    assert worst(name, prediction_type=prediction, timestep_spacing=spacing) < SAMPLER_TRAJECTORY


@pytest.mark.parametrize(
    ("name", "prediction", "spacing"), [c for c in CASES if c[1] != "epsilon" and c[0] != "pndm"]
)
def test_zero_terminal_snr(name: str, prediction: str, spacing: str) -> None:
    fields = {"prediction_type": prediction, "timestep_spacing": spacing, "rescale_betas_zero_snr": True}
    limit = SAMPLER_ZERO_SNR_EULER if name in ("euler", "euler-a") else SAMPLER_TRAJECTORY
    assert worst(name, **fields) < limit


VARIANTS: dict[str, tuple[str, Fields]] = {
    "linear betas": ("euler", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    "betas of its own": ("ddim", {"trained_betas": torch.linspace(0.001, 0.013, 1000).tolist()}),
    "fewer trained steps": ("dpm++2m", {"num_train_timesteps": 600}),
    "euler with Karras": ("euler", {"use_karras_sigmas": True}),
    "euler with Karras, bounded": ("euler", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
    "euler to sigma_min": ("euler", {"final_sigmas_type": "sigma_min"}),
    "ddim to the first alpha": ("ddim", {"set_alpha_to_one": False}),
    "ddim clipped": ("ddim", {"clip_sample": True, "clip_sample_range": 0.8}),
    "ddim v clipped": ("ddim", {"clip_sample": True, "prediction_type": "v_prediction"}),
    "ddpm large variance": ("ddpm", {"variance_type": "fixed_large"}),
    "ddpm small variance by its logarithm": ("ddpm", {"variance_type": "fixed_small_log"}),
    "ddpm clipped, cosine": ("ddpm", {"clip_sample": True, "beta_schedule": "squaredcos_cap_v2"}),
    "ddpm v, cosine": ("ddpm", {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
    "pndm to alpha one": ("pndm", {"set_alpha_to_one": True}),
    "dpm without care": ("dpm++2m", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    "dpm to sigma_min": ("dpm++2m", {"final_sigmas_type": "sigma_min"}),
    "dpm euler at final": ("dpm++2m", {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    "dpm Karras to sigma_min": ("dpm++2m-karras", {"final_sigmas_type": "sigma_min"}),
    "dpm cosine, clipped lambda": (
        "dpm++2m",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "lambda_min_clipped": -5.1,
            "prediction_type": "v_prediction",
        },
    ),
    "dpm cosine, clipped lambda, trailing": (
        "dpm++2m",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "lambda_min_clipped": -5.1,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ),
    "dpm cosine, Karras": (
        "dpm++2m-karras",
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ),
    "lcm of 100 steps": ("lcm", {"original_inference_steps": 100, "timestep_scaling": 3.0}),
    "lcm clipped": ("lcm", {"clip_sample": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options(variant: str) -> None:
    name, fields = VARIANTS[variant]
    assert worst(name, **fields) < SAMPLER_TRAJECTORY


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_noise(eta: float, clip: bool) -> None:
    assert worst("ddim", eta=eta, clip_sample=clip) < SAMPLER_TRAJECTORY


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_ddpm_with_learned_variance(schedule: str) -> None:
    fields = {"variance_type": "learned_range", "clip_sample": True, "beta_schedule": schedule}

    def unet(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(x, t), torch.sin(x + 1)], dim=1)

    for n in STEPS:
        ours, theirs = text_to_image(make_scheduler("ddpm", **fields), n, X, unet=unet)
        assert relative_error(ours, theirs) < SAMPLER_TRAJECTORY


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_euler_with_sample_prediction(spacing: str) -> None:
    """diffusers refuses it: the same must come of a model that predicts the noise belonging to the same x0."""
    for n in STEPS:
        by_noise = make_scheduler("euler-a", timestep_spacing=spacing)
        by_noise.set_timesteps(n)
        sigmas = iter(by_noise.sigmas.tolist())

        def unet(x: Tensor, t: Tensor, sigmas: Iterator[float] = sigmas) -> Tensor:
            sigma = next(sigmas)
            return (x * (1 + sigma**2) ** 0.5 - model(x, t)) / sigma

        start = X * by_noise.init_noise_sigma
        theirs = diffusers_steps(by_noise, start, by_noise.timesteps, generators(2), unet=unet)
        config = config_of(make_scheduler("euler-a", timestep_spacing=spacing), prediction_type="sample")
        assert relative_error(table_steps(config, n, start, generators(2)), theirs) < SAMPLER_TRAJECTORY


@pytest.mark.parametrize("split", [0.5, 0.8])
@pytest.mark.parametrize("name", CLASSES)
def test_base_hands_over_to_refiner(name: str, split: float) -> None:
    spacings = {"euler": "trailing", "dpm++2m": "linspace"}
    fields = {"timestep_spacing": spacings.get(name, "leading")}
    config = config_of(make_scheduler(name, **fields))
    for n in STEPS:
        base, refiner = make_scheduler(name, **fields), make_scheduler(name, **fields)
        source = generators(2)
        base.set_timesteps(n)
        theirs = diffusers_steps(base, X * base.init_noise_sigma, base_timesteps(base, split), source)
        refiner.set_timesteps(n)
        timesteps, _ = refiner_timesteps(refiner, n, denoising_start=split)
        theirs = diffusers_steps(refiner, theirs, timesteps, source)

        source = generators(2)
        start = X * build_table(config, n).init_noise_sigma
        _, end = step_range(config, n, denoising_end=split)
        begin, last = step_range(config, n, denoising_start=split)
        ours = table_steps(config, n, start, source, end=end)
        ours = table_steps(config, n, ours, source, begin=begin, end=last)
        assert relative_error(ours, theirs) < SAMPLER_TRAJECTORY, n


@pytest.mark.parametrize("strength", [0.3, 0.55, 0.98, 1.0])
@pytest.mark.parametrize("name", CLASSES)
def test_image_to_image(name: str, strength: float) -> None:
    for n in (5, 20, 50):
        scheduler = make_scheduler(name)
        ours, theirs = image_to_image(scheduler, n, strength, noise_like(2, 4, 8, 8, seed=1), X)
        assert relative_error(ours, theirs) < SAMPLER_TRAJECTORY, n


@pytest.mark.parametrize("name", ["euler", "euler-a", "ddim", "ddpm", "pndm", "dpm++2m"])
def test_a_wrong_steps_offset_is_seen(name: str) -> None:
    run = functools.partial(text_to_image, num_steps=20, x=X)
    right, _ = run(make_scheduler(name, timestep_spacing="leading"))
    wrong, _ = run(make_scheduler(name, timestep_spacing="leading", steps_offset=2))
    assert relative_error(wrong, right) > 20 * SAMPLER_TRAJECTORY
