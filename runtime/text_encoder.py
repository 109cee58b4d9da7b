"""Token ids become text embeddings: a sequence for cross-attention and one pooled vector.

SDXL joins the penultimate layers of its two encoders along the channels and pools the second; its refiner has
the second only; SD 1.x and 2.x have one encoder and take its normalised last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from .engines.lazy import LazyEngine
from .prompt import ClipTokenizer

__all__ = ["PromptEncoding", "TextEmbeddings", "TextEncoder"]


@dataclass(frozen=True)
class TextEmbeddings:
    """The text conditioning of the UNet.

    Attributes:
        sequence: `[B, tokens, D]`, for cross-attention.
        pooled: `[B, P]`, of the last encoder.
    """

    sequence: Tensor
    pooled: Tensor

    def zeros(self) -> TextEmbeddings:
        """SDXL's stand-in for an absent negative prompt (`force_zeros_for_empty_prompt`)."""
        return TextEmbeddings(torch.zeros_like(self.sequence), torch.zeros_like(self.pooled))

    def repeat(self, times: int) -> TextEmbeddings:
        """Each row `times` times in a row, one for each image of a prompt."""
        return TextEmbeddings(
            self.sequence.repeat_interleave(times, dim=0), self.pooled.repeat_interleave(times, dim=0)
        )


@dataclass(frozen=True)
class TextEncoder:
    """One CLIP text encoder with its tokenizer.

    Attributes:
        tokenizer, engine: what turns text into ids, and ids into embeddings.
        num_layers: transformer layers; hidden state `num_layers` is the last one's output.
        skip: layers left out at the end when no clip_skip is asked for (SDXL: 1, SD 1.x and 2.x: 0).
        width, pooled_width: channels of the sequence and of the pooled vector.
    """

    tokenizer: ClipTokenizer
    engine: LazyEngine
    num_layers: int
    skip: int
    width: int
    pooled_width: int

    def equals(self, other: TextEncoder) -> bool:
        """Whether both give every prompt the same embeddings: same weights, same tokens."""
        return (
            self.engine.component.fingerprint == other.engine.component.fingerprint
            and self.tokenizer.equals(other.tokenizer)
            and self.skip == other.skip
        )

    def encode(self, prompts: Sequence[str], clip_skip: int | None, device: torch.device) -> TextEmbeddings:
        """Embeddings of each prompt, on `device`; `clip_skip` further layers are left out.

        Raises:
            RequestError: `clip_skip` leaves no layer.
        """
        layer = self.num_layers - self.skip - (clip_skip or 0)
        if not 0 <= layer <= self.num_layers:
            raise RequestError(
                f"clip_skip is {clip_skip}; this text encoder has {self.num_layers} layers, so it can be "
                f"0 to {self.num_layers - self.skip}"
            )
        ids = self.tokenizer.encode(prompts).to(device)
        out = self.engine({"input_ids": ids, "layer": torch.tensor(layer, dtype=torch.int64, device=device)})
        # An encoder that another pipeline shares may run on that one's device.
        return TextEmbeddings(out["sequence"].to(device), out["pooled"].to(device))


class PromptEncoding:
    """Encodes the texts of one request, each only once: base and refiner share an encoder and the prompts."""

    def __init__(self, device: torch.device) -> None:
        """`device`: of the embeddings."""
        self._device = device
        self._encoded: dict[tuple[TextEncoder, tuple[str, ...], int], TextEmbeddings] = {}

    def __call__(
        self, encoders: Sequence[TextEncoder], prompts: Sequence[Sequence[str]], clip_skip: int | None
    ) -> TextEmbeddings:
        """Embeddings of one prompt list per encoder, joined along the channels; the last encoder is pooled.

        Args:
            encoders: one or two.
            prompts: for each encoder, its text of every prompt.
            clip_skip: as for `TextEncoder.encode`.

        Raises:
            RequestError: `clip_skip` leaves no layer.
        """
        parts = [
            self._of(e, tuple(texts), clip_skip or 0) for e, texts in zip(encoders, prompts, strict=True)
        ]
        return TextEmbeddings(torch.cat([p.sequence for p in parts], dim=-1), parts[-1].pooled)

    def _of(self, encoder: TextEncoder, texts: tuple[str, ...], clip_skip: int) -> TextEmbeddings:
        key = (encoder, texts, clip_skip)
        if key not in self._encoded:
            self._encoded[key] = encoder.encode(texts, clip_skip, self._device)
        return self._encoded[key]
