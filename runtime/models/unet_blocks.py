"""The UNet's transformers and its down, middle and up blocks, over the operators of `latentrt.kernels`."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import attention, linear_geglu
from .layers import Downsample, GroupNorm, LayerNorm, ResidualLinear, ResnetBlock, Upsample, join_channels
from .unet_config import UNetConfig

__all__ = [
    "Attention",
    "DownBlock",
    "FeedForward",
    "KeysValues",
    "MidBlock",
    "Transformer",
    "TransformerBlock",
    "UpBlock",
]

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a cross-attention: [B, Sk, C] each."""


class Attention(nn.Module):
    """Multi-head attention of x over itself, or over keys and values that were made beforehand."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, upcast: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.upcast = upcast
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_qkv: Tensor | None = None  # [3C, C], the fused weight, where they are packed

    def keys_values(self, context: Tensor) -> KeysValues:
        """[B, Sk, Cc] -> keys and values, [B, Sk, C] each."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """x: [B, S, C]; keys_values: [B, Sk, C] each, x's own where None. Returns [B, S, C]."""
        projected: tuple[Tensor, ...]
        if keys_values is None and self.to_qkv is not None:
            projected = F.linear(x, self.to_qkv).chunk(3, dim=-1)
        else:
            projected = (self.to_q(x), *(self.keys_values(x) if keys_values is None else keys_values))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in projected)  # [B, S, H, D]
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        out: Tensor = self.to_out[0](attention(q, k, v).flatten(2).to(x.dtype))
        return out


class GEGLU(nn.Module):
    """`kernels.linear_geglu` with its parameters."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return linear_geglu(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """Two linear layers around a GEGLU, through four times the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The middle one is where training has its dropout: it keeps the checkpoints' numbering.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [B, S, C], the norm of the residual stream. Returns the stream and what is to be added to it, if any."""
        return stream, self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on the norm of the residual stream."""

    def __init__(self, dim: int, num_heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.attn1 = Attention(dim, dim, num_heads, config.upcast_attention)
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.attn2 = Attention(dim, config.cross_attention_dim, num_heads, config.upcast_attention)
        self.norm3 = LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, branch: Tensor | None, text: KeysValues) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            x: [B, S, C], the residual stream.
            branch: [B, S, C], what the block before adds to it; None if nothing, or before the first.
            text: what attn2 attends to.

        Returns:
            Stream and branch of this block: their sum is its output, left to the norm that follows.
        """
        h, x = (self.norm1(x), x) if branch is None else self.norm1.add(branch, x)
        h, x = self.norm2.add(self.attn1(h), x)
        h, x = self.norm3.add(self.attn2(h, text), x)
        return self.ff(h, x)  # type: ignore[no-any-return]


class _ResidualConv(nn.Conv2d):
    """`ResidualLinear` as a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def add(self, rows: Tensor, image: Tensor) -> Tensor:
        out: Tensor = image + self(rows.transpose(1, 2).unflatten(2, image.shape[2:]))
        return out


class Transformer(nn.Module):
    """Transformer blocks over the pixels of an image, around a skip connection."""

    def __init__(self, channels: int, num_heads: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = GroupNorm(config.norm_num_groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, config) for _ in range(depth)
        )
        self.proj_out = ResidualLinear(channels, channels) if self.linear else _ResidualConv(channels)

    def forward(self, x: Tensor, texts: Iterator[KeysValues]) -> Tensor:
        """x: [B, C, H, W], which may be overwritten; texts: for each block in turn. Returns [B, C, H, W]."""
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # [B, HW, C]
        if self.linear:
            h = self.proj_in(h)
        branch = None
        for block in self.transformer_blocks:
            h, branch = block(h, branch, next(texts))
        h = h if branch is None else h + branch
        return self.proj_out.add(h, x)


def _transformers(channels: int, level: int, count: int, config: UNetConfig) -> nn.ModuleList:
    heads, depth = config.num_heads[level], config.transformer_layers[level]
    return nn.ModuleList(Transformer(channels, heads, depth, config) for _ in range(count))


def _resnet(in_channels: int, out_channels: int, config: UNetConfig) -> ResnetBlock:
    return ResnetBlock(
        in_channels, out_channels, config.norm_num_groups, config.norm_eps, config.time_embedding_dim
    )


class DownBlock(nn.Module):
    """Residual blocks of one level, transformers where the level has them, then a downsampling."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        previous = config.block_out_channels[max(level - 1, 0)]
        count = config.layers_per_block[level]
        self.resnets = nn.ModuleList(
            _resnet(previous if i == 0 else channels, channels, config) for i in range(count)
        )
        self.attentions = _transformers(channels, level, count if config.down_attention[level] else 0, config)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels)])

    def forward(self, x: Tensor, shifts: Iterator[Tensor], texts: Iterator[KeysValues]) -> list[Tensor]:
        """x: [B, Cin, H, W]; shifts and texts: for each residual and transformer block in turn.

        Returns:
            Every tensor on the way, for the up blocks; the last is the block's output.
        """
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, next(shifts))
            if self.attentions:
                x = self.attentions[i](x, texts)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return skips


class MidBlock(nn.Module):
    """A transformer between two residual blocks, at the coarsest level."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(channels, channels, config) for _ in range(2))
        self.attentions = _transformers(channels, -1, 1, config)

    def forward(self, x: Tensor, shifts: Iterator[Tensor], texts: Iterator[KeysValues]) -> Tensor:
        """x: [B, C, H, W] -> [B, C, H, W]."""
        x = self.attentions[0](self.resnets[0](x, next(shifts)), texts)
        out: Tensor = self.resnets[1](x, next(shifts))
        return out


class UpBlock(nn.Module):
    """Residual blocks of one level, each fed a tensor kept on the way down, then an upsampling."""

    def __init__(self, config: UNetConfig, level: int, has_attention: bool) -> None:
        super().__init__()
        widths = config.block_out_channels
        channels = widths[level]
        below = widths[min(level + 1, len(widths) - 1)]  # of the up block that ran before
        above = widths[max(level - 1, 0)]  # of the last tensor kept: the input of this level's down block
        count = config.layers_per_block[level] + 1
        self.resnets = nn.ModuleList(
            _resnet(
                (below if i == 0 else channels) + (above if i == count - 1 else channels), channels, config
            )
            for i in range(count)
        )
        self.attentions = _transformers(channels, level, count if has_attention else 0, config)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(channels)])

    def forward(self, images: list[Tensor], shifts: Iterator[Tensor], texts: Iterator[KeysValues]) -> Tensor:
        """
        Args:
            images: the block takes from its end its input, [B, Cin, H, W], and a tensor kept on the way down for each
                residual block. The last one left has the size to upsample to, which is odd where the downsampling
                rounded up.
            shifts, texts: for each residual and transformer block in turn.

        Returns:
            [B, Cout, H, W], or of the size of the last of `images`.
        """
        x = images.pop()
        for i, resnet in enumerate(self.resnets):
            x = join_channels(x, images.pop())  # by itself, so that the two are gone when resnet runs
            x = resnet(x, next(shifts))
            if self.attentions:
                x = self.attentions[i](x, texts)
        for upsample in self.upsamplers:
            height, width = images[-1].shape[2:]
            x = upsample(x, (height, width))
        return x
