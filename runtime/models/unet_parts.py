"""A UNet as three modules: what is computed once for a prompt, once for a timestep, and in every step.

Run one after the other they compute what `UNet.forward` does. Each has the parameters it needs and no others, so that
the three together have every parameter of the UNet once.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .unet import UNet

__all__ = ["PARTS", "UNetPart", "UNetPrompt", "UNetStep", "UNetTime"]

_OF_TEXT = (".attn2.to_k.", ".attn2.to_v.", ".add_embedding.")
_OF_TIME = (".time_embedding.", ".time_emb_proj.")


class UNetPart(nn.Module):
    """Some of a UNet's parameters, and what is computed from them.

    Attributes:
        unet: without the other parameters.
    """

    marks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, unet: UNet) -> None:
        """Takes the UNet over: the parameters of other parts are taken out of it."""
        super().__init__()
        self.unet = unet
        for path, module in unet.named_modules():
            for leaf in list(module._parameters):
                if not self.has(f"{path}.{leaf}"):
                    module.register_parameter(leaf, None)

    @classmethod
    def has(cls, key: str) -> bool:
        """Whether a parameter of the UNet, by its name there, is one of this part."""
        return any(mark in f".{key}" for mark in cls.marks)


class UNetPrompt(UNetPart):
    """What depends on the text and its sizes only."""

    marks = _OF_TEXT

    def forward(
        self, encoder_hidden_states: Tensor, text_embeds: Tensor | None = None, time_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """
        Args:
            encoder_hidden_states, text_embeds, time_ids: as in `UNet.forward`.

        Returns:
            Keys and values of each transformer block in turn, [B, S, C] each; before them the embedding of the sizes,
            [B, T], where the UNet has one.
        """
        made = [x for pair in self.unet.keys_values(encoder_hidden_states) for x in pair]
        if text_embeds is not None and time_ids is not None:
            made.insert(0, self.unet.embed_sizes(text_embeds, time_ids))
        return tuple(made)


class UNetTime(UNetPart):
    """What depends on the timestep as well."""

    marks = _OF_TIME

    def forward(self, timestep: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            timestep: [B] float32.
            conditions: `timestep_cond` of `UNet.forward` and the embedding of the sizes, where the UNet has them.

        Returns:
            The shift of each residual block in turn, [B, C] each.
        """
        given = iter(conditions)
        unet, dtype = self.unet, self.unet.time_embedding.linear_1.weight.dtype
        cond = next(given) if unet.config.time_cond_proj_dim is not None else None
        emb = unet.embed_time(timestep, dtype, cond)
        if unet.add_embedding is not None:
            emb = emb + next(given)
        return tuple(unet.shifts(emb))


class UNetStep(UNetPart):
    """What depends on the latents: `UNet.step`."""

    def forward(self, sample: Tensor, *given: Tensor) -> Tensor:
        """
        Args:
            sample: [B, C, H, W].
            given: the shifts that `UNetTime` gives, then the keys and values that `UNetPrompt` gives.

        Returns:
            [B, out_channels, H, W].
        """
        texts = iter(given[len(given) - 2 * len(self.unet.transformers()) :])
        return self.unet.step(sample, given, zip(texts, texts, strict=True))

    @classmethod
    def has(cls, key: str) -> bool:
        return not (UNetPrompt.has(key) or UNetTime.has(key))


PARTS: dict[str, type[UNetPart]] = {"prompt": UNetPrompt, "time": UNetTime, "step": UNetStep}
"""The parts by name, in the order they are run."""
