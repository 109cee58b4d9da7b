"""The timesteps at which a sampler calls the model, and their noise levels.

Noise levels are those of training: float32, rounded where diffusers rounds them, since the models saw these numbers and
no others. All that follows from them is float64.

Sources: betas: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), section 4, and Nichol and
Dhariwal, "Improved DDPM" (2021), equation 17; zero terminal SNR and spacings: Lin et al. (2023), algorithm 1
and table 2; Karras sigmas: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models"
(2022), equation 5; LCM's steps: Luo et al., "Latent Consistency Models" (2023), section 4.3. Roundings and
offsets are diffusers'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RequestError, UnsupportedConfigError
from .place import CPU_FLOAT32
from .sampler_config import SamplerConfig

__all__ = ["Schedule", "make_schedule", "step_range"]

Array = NDArray[np.float64]

_NEARLY_ZERO = 2.0**-24
"""alpha_bar at the last timestep for samplers that divide by it, at zero terminal SNR, as in diffusers."""
_KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Schedule:
    """The steps of one request.

    Attributes:
        timesteps: [N], descending; PNDM's second one comes twice.
        sigmas: [N + 1], noise over signal, before each step and after the last one. Empty for samplers that take
            noise levels from alphas_cumprod, by timestep.
        alphas_cumprod: [T], alpha_bar: the share of the signal's variance left at each timestep of training.
        num_steps: what was asked for; N differs from it for PNDM.
    """

    timesteps: Array
    sigmas: Array
    alphas_cumprod: Array
    num_steps: int

    def __len__(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=256)
def make_schedule(config: SamplerConfig, num_steps: int) -> Schedule:
    """The timesteps and noise levels of a request for `num_steps`; cached, so the arrays are read-only.

    Raises:
        RequestError: the sampler has no schedule of that many steps.
        UnsupportedConfigError: the scheduler's fields leave no noise, no signal or no step.
    """
    T = config.num_train_timesteps
    if num_steps < 1 or num_steps > T:
        raise RequestError(f"{num_steps} steps were asked for; this schedule has 1 to {T}")
    alpha_bar = _alphas_cumprod(config)
    alphas_cumprod: Array = alpha_bar.double().numpy()
    training_sigmas: Array = ((1 - alpha_bar) / alpha_bar).sqrt().double().numpy()  # [T], ascending
    sigmas = np.empty(0)
    if config.kind == "lcm":
        timesteps = _lcm_timesteps(config, num_steps)
    elif config.kind == "dpm++2m":
        timesteps, sigmas = _dpm_steps(config, num_steps, training_sigmas)
    elif config.kind in ("euler", "euler-a"):
        timesteps, sigmas = _euler_steps(config, num_steps, training_sigmas)
    else:
        timesteps = _spaced(config, num_steps).round()
        if config.kind == "pndm":
            timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    # Interpolation stops at the last timestep's noise level; a lookup by timestep cannot, nor a ratio of two levels.
    if config.kind not in ("euler", "euler-a") and timesteps.max() >= T:
        raise RequestError(
            f"{num_steps} steps, {config.timestep_spacing} spacing, steps_offset {config.steps_offset}: the "
            f"first timestep is {int(timesteps.max())}, beyond the last one, {T - 1}; ask for fewer"
        )
    for array in (timesteps, sigmas, alphas_cumprod):
        array.flags.writeable = False
    return Schedule(timesteps, sigmas, alphas_cumprod, num_steps)


def step_range(
    config: SamplerConfig,
    num_steps: int,
    *,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    strength: float | None = None,
) -> tuple[int, int]:
    """Which steps of the schedule to take, cut where diffusers cuts.

    A fraction f of the schedule, in [0, 1], ends at the timestep T - f T. Unlike in diffusers, 0 and 1 mean what they
    say: `denoising_start=1` takes no step (there: img2img at strength 0.3), `denoising_end=0` none either
    (there: all).

    Args:
        denoising_start: the latents are the result of this fraction of the schedule.
        denoising_end: stop after this fraction, which is above `denoising_start`.
        strength: image to image: take the last steps, this share of them. Ignored with `denoising_start`. Less than
            one step is none (in diffusers' SDXL an error, in its SD 1.x one step with PNDM).

    Returns:
        (begin, end), indices of steps; equal when there is nothing to do.

    Raises:
        RequestError: the sampler has no schedule of that many steps.
    """
    schedule = make_schedule(config, num_steps)
    timesteps, T = schedule.timesteps, config.num_train_timesteps
    begin, end = 0, len(schedule)
    if denoising_start is not None:
        if denoising_start == 1:
            begin = end
        elif denoising_start > 0:
            begin = end - int((timesteps < _timestep_at(denoising_start, T)).sum())
    elif strength is not None:
        taken = min(int(num_steps * strength), num_steps)
        begin = min(num_steps - taken, end) if taken else end  # PNDM has a timestep more than steps
    if denoising_end is not None and denoising_end < 1:
        kept = 0 if denoising_end == 0 else int((timesteps[begin:] >= _timestep_at(denoising_end, T)).sum())
        end = begin + kept
    return begin, end


def _timestep_at(fraction: float, T: int) -> int:
    """The timestep at which this fraction of the schedule ends."""
    return round(T - fraction * T)


def _alphas_cumprod(config: SamplerConfig) -> Tensor:
    T = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, **CPU_FLOAT32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, T, **CPU_FLOAT32)
    elif config.beta_schedule == "scaled_linear":
        root = torch.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), T, **CPU_FLOAT32)
        betas = root.square()
    else:  # squaredcos_cap_v2
        bar = np.square(np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2))
        betas = torch.tensor(np.minimum(1 - bar[1:] / bar[:-1], 0.999), **CPU_FLOAT32)
    if config.rescale_betas_zero_snr:
        root = (1 - betas).cumprod(0).sqrt()
        rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
        betas = 1 - torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
    alphas_cumprod = (1 - betas).cumprod(0)
    # Those that read no signal at the last timestep, where some files' own betas leave none.
    reads_none = config.kind in ("ddim", "ddpm", "lcm") and config.prediction_type != "epsilon"
    noisy = alphas_cumprod[:-1] if config.rescale_betas_zero_snr or reads_none else alphas_cumprod
    if not len(noisy) or not ((noisy > 0) & (noisy < 1)).all():
        betas_of = (
            "trained_betas"
            if config.trained_betas
            else f"beta_start {config.beta_start}, beta_end {config.beta_end}"
        )
        raise UnsupportedConfigError(
            f"scheduler {betas_of}, num_train_timesteps {T}: a timestep has no noise or no signal, and no sampler can "
            "compute a step there; give betas above 0 and below 1 whose signal lasts, or "
            "rescale_betas_zero_snr, which makes it end at the last timestep"
        )
    if config.rescale_betas_zero_snr and config.kind in ("euler", "euler-a", "dpm++2m"):
        alphas_cumprod[-1] = _NEARLY_ZERO
    return alphas_cumprod


def _spaced(config: SamplerConfig, num_steps: int) -> Array:
    """Descending timesteps [num_steps]; fractions are left in for linspace."""
    T = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        return np.linspace(0.0, T - 1, num_steps)[::-1]
    if config.timestep_spacing == "leading":
        return np.arange(num_steps)[::-1].astype(np.float64) * (T // num_steps) + config.steps_offset
    return _trailing(T, T / num_steps, num_steps)


def _trailing(last: int, stride: float, num_steps: int) -> Array:
    # With a fractional stride, arange's own rounding decides how halves fall, as in diffusers, and whether
    # there is one too many (diffusers then goes on to a timestep of -1).
    timesteps: Array = np.arange(last, 0, -stride)[:num_steps].round() - 1
    return timesteps


def _euler_steps(config: SamplerConfig, num_steps: int, training_sigmas: Array) -> tuple[Array, Array]:
    timesteps = _spaced(config, num_steps)
    if config.timestep_spacing == "linspace":
        timesteps = timesteps.astype(np.float32).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(len(training_sigmas)), training_sigmas)
    if config.use_karras_sigmas:
        low = sigmas[-1] if config.sigma_min is None else config.sigma_min
        high = sigmas[0] if config.sigma_max is None else config.sigma_max
        sigmas = _karras(low, high, num_steps)
        timesteps = _nearest_timesteps(sigmas, training_sigmas)
    return timesteps, np.append(sigmas, _last_sigma(config, training_sigmas))


def _dpm_steps(config: SamplerConfig, num_steps: int, training_sigmas: Array) -> tuple[Array, Array]:
    # log(alpha_t / sigma_t) falls with t; steps below the configured bound are left out.
    usable = int((-np.log(training_sigmas) >= config.lambda_min_clipped).sum())
    if config.use_karras_sigmas:
        sigmas = _karras(training_sigmas[0], training_sigmas[-1], num_steps)
        timesteps = _nearest_timesteps(sigmas, training_sigmas)
        if config.beta_schedule == "squaredcos_cap_v2":
            timesteps = np.floor(timesteps)
        return timesteps.round(), np.append(sigmas, _last_sigma(config, training_sigmas))
    if not usable:
        raise UnsupportedConfigError(
            f"scheduler field lambda_min_clipped is {config.lambda_min_clipped}: no step is left; lower it"
        )
    if config.timestep_spacing != "trailing" and num_steps >= usable:
        raise RequestError(
            f"{num_steps} steps were asked for; with {config.timestep_spacing} spacing this sampler has up to "
            f"{usable - 1}"
        )
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, usable - 1, num_steps + 1).round()[:0:-1]
    elif config.timestep_spacing == "leading":
        ratio = usable // (num_steps + 1)
        timesteps = np.arange(num_steps, 0, -1).astype(np.float64) * ratio + config.steps_offset
    else:
        timesteps = _trailing(usable, config.num_train_timesteps / num_steps, num_steps)
    sigmas = np.interp(timesteps, np.arange(len(training_sigmas)), training_sigmas)
    return timesteps, np.append(sigmas, _last_sigma(config, training_sigmas))


def _lcm_timesteps(config: SamplerConfig, num_steps: int) -> Array:
    """Evenly spaced picks from the timesteps that the model was distilled on."""
    original = config.original_inference_steps
    if num_steps > original:
        raise RequestError(
            f"{num_steps} steps were asked for; this LCM was distilled on {original}, take at most that"
        )
    distilled = (np.arange(1, original + 1) * (config.num_train_timesteps // original) - 1)[::-1]
    picks = np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(np.int64)
    return distilled[picks].astype(np.float64)


def _karras(low: float, high: float, num_steps: int) -> Array:
    ramp = np.linspace(0, 1, num_steps)
    ends = high ** (1 / _KARRAS_RHO), low ** (1 / _KARRAS_RHO)
    sigmas: Array = np.power(ends[0] + ramp * (ends[1] - ends[0]), _KARRAS_RHO)
    return sigmas


def _nearest_timesteps(sigmas: Array, training_sigmas: Array) -> Array:
    """Timesteps of these sigmas, interpolated in log sigma and kept within the trained ones."""
    # Where the result is cut to a whole number, the float32 logarithm decides between 998 and 999.
    return np.interp(
        np.log(sigmas), np.log(training_sigmas.astype(np.float32)), np.arange(len(training_sigmas))
    )


def _last_sigma(config: SamplerConfig, training_sigmas: Array) -> float:
    return float(training_sigmas[0]) if config.final_sigmas_type == "sigma_min" else 0.0
