"""diffusers' schedulers driven as its pipelines drive them, beside the same run from a coefficient table.

The model is a fixed smooth function of latents and timestep: nonlinear, so that an error in one step changes all
later ones, and with slopes near 1, so that it does not grow without bound.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from latentrt.runtime.latents import NoiseSource, initial_latents, noised_latents
from latentrt.runtime.sampler import SamplerConfig, build_table, step_range
from torch import Tensor

from helpers.loops import denoise

Fields = dict[str, Any]
Model = Callable[[Tensor, Tensor], Tensor]

SDXL: Fields = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

# Class and what makes it the sampler of that name; clipping to pixels' range is for pixels.
CLASSES: dict[str, tuple[str, Fields]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "lcm": ("LCMScheduler", {}),
}


def make_scheduler(name: str, **fields: Any) -> Any:
    cls, own = CLASSES[name]
    return getattr(diffusers, cls)(**{**SDXL, **own, **fields})


def config_of(scheduler: Any, **fields: Any) -> SamplerConfig:
    """Our reading of its config, with some fields changed."""
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    return SamplerConfig.from_dict({**config, **fields, "_class_name": type(scheduler).__name__})


def start_at(scheduler: Any, num_steps: int) -> None:
    """set_timesteps, as a text-to-image pipeline does, and where to begin, as it should.

    Where the first timestep comes twice (Karras at zero terminal SNR) diffusers begins at the second, and runs
    out of noise levels at the end, unless told.
    """
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def model(x: Tensor, t: Tensor) -> Tensor:
    """x [B, C, h, w], t [B] -> [B, C, h, w]"""
    return 0.8 * x / (1 + 0.1 * x.abs()) + 0.3 * torch.sin(2 * x + t.reshape(-1, 1, 1, 1) / 150)


def noise_like(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(count: int, seed: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def diffusers_steps(
    scheduler: Any,
    x: Tensor,
    timesteps: Tensor,
    source: Sequence[torch.Generator],
    *,
    unet: Model = model,
    eta: float = 0.0,
) -> Tensor:
    """The inner loop of diffusers' pipelines."""
    accepted = inspect.signature(scheduler.step).parameters
    extra = {k: v for k, v in {"eta": eta, "generator": list(source)}.items() if k in accepted}
    for t in timesteps:
        out = unet(scheduler.scale_model_input(x, t), t.float().expand(len(x)))
        x = scheduler.step(out, t, x, **extra, return_dict=False)[0]
    return x


def table_steps(
    config: SamplerConfig,
    num_steps: int,
    x: Tensor,
    source: Sequence[torch.Generator],
    *,
    unet: Model = model,
    begin: int = 0,
    end: int | None = None,
    eta: float = 0.0,
) -> Tensor:
    """The same from a table; x is at the level of step `begin`."""
    table = build_table(config, num_steps, begin=begin, end=end, eta=eta)
    noise = NoiseSource(source, len(x)).draw_steps(table, x.shape[1:], x.device)
    return denoise(unet, x, table, noise=noise)


def text_to_image(scheduler: Any, num_steps: int, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A whole trajectory from standard normal noise x: ours, diffusers'."""
    config = config_of(scheduler)
    start_at(scheduler, num_steps)
    theirs = diffusers_steps(
        scheduler, x * scheduler.init_noise_sigma, scheduler.timesteps, generators(len(x)), **kwargs
    )
    start = initial_latents(x, build_table(config, num_steps))
    return table_steps(config, num_steps, start, generators(len(x)), **kwargs), theirs


def image_to_image(
    scheduler: Any, num_steps: int, strength: float, clean: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """From clean latents and noise: ours, diffusers'."""
    config = config_of(scheduler)
    scheduler.set_timesteps(num_steps)
    timesteps, _ = refiner_timesteps(scheduler, num_steps, strength=strength)
    x = scheduler.add_noise(clean, noise, timesteps[:1].repeat(len(clean)))
    theirs = diffusers_steps(scheduler, x, timesteps, generators(len(x)))
    begin, end = step_range(config, num_steps, strength=strength)
    start = noised_latents(clean, noise, build_table(config, num_steps, begin=begin, end=end))
    return table_steps(config, num_steps, start, generators(len(x)), begin=begin, end=end), theirs


def base_timesteps(scheduler: Any, denoising_end: float, timesteps: Tensor | None = None) -> Tensor:
    """What `denoising_end` leaves, for 0 < denoising_end < 1, as StableDiffusionXLPipeline.__call__ cuts."""
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    trained = scheduler.config.num_train_timesteps
    cutoff = round(trained - denoising_end * trained)
    return timesteps[: sum(1 for t in timesteps if t >= cutoff)]


def refiner_timesteps(
    scheduler: Any, num_steps: int, *, strength: float = 0.3, denoising_start: float | None = None
) -> tuple[Tensor, int]:
    """diffusers' own cut; it also tells the scheduler where it begins."""
    pipeline: Any = SimpleNamespace(scheduler=scheduler)
    result: tuple[Tensor, int] = StableDiffusionXLImg2ImgPipeline.get_timesteps(
        pipeline, num_steps, strength, "cpu", denoising_start=denoising_start
    )
    return result
