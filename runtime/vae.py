"""Latents become pixels, and pixels latents.

Images pass one at a time: peak memory does not grow with the batch, and an image cannot depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from .engines.lazy import LazyEngine
from .place import CPU_FLOAT32

__all__ = ["VAE", "Tiles"]


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

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Latents `[B, C, h, w]` of unit variance -> images `[B, 3, H, W]` float32 in [0, 1], on the decoder's device.

        Args:
            tile: decode squares of this many latents a side, and blend them where they overlap, by a quarter or more.
                The memory the decoder takes is then that of a tile, whatever the image's size. It is not quite the
                same image: the decoder's group norms and its attention see a tile alone, so that tones can differ
                a little from tile to tile. If one tile covers the image, the result is the same to the bit.

        Raises:
            RequestError: a tile of less than 8 latents.
        """
        if tile is not None and tile < 8:
            raise RequestError(f"tile is {tile} latents; a VAE's tile has at least 8 along a side")
        return torch.cat([self._decode(row, tile) for row in latents.split(1)])

    def is_tiled(self, height: int, width: int, tile: int | None) -> bool:
        """Whether `decode` takes several tiles of this many latents for an image of `height` x `width` pixels."""
        return tile is not None and tile * self.scale < max(height, width)

    def _decode(self, latents: Tensor, tile: int | None) -> Tensor:
        *_, h, w = latents.shape
        down, across = Tiles.of(h, tile, self.scale), Tiles.of(w, tile, self.scale)
        if len(down.starts) == len(across.starts) == 1:
            return self._pixels(latents)
        shape = (1, 3, h * self.scale, w * self.scale)
        image = torch.zeros(shape, dtype=torch.float32, device=self.decoder.device)
        for top, rows in zip(down.starts, down.weights, strict=True):
            for left, columns in zip(across.starts, across.weights, strict=True):
                part = self._pixels(latents[..., top : top + down.size, left : left + across.size])
                y, x = top * self.scale, left * self.scale
                weight = torch.outer(rows, columns).to(part.device)
                image[..., y : y + part.shape[-2], x : x + part.shape[-1]] += part * weight
        return image

    def _pixels(self, latents: Tensor) -> Tensor:
        image = self.decoder({"latents": (latents / self.scaling_factor).to(self.dtype)})["image"]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def capture_decode(self, height: int, width: int, *, tile: int | None = None) -> None:
        """Capture `decode` for images of `height` x `width` pixels, if graphs are on."""
        if self.decoder.graphs is not None:
            size = [Tiles.of(side // self.scale, tile, self.scale).size for side in (height, width)]
            blank = torch.zeros(1, self.channels, *size, dtype=self.dtype, device=self.decoder.device)
            self.decoder.capture({"latents": blank})

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


@dataclass(frozen=True)
class Tiles:
    """One side of an image in overlapping parts of equal size.

    Attributes:
        size: latents of a part.
        starts: the first latent of each.
        weights: of each part's pixels, `[scale * size]`, ramps where it overlaps others; over all parts they sum to 1.
    """

    size: int
    starts: list[int]
    weights: list[Tensor]

    @classmethod
    def of(cls, length: int, size: int | None, scale: int) -> Tiles:
        """Parts of at most `size` latents of a side of `length`; one where `size` is None."""
        if size is None or size >= length:
            return cls(length, [0], [torch.ones(length * scale, **CPU_FLOAT32)])
        overlap = size // 4
        count = -(-(length - overlap) // (size - overlap))
        starts = [round(k * (length - size) / (count - 1)) for k in range(count)]
        to_edge = torch.arange(1, size * scale + 1, **CPU_FLOAT32)
        total = torch.zeros(length * scale, **CPU_FLOAT32)
        weights = []
        for start in starts:
            weight = torch.full((size * scale,), float(overlap * scale), **CPU_FLOAT32)
            if start > 0:
                weight = torch.minimum(weight, to_edge)
            if start + size < length:
                weight = torch.minimum(weight, to_edge.flip(0))
            total[start * scale : (start + size) * scale] += weight
            weights.append(weight)
        pairs = zip(starts, weights, strict=True)
        return cls(size, starts, [w / total[a * scale : (a + size) * scale] for a, w in pairs])
