"""The denoising loop in one call: over any function for a UNet, and over a `Denoiser`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from latentrt.runtime.denoise import DenoiseState, LoopKind, LoopRequest, require_channels, run_steps
from latentrt.runtime.denoiser import Denoiser
from latentrt.runtime.sampler import SamplerTable
from torch import Tensor

UNetCall = Callable[[Tensor, Tensor], Tensor]
"""(sample [R, C, h, w], timestep float32 [R]) -> output [R, C or 2C, h, w], with R = B, or 2B with guidance
(the unconditional half first)."""

OnStep = Callable[[int, float, Tensor], Tensor | None]
"""(step from 0, timestep, a copy of the latents after it) -> latents to go on with instead, or None."""


class Hooks:
    """`StepHooks` for the CPU: `should_stop` is asked before each step and `on_step` is called after it."""

    def __init__(
        self, *, on_step: OnStep | None = None, should_stop: Callable[[], bool] | None = None
    ) -> None:
        self._on_step, self._should_stop = on_step, should_stop
        self._step = 0

    def before_step(self) -> bool:
        return self._should_stop is None or not self._should_stop()

    def after_step(self, timestep: float, latents: Tensor) -> None:
        replacement = None if self._on_step is None else self._on_step(self._step, timestep, latents.clone())
        self._step += 1
        if replacement is not None:
            latents.copy_(replacement)


def denoise(
    unet: UNetCall,
    latents: Tensor,
    table: SamplerTable,
    *,
    guidance_scale: float | Tensor | None = None,
    guidance_rescale: float = 0.0,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Take every step of the table with any function for a UNet, whose sample has `dtype`.

    Returns:
        float32 [B, C, h, w].
    """
    B, C, h, w = latents.shape
    state = DenoiseState(LoopKind.of((B, C, h, w), table, guidance_scale is not None, dtype), latents.device)
    state.start(LoopRequest((B, C, h, w), table, {}, guidance_scale, guidance_rescale, noise))
    state.latents.copy_(latents)

    def predict() -> None:
        out = unet(state.sample, state.timestep)
        require_channels(out.shape[1], C, table)
        state.prediction.copy_(out)

    hooks = Hooks(on_step=on_step, should_stop=should_stop)
    run_steps(state.latents, lambda: state.step(predict), table, hooks)
    return state.latents


def run_loop(
    denoiser: Denoiser,
    latents: Tensor,
    table: SamplerTable,
    constants: Mapping[str, Tensor],
    *,
    guidance_scale: float | Tensor | None = None,
    guidance_rescale: float = 0.0,
    noise: Tensor | None = None,
    **hooks: Any,
) -> Tensor:
    """The latents after a denoiser's loop; the arguments are a `LoopRequest`'s, and `hooks` those of `Hooks`."""
    B, C, h, w = latents.shape
    request = LoopRequest((B, C, h, w), table, constants, guidance_scale, guidance_rescale, noise)
    return denoiser.run(request, latents, Hooks(**hooks))
