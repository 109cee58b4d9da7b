"""The layers that the UNet, the VAE and the text encoders share.

Parameters have the names they have in diffusers and in published checkpoints. No module computes a tensor
when it is made, so any of them can be built on the meta device and filled afterwards.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import add_layer_norm, group_norm, group_norm_silu, layer_norm

__all__ = [
    "Downsample",
    "GroupNorm",
    "GroupNormSiLU",
    "LayerNorm",
    "ResidualLinear",
    "ResnetBlock",
    "Shortcut",
    "TimestepEmbedding",
    "Upsample",
    "join_channels",
    "sinusoidal_embedding",
]


class GroupNorm(nn.GroupNorm):
    """`kernels.group_norm` with its parameters."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, shift)


class GroupNormSiLU(nn.GroupNorm):
    """`kernels.group_norm_silu` with its parameters."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, shift)


class LayerNorm(nn.LayerNorm):
    """`kernels.layer_norm` and `kernels.add_layer_norm` with their parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


def join_channels(first: Tensor, second: Tensor) -> Tensor:
    """[B, C1, H, W], [B, C2, H, W] -> [B, C1 + C2, H, W], channels last where both are.

    There PyTorch's `cat` of channels copies element by element (its ATen/native/cuda/Shape.cu); the same rows joined
    at their last axis go in vectors of 16 bytes.
    """
    pair = (first, second)
    if all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in pair):
        return torch.cat([x.permute(0, 2, 3, 1) for x in pair], dim=3).permute(0, 3, 1, 2)
    return torch.cat(pair, dim=1)


def sinusoidal_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies.

    Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), appendix B, after Vaswani et al.
    (2017), section 3.5; with diffusers' two switches.

    Args:
        t: [...] float32.
        dim: size of the result; a last 0 is added to an odd one.
        flip_sin_to_cos: cosines first.
        freq_shift: subtracted from dim // 2 in the exponent's denominator.

    Returns:
        [..., dim] float32. The angles reach 1000, so less precision would be visible in the image.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[..., None] * torch.exp(exponent / (half - freq_shift))  # [..., dim // 2]
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    embedding = torch.cat(waves, dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between; `cond_dim` adds a projected condition to the input.

    The condition is the guidance embedding of consistency-distilled models (Luo et al., "Latent Consistency
    Models", 2023, section 4.3).
    """

    def __init__(self, in_dim: int, out_dim: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.cond_proj = nn.Linear(cond_dim, in_dim, bias=False) if cond_dim is not None else None
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and cond is not None:
            x = x + self.cond_proj(cond)
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ResidualLinear(nn.Linear):
    """A linear layer over the pixels of an image, around which a skip connection leads."""

    def add(self, rows: Tensor, image: Tensor) -> Tensor:
        """rows: [B, HW, Cin]; image: [B, Cout, H, W], which may be overwritten. Returns their sum, like `image`."""
        out: Tensor = image + self(rows).transpose(1, 2).unflatten(2, image.shape[2:])
        return out


class Shortcut(nn.Conv2d):
    """The 1x1 convolution on the skip connection of a residual block that changes the number of channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def add(self, x: Tensor, image: Tensor) -> Tensor:
        """x: [B, Cin, H, W]; image: [B, Cout, H, W], which may be overwritten. Returns their sum, like `image`."""
        out: Tensor = self(x) + image
        return out


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, around a skip; the time embedding shifts the second norm."""

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim is not None else None
        self.norm2 = GroupNormSiLU(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Shortcut(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, Cin, H, W].
            shift: [B, Cout], the time embedding's projection; None where the block has no time embedding.

        Returns:
            [B, Cout, H, W].
        """
        h = self.conv1(self.norm1(x))  # [B, Cout, H, W]
        h = self.norm2(h, shift)  # by itself, so that conv1's output is gone when conv2 runs
        h = self.conv2(h)
        return x + h if self.conv_shortcut is None else self.conv_shortcut.add(x, h)


class Downsample(nn.Module):
    """Halves height and width, rounding up; `padding=0` pads below and to the right only, as the VAE does."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == 0:
            x = F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Repeats every pixel, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """
        Args:
            x: [B, C, H, W].
            size: of the result; None for twice H and W. One less undoes a downsampling that rounded up.
        """
        if size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        out: Tensor = self.conv(x)
        return out
