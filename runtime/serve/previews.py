"""Small pictures of latents, at a pixel for each: what can be shown while an image is made.

The VAE is nearly local, and colour nearly linear in its latents, so a matrix of [C + 1, 3] stands for it. It is fitted
by least squares to the VAE itself, on blocks of random colour; no table of any one model's factors is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from ..vae import VAE

__all__ = ["Previewer"]

_BLOCK = 8
_COLOURS = 32


@dataclass(frozen=True)
class Previewer:
    """Latents to pictures.

    Attributes:
        weights: [C + 1, 3] on the device, the last row a constant.
    """

    weights: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: VAE, height: int, width: int, device: torch.device) -> Previewer:
        """Decode random pictures of `height` x `width` pixels, one where they are large, and fit to them."""
        h, w = height // vae.scale, width // vae.scale
        down, across = -(-h // _BLOCK), -(-w // _BLOCK)
        shape = (-(-_COLOURS // (down * across)), vae.channels, down, across)
        blocks = 0.7 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        latents = F.interpolate(blocks, scale_factor=_BLOCK)[..., :h, :w]
        pixels = F.avg_pool2d(vae.decode(latents.to(device)).cpu(), vae.scale)
        rows = latents.movedim(1, 3).flatten(0, 2).double()
        wanted = pixels.movedim(1, 3).flatten(0, 2).double()
        weights = torch.linalg.lstsq(_with_one(rows), wanted).solution
        return cls(weights.to(device, torch.float32))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> PIL.Image.Image:
        """One image's latents [C, h, w] of any noise level -> RGB of w x h pixels.

        The sampler's x grows with its noise; brought to unit variance it looks the same with every sampler.
        """
        rows = latents.float().flatten(1).T
        rgb = _with_one(rows / rows.std().clamp(min=1.0)) @ self.weights
        pixels = (rgb.clamp(0, 1).nan_to_num() * 255).round().to(torch.uint8).cpu().numpy()
        return PIL.Image.fromarray(np.ascontiguousarray(pixels.reshape(*latents.shape[1:], 3)))


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
