"""One block of each kind in SDXL's base UNet, at its shapes at 1024x1024, as diffusers and as latentrt define it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.engines.base import Component, TensorSpec
from ..runtime.models.layers import ResnetBlock
from ..runtime.models.unet_blocks import TransformerBlock
from ..runtime.models.unet_config import UNetConfig

__all__ = ["BLOCKS", "Block", "Pair", "residual", "transformer"]


@dataclass(frozen=True)
class Pair:
    """A block in both definitions.

    Attributes:
        diffusers: diffusers' module.
        latentrt: latentrt's module, with the same weights.
        inputs: of both, with batch 1.
        dims: dimensions of each input; dynamic ones are names.
    """

    diffusers: nn.Module
    latentrt: nn.Module
    inputs: dict[str, Tensor]
    dims: dict[str, tuple[int | str, ...]]

    def component(self) -> Component:
        """latentrt's module, as back ends take it."""
        specs = tuple(TensorSpec(name, dims, torch.float32) for name, dims in self.dims.items())
        names = {dim for spec in specs for dim in spec.dims if isinstance(dim, str)}
        return Component(
            name="block",
            build=lambda: self.latentrt,
            dtype=torch.float32,
            inputs=specs,
            outputs=(TensorSpec("out", specs[0].dims, torch.float32),),
            fingerprint="block",
            example_sizes={name: 2 if name == "batch" else 8 for name in names},
        )


@dataclass(frozen=True)
class Block:
    """One kind of block at one of SDXL's shapes.

    Attributes:
        calls: in a forward of the base UNet; None for the kind that stands for all remaining work.
    """

    name: str
    calls: int | None
    build: Callable[[], Pair]


class _DiffusersTransformer(nn.Module):
    def __init__(self, width: int, heads: int, text: int) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        self.block = BasicTransformerBlock(
            width, heads, width // heads, cross_attention_dim=text, activation_fn="geglu"
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """[B, S, C] and [B, 77, T] -> [B, S, C]."""
        out: Tensor = self.block(x, encoder_hidden_states=text)
        return out


class _LatentrtTransformer(nn.Module):
    def __init__(self, width: int, heads: int, text: int) -> None:
        super().__init__()
        # A block reads only this field.
        config = UNetConfig.from_dict({"cross_attention_dim": text})
        self.block = TransformerBlock(width, heads, config)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """[B, S, C] and [B, 77, T] -> [B, S, C]."""
        x, branch = self.block(x, None, self.block.attn2.keys_values(text))
        out: Tensor = x + branch
        return out


class _DiffusersResidual(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.block = ResnetBlock2D(in_channels=width, temb_channels=embedding, eps=1e-5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, C, H, W] and [B, E] -> [B, C, H, W]."""
        out: Tensor = self.block(x, embedding)
        return out


class _LatentrtResidual(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.block = ResnetBlock(width, width, 32, 1e-5, embedding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B, C, H, W] and [B, E] -> [B, C, H, W]."""
        assert self.block.time_emb_proj is not None
        out: Tensor = self.block(x, self.block.time_emb_proj(F.silu(embedding)))
        return out


def transformer(tokens: int, width: int, heads: int, text: int = 2048) -> Pair:
    """A transformer block over a prompt of 77 tokens."""
    return _pair(
        _DiffusersTransformer(width, heads, text),
        _LatentrtTransformer(width, heads, text),
        {"x": torch.randn(1, tokens, width), "text": torch.randn(1, 77, text)},
        {"x": ("batch", "tokens", width), "text": ("batch", 77, text)},
    )


def residual(side: int, width: int, embedding: int = 1280) -> Pair:
    """A residual block, two convolutions of 3x3."""
    return _pair(
        _DiffusersResidual(width, embedding),
        _LatentrtResidual(width, embedding),
        {"x": torch.randn(1, width, side, side), "embedding": torch.randn(1, embedding)},
        {"x": ("batch", width, "height", "width"), "embedding": ("batch", embedding)},
    )


def _pair(
    diffusers: nn.Module,
    latentrt: nn.Module,
    inputs: dict[str, Tensor],
    dims: dict[str, tuple[int | str, ...]],
) -> Pair:
    latentrt.load_state_dict(diffusers.state_dict())
    return Pair(diffusers.eval(), latentrt.eval(), inputs, dims)


BLOCKS = (
    Block("transformer, 4096 x 640", 10, lambda: transformer(4096, 640, 10)),
    Block("transformer, 1024 x 1280", 60, lambda: transformer(1024, 1280, 20)),
    Block("residual, 128 x 128 x 320", None, lambda: residual(128, 320)),
)
