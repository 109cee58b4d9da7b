"""What the UNet is conditioned on: text, sizes, crops and aesthetic scores.

Rows of the guidance batch are `[negative of every image..., positive of every image...]` in every tensor, so
row k and row B + k always belong to image k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .place import CPU_FLOAT32
from .text_encoder import TextEmbeddings

__all__ = ["Conditioning", "MicroConditioning", "guidance_batch", "guidance_scale_embedding"]


@dataclass(frozen=True)
class MicroConditioning:
    """SDXL's size and crop conditioning of one image (Podell et al., 2023, sections 2.2 and 2.3).

    Sizes are (height, width) in pixels, `crop` the (top, left) of the crop. The refiner takes an aesthetic score
    (about 0 to 10) in place of the target size.
    """

    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]
    aesthetic_score: float | None = None

    def ids(self) -> list[float]:
        """Six numbers, or five with an aesthetic score."""
        tail = self.target_size if self.aesthetic_score is None else (self.aesthetic_score,)
        return [float(v) for v in (*self.original_size, *self.crop, *tail)]


@dataclass(frozen=True)
class Conditioning:
    """Everything constant over the steps, for the rows of the guidance batch.

    Attributes:
        encoder_hidden_states: `[R, tokens, D]` with R = 2B under guidance, else B.
        text_embeds: `[R, P]`, or None for SD 1.x and 2.x.
        time_ids: `[R, 6 or 5]` float32, or None likewise.
        timestep_cond: `[R, time_cond_proj_dim]`, of models distilled with guidance, else None.
    """

    encoder_hidden_states: Tensor
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    timestep_cond: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors there are, under the UNet's input names."""
        return {name: value for name, value in vars(self).items() if value is not None}


def guidance_batch(
    positive: TextEmbeddings,
    negative: TextEmbeddings | None,
    sizes: tuple[Sequence[MicroConditioning], Sequence[MicroConditioning]] | None,
    dtype: torch.dtype,
) -> Conditioning:
    """Join the negative and positive rows of every image.

    Args:
        positive, negative: B rows each; None for the negative without guidance.
        sizes: those of the positive and of the negative rows, one per image each; None where the model has no size
            conditioning.
        dtype: of the UNet. Sizes stay float32: float16 cannot hold every pixel count above 2,048.
    """
    hidden, pooled = positive.sequence, positive.pooled
    if negative is not None:
        hidden, pooled = torch.cat([negative.sequence, hidden]), torch.cat([negative.pooled, pooled])
    if sizes is None:
        return Conditioning(hidden.to(dtype))
    positive_sizes, negative_sizes = sizes
    rows = positive_sizes if negative is None else [*negative_sizes, *positive_sizes]
    return Conditioning(
        encoder_hidden_states=hidden.to(dtype),
        text_embeds=pooled.to(dtype),
        time_ids=torch.tensor([r.ids() for r in rows], dtype=torch.float32, device=hidden.device),
    )


def guidance_scale_embedding(scales: Sequence[float], dim: int) -> Tensor:
    """Sinusoidal embedding of each `scale - 1`, for models distilled with guidance (Meng et al., 2023; as in LCM).

    Returns:
        float32 `[len(scales), dim]`: sines, then cosines, of 1000 (scale - 1) at geometric frequencies 1 to 1e-4.
    """
    half = dim // 2
    # Each step in float32, as the models were trained: in angles this large its rounding reaches 2e-4.
    step = torch.tensor(10000.0, **CPU_FLOAT32).log() / (half - 1)
    frequencies = torch.exp(torch.arange(half, **CPU_FLOAT32) * -step)
    angles = torch.tensor([[scale - 1.0] for scale in scales], **CPU_FLOAT32) * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos(), torch.zeros(len(scales), dim % 2, **CPU_FLOAT32)], dim=1)
