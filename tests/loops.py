"""The denoising loop in one call: over any function for a UNet, and over a `Denoiser`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from latentrt.runtime.denoise import DenoiseState, Host, LoopKind, OnStep, require_channels, walk
from latentrt.runtime.denoiser import Denoiser, LoopRequest
from latentrt.runtime.sampler import SamplerTable
from latentrt.runtime.streams import Pace, queue_of
from torch import Tensor

UNetCall = Callable[[Tensor, Tensor], Tensor]
"""(sample [R, C, h, w], timestep float32 [R]) -> output [R, C or 2C, h, w], with R = B, or 2B with guidance
(the unconditional half first)."""


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
    state.start(table, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, noise=noise)
    state.latents.copy_(latents)

    def predict() -> None:
        out = unet(state.sample, state.timestep)
        require_channels(out.shape[1], C, table)
        state.prediction.copy_(out)

    host = Host(Pace(queue_of(latents.device)), should_stop=should_stop, on_step=on_step)
    walk(state.latents, lambda: state.step(predict), table, host)
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
    """Take up a request, as `LoopRequest` has it, and run it; `hooks` are `Host`'s."""
    B, C, h, w = latents.shape
    asked = LoopRequest((B, C, h, w), table, constants, guidance_scale, guidance_rescale, noise)
    with denoiser.ready(asked) as once:
        return once(latents, Host(Pace(queue_of(latents.device)), **hooks))
