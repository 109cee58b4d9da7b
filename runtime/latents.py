"""Noise, from generators to latents.

Each image has a generator of its own, so that it equals the image made alone; draws happen in diffusers'
order: the VAE's sample and the noise on it (image to image) or the initial noise (text to image), then one
draw for each step that takes noise. Numbers are drawn in float32 whatever the model's dtype, on the
generator's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from .sampler import SamplerTable

__all__ = ["NoiseSource", "initial_latents", "noised_latents"]


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise for a batch of images.

    Attributes:
        generators: one for each image; or a single one that all of them draw from, whose images then depend
            on their place in the batch.
        batch: number of images.

    Raises:
        RequestError: the numbers of generators and images differ, or the generators are on several devices.
    """

    generators: Sequence[torch.Generator] | torch.Generator
    batch: int

    def __post_init__(self) -> None:
        if isinstance(self.generators, torch.Generator):
            return
        if len(self.generators) != self.batch:
            raise RequestError(
                f"{len(self.generators)} generators for {self.batch} images; give one for each, or just one"
            )
        if len(devices := {str(g.device) for g in self.generators}) > 1:
            raise RequestError(f"generators are on {', '.join(sorted(devices))}; they must be on one device")

    def states(self) -> list[Tensor]:
        """The generators' states, for `restore`."""
        return [generator.get_state() for generator in self._each()]

    def restore(self, states: Sequence[Tensor]) -> None:
        """Have the generators draw again what they drew since `states` were taken."""
        for generator, state in zip(self._each(), states, strict=True):
            generator.set_state(state)

    def _each(self) -> Sequence[torch.Generator]:
        return [self.generators] if isinstance(self.generators, torch.Generator) else self.generators

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise of every image.

        Args:
            shape: of one image's, such as (C, h, w).

        Returns:
            float32 [batch, *shape] on the generators' device.
        """
        if isinstance(self.generators, torch.Generator):
            return _randn((self.batch, *shape), self.generators)
        return torch.cat([_randn((1, *shape), generator) for generator in self.generators])

    def draw_steps(self, table: SamplerTable, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """The noise of all steps of a table, drawn as its steps would, one after the other.

        Returns:
            float32 [N, batch, *shape] on `device`, zero for steps that draw none; None when no step does.
        """
        if not any(table.draws_noise):
            return None
        noise = torch.zeros((len(table), self.batch, *shape), dtype=torch.float32, device=device)
        for step, drawn in enumerate(table.draws_noise):
            if drawn:
                noise[step] = self.draw(shape)
        return noise


def initial_latents(noise: Tensor, table: SamplerTable) -> Tensor:
    """Noise, or latents given in its place, [B, C, h, w] -> what the schedule's first step starts from."""
    return noise * table.init_noise_sigma


def noised_latents(latents: Tensor, noise: Tensor, table: SamplerTable) -> Tensor:
    """Clean latents [B, C, h, w] -> what the table's first step starts from (image to image)."""
    keep, add = table.add_noise
    return keep * latents + add * noise


def _randn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
