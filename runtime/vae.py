"""Latents become pixels, and pixels latents.

Images pass one at a time: peak memory does not grow with the batch, and an image cannot depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .engines.lazy import LazyEngine

__all__ = ["VAE"]


@dataclass(frozen=True)
class VAE:
    """Both halves of the autoencoder.

    Attributes:
        decoder: latents `[1, C, h, w]` -> image `[1, 3, 8h, 8w]` in [-1, 1].
        encoder: image -> moments `[1, 2C, h, w]`, mean and log-variance.
        dtype: the engines' dtype; a wider one for a float16 model whose VAE overflows (`force_upcast`).
        scaling_factor: latents of unit variance are the VAE's own times this.
        channels: C, 4.
        scale: pixels per latent along a side, 8.
    """

    decoder: LazyEngine
    encoder: LazyEngine
    dtype: torch.dtype
    scaling_factor: float
    channels: int
    scale: int

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` of unit variance -> images `[B, 3, H, W]` float32 in [0, 1]."""
        images = []
        for row in latents.split(1):
            image = self.decoder({"latents": (row / self.scaling_factor).to(self.dtype)})["image"]
            images.append((image.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    def encode(self, images: Tensor, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Sample latents of images.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].
            draw: standard normal noise `[B, *shape]` for the shape of one image's latents.

        Returns:
            float32 latents `[B, C, H/8, W/8]` of unit variance.
        """
        rows = [self.encoder({"image": row.to(self.dtype)})["moments"].float() for row in images.split(1)]
        mean, log_variance = torch.cat(rows).chunk(2, dim=1)
        deviation = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
        return (mean + deviation * draw(tuple(mean.shape[1:])).to(mean)) * self.scaling_factor
