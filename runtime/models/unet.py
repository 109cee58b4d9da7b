"""The denoising UNet of Stable Diffusion XL (base and refiner) and of Stable Diffusion 1.x and 2.x.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), and Podell et
al., "SDXL" (2023), section 2. Parameters are named as diffusers' UNet2DConditionModel names them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import GroupNormSiLU, ResnetBlock, TimestepEmbedding, sinusoidal_embedding
from .unet_blocks import DownBlock, KeysValues, MidBlock, TransformerBlock, UpBlock
from .unet_config import UNetConfig

__all__ = ["UNet", "UNetConfig", "input_names"]


def input_names(config: UNetConfig) -> tuple[str, ...]:
    """The inputs that a UNet of this configuration takes, in the order of `UNet.forward`'s parameters."""
    names = ["sample", "timestep", "encoder_hidden_states"]
    if config.takes_sizes:
        names += ["text_embeds", "time_ids"]
    if config.time_cond_proj_dim is not None:
        names += ["timestep_cond"]
    return tuple(names)


class UNet(nn.Module):
    """Predicts the noise (or v, or the sample) in noisy latents."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = range(len(widths))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            widths[0], config.time_embedding_dim, config.time_cond_proj_dim
        )
        self.add_embedding = (
            TimestepEmbedding(config.projection_class_embeddings_input_dim, config.time_embedding_dim)
            if config.projection_class_embeddings_input_dim is not None and config.addition_embed_type
            else None
        )
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level, has_attention)
            for level, has_attention in zip(reversed(levels), config.up_attention, strict=True)
        )
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            sample: [B, C, H, W] latents, of any H and W.
            timestep: [B] float32.
            encoder_hidden_states: [B, S, D] text embeddings.
            text_embeds: [B, P] pooled text embeddings, for text_time.
            time_ids: [B, N] float32 sizes, crop and (refiner) aesthetic score, for text_time.
            timestep_cond: [B, Dc] guidance embedding, for consistency models.

        The last three are taken in the order of `input_names`, whichever of them a configuration has, so that
        a caller may pass all of its inputs by position.

        Returns:
            [B, out_channels, H, W] of sample's dtype.

        Raises:
            TypeError: more or fewer inputs than `input_names` lists.
        """
        # A guidance embedding without sizes comes as `text_embeds` if it is passed by position.
        names = input_names(self.config)
        given = [t for t in (text_embeds, time_ids, timestep_cond) if t is not None]
        if len(given) != len(names) - 3:
            raise TypeError(f"this UNet takes {', '.join(names)}: {len(names)} inputs, not {len(given) + 3}")
        conditions = dict(zip(names[3:], given, strict=True))
        emb = self.embed_time(timestep, sample.dtype, conditions.get("timestep_cond"))
        if self.add_embedding is not None:
            emb = emb + self.embed_sizes(conditions["text_embeds"], conditions["time_ids"])
        return self.step(sample, self.shifts(emb), self.keys_values(encoder_hidden_states))

    def embed_time(self, timestep: Tensor, dtype: torch.dtype, cond: Tensor | None = None) -> Tensor:
        """timestep: [B] float32; cond: [B, Dc], of consistency models. Returns [B, T]."""
        # Sinusoids are computed in float32, then cast: a graph that mixes dtypes is invalid in ONNX.
        waves = self._waves(timestep, self.config.block_out_channels[0]).to(dtype)  # [B, C0]
        emb: Tensor = self.time_embedding(waves, cond)
        return emb

    def embed_sizes(self, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
        """text_embeds: [B, P]; time_ids: [B, N] float32. Returns [B, T], to be added to the time's."""
        assert self.add_embedding is not None
        assert self.config.addition_time_embed_dim is not None
        ids = self._waves(time_ids, self.config.addition_time_embed_dim)  # [B, N, dim]
        emb: Tensor = self.add_embedding(
            torch.cat([text_embeds, ids.flatten(1).to(text_embeds.dtype)], dim=-1)
        )
        return emb

    def shifts(self, emb: Tensor) -> list[Tensor]:
        """What each residual block in turn adds to its channels: [B, T] -> [B, Cout] each."""
        active = F.silu(emb)  # the SiLU of every residual block, computed once
        return [block.time_emb_proj(active) for block in self.resnets() if block.time_emb_proj is not None]

    def keys_values(self, encoder_hidden_states: Tensor) -> list[KeysValues]:
        """Keys and values of a text, [B, S, D], for each transformer block's cross-attention in turn."""
        return [block.attn2.keys_values(encoder_hidden_states) for block in self.transformers()]

    def step(self, sample: Tensor, shifts: Iterable[Tensor], texts: Iterable[KeysValues]) -> Tensor:
        """The part of the network that depends on the latents.

        Args:
            sample: [B, C, H, W].
            shifts, texts: as `shifts` and `keys_values` give them.

        Returns:
            [B, out_channels, H, W] of sample's dtype.
        """
        shift, text = iter(shifts), iter(texts)
        # Held by the list alone, so that what an up block takes from it can be freed.
        images = [self.conv_in(sample)]  # [B, C0, H, W]
        for down in self.down_blocks:
            images += down(images[-1], shift, text)
        images.append(self.mid_block(images[-1], shift, text))
        for up in self.up_blocks:
            images.append(up(images, shift, text))
        out: Tensor = self.conv_out(self.conv_norm_out(images.pop()))
        return out

    def resnets(self) -> list[ResnetBlock]:
        """The residual blocks, in the order they run."""
        return [module for module in self.modules() if isinstance(module, ResnetBlock)]

    def transformers(self) -> list[TransformerBlock]:
        """The transformer blocks, in the order they run."""
        return [module for module in self.modules() if isinstance(module, TransformerBlock)]

    def _waves(self, t: Tensor, dim: int) -> Tensor:
        return sinusoidal_embedding(
            t, dim, flip_sin_to_cos=self.config.flip_sin_to_cos, freq_shift=self.config.freq_shift
        )
