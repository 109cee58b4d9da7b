"""The loop: latents in, denoised latents out.

It knows nothing of prompts, of which UNet it runs, or of the one that runs before or after it. All tensors of
a step are allocated once, and which step it is, is a tensor too: `DenoiseState.step` computes the next
latents from the state alone, reads nothing back to the host, and can be recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import KernelArgumentError
from ..kernels.sampler_step import HISTORY, sampler_step, step_row
from .sampler import SamplerTable

__all__ = ["DenoiseState", "OnStep", "UNetCall", "denoise"]

UNetCall = Callable[[Tensor, Tensor], Tensor]
"""(sample [R, C, h, w], timestep float32 [R]) -> output [R, C or 2C, h, w], with R = B, or 2B with guidance
(the unconditional half first)."""

OnStep = Callable[[int, float, Tensor], Tensor | None]
"""(step from 0, timestep, a copy of the latents after it) -> latents to go on with instead, or None."""


class DenoiseState:
    """The static tensors of one run.

    Attributes:
        latents: float32 [B, C, h, w], the sampler's x.
        sample, timestep: what the UNet gets: [R, C, h, w] in the model's dtype, float32 [R].
        step_index: int64 [1], the row of the table to take next.
    """

    def __init__(
        self,
        latents: Tensor,
        table: SamplerTable,
        *,
        guidance_scale: float | Tensor | None = None,
        guidance_rescale: float = 0.0,
        noise: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Arguments are those of `denoise`."""
        if any(table.draws_noise) and noise is None:
            raise KernelArgumentError(
                f"noise is None; this sampler draws it on {sum(table.draws_noise)} of {len(table)} steps: "
                "pass what NoiseSource.draw_steps gives"
            )
        B, C, h, w = latents.shape
        rows = B if guidance_scale is None else 2 * B
        device = latents.device
        self.latents = latents.to(torch.float32, copy=True).contiguous()
        self.sample = torch.empty((rows, C, h, w), dtype=dtype, device=device)
        self.timestep = torch.empty(rows, dtype=torch.float32, device=device)
        self.step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self._history = self.latents.new_zeros((HISTORY, B, C, h, w)) if table.uses_history else None
        self._noise = noise if any(table.draws_noise) else None
        self._rows = table.on(device)
        self._channels = 2 * C if table.predicts_variance else C
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale

    def step(self, unet: UNetCall) -> None:
        """Take one step: scale the latents, call the UNet, update latents, history and index."""
        row = step_row(self._rows, self.step_index)
        scaled = self.latents * row.input_scale
        self.sample.copy_(scaled.repeat(len(self.sample) // len(scaled), 1, 1, 1))
        self.timestep.copy_(row.timestep.expand_as(self.timestep))
        out = unet(self.sample, self.timestep)
        if out.shape[1] != self._channels:
            raise KernelArgumentError(
                f"the UNet returned {out.shape[1]} channels where the sampler needs {self._channels}: "
                "variance_type of the scheduler and out_channels of the UNet do not belong together"
            )
        sampler_step(
            self.latents,
            out,
            self._history,
            self._noise,
            self._rows,
            self.step_index,
            self._guidance_scale,
            self._guidance_rescale,
        )
        self.step_index += 1


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
    """Take every step of the table.

    Args:
        unet: the model; it is called once for each step, and must not keep its arguments.
        latents: [B, C, h, w] at the noise level of the table's first step; left as they are.
        guidance_scale: a number or float32 [B]; None runs the model without its unconditional half.
        guidance_rescale: see `sampler_step`.
        noise: from `NoiseSource.draw_steps`, on the latents' device.
        dtype: of the sample given to the model. The latents stay float32.
        on_step: called after each step.
        should_stop: asked before each step; true ends the loop with the latents as they are.

    Returns:
        float32 [B, C, h, w].

    Raises:
        KernelArgumentError: shapes that do not belong together.
    """
    state = DenoiseState(
        latents,
        table,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        noise=noise,
        dtype=dtype,
    )
    for index, timestep in enumerate(table.timesteps):
        if should_stop is not None and should_stop():
            break
        state.step(unet)
        if on_step is not None:
            replaced = on_step(index, timestep, state.latents.clone())
            if replaced is not None:
                state.latents.copy_(replaced)
    return state.latents
