"""config.json of a UNet, in diffusers' fields, as one frozen dataclass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import DEEPEST, Fields

__all__ = ["UNetConfig"]

# The fields the model reads, with diffusers' defaults.
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "upcast_attention": False,
    "time_embedding_dim": None,
    "time_cond_proj_dim": None,
}


def _is(*allowed: object) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in allowed, " or ".join(repr(a) for a in allowed)


def _off(value: Any) -> bool:
    """False or null, for all levels or for each."""
    return not any(value) if isinstance(value, (list, tuple)) else value in (False, None)


_OFF = (_off, "False")

# Fields with one implemented meaning: the values that have it.
_FIXED = {
    "act_fn": _is("silu", "swish"),
    "attention_type": _is("default"),
    "center_input_sample": _OFF,
    "class_embed_type": _is(None),
    "class_embeddings_concat": _OFF,
    "conv_in_kernel": _is(3),
    "conv_out_kernel": _is(3),
    "cross_attention_norm": _is(None),
    "downsample_padding": _is(1),
    "dual_cross_attention": _OFF,
    "encoder_hid_dim": _is(None),
    "encoder_hid_dim_type": _is(None),
    "mid_block_only_cross_attention": _OFF,
    "mid_block_scale_factor": _is(1),
    "mid_block_type": _is("UNetMidBlock2DCrossAttn"),
    "num_attention_heads": _is(None),
    "num_class_embeds": _is(None),
    "only_cross_attention": _OFF,
    "resnet_out_scale_factor": _is(1),
    "resnet_skip_time_act": _OFF,
    "resnet_time_scale_shift": _is("default"),
    "reverse_transformer_layers_per_block": _is(None),
    "time_embedding_act_fn": _is(None),
    "time_embedding_type": _is("positional"),
    "timestep_post_act": _is(None),
}

# Training only, of embeddings that are refused above, or left in the file by an averaged (EMA) training copy.
_INERT = frozenset(
    {
        "addition_embed_type_num_heads",
        "decay",
        "dropout",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)

_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is made of. Lists run from the finest level to the coarsest, except `up_attention`.

    Attributes:
        in_channels: 4, or 9 where a mask and a masked image are concatenated for inpainting.
        out_channels: in_channels of the latents, or twice that where the variance is predicted too.
        sample_size: (height, width) in latent pixels that the model was trained for, if it says.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks of each level's down block; an up block has one more.
        down_attention, up_attention: which down and up blocks, in the order they run, have transformers.
        transformer_layers: depth of the transformers of each level.
        num_heads: attention heads of each level. config.json calls them `attention_head_dim`.
        cross_attention_dim: size of the text embeddings.
        use_linear_projection: transformers are entered through linear layers instead of 1x1 convolutions.
        upcast_attention: attention runs in float32 whatever the model's dtype.
        norm_num_groups, norm_eps: of the group norms of the residual blocks.
        flip_sin_to_cos, freq_shift: of the sinusoidal embeddings.
        time_embedding_dim: size of the time embedding inside the network.
        time_cond_proj_dim: size of the guidance embedding of a consistency model, else None.
        addition_embed_type: "text_time" (pooled text and size ids join the time embedding) or None.
        addition_time_embed_dim: size of the sinusoidal embedding of each size id.
        projection_class_embeddings_input_dim: size of pooled text and embedded size ids together.
    """

    in_channels: int
    out_channels: int
    sample_size: tuple[int, int] | None
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    transformer_layers: tuple[int, ...]
    num_heads: tuple[int, ...]
    cross_attention_dim: int
    use_linear_projection: bool
    upcast_attention: bool
    norm_num_groups: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    time_embedding_dim: int
    time_cond_proj_dim: int | None
    addition_embed_type: str | None
    addition_time_embed_dim: int | None
    projection_class_embeddings_input_dim: int | None

    @property
    def takes_sizes(self) -> bool:
        """Whether it is of SDXL's family, which is conditioned on sizes and crops."""
        return self.addition_embed_type == "text_time"

    @property
    def latent_size(self) -> tuple[int, int]:
        """`sample_size`; 128 by 128 where the model does not say."""
        return self.sample_size or (128, 128)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> UNetConfig:
        """Read a parsed config.json.

        Raises:
            UnsupportedConfigError: naming the field and its value.
        """
        f = Fields("unet", raw, defaults=_DEFAULTS, fixed=_FIXED, inert=_INERT)
        channels = f.integers("block_out_channels")
        levels = len(channels)
        heads = f.per_level("attention_head_dim", levels)
        if any(c % h for c, h in zip(channels, heads, strict=True)):
            raise f.unsupported("attention_head_dim", heads, f"divisors of block_out_channels {channels}")
        groups = f.integer("norm_num_groups")
        if any(c % groups for c in channels):
            raise f.unsupported("norm_num_groups", groups, f"a divisor of block_out_channels {channels}")
        context = f.per_level("cross_attention_dim", levels)
        if len(set(context)) != 1:
            raise f.unsupported("cross_attention_dim", context, "the same for all levels")
        addition = f.optional_string("addition_embed_type", ("text_time",))
        time_ids_dim = f.optional_integer("addition_time_embed_dim")
        addition_dim = f.optional_integer("projection_class_embeddings_input_dim")
        if addition and time_ids_dim is None:
            raise f.unsupported("addition_time_embed_dim", None, "set for addition_embed_type='text_time'")
        if addition and addition_dim is None:
            raise f.unsupported(
                "projection_class_embeddings_input_dim", None, "set for addition_embed_type='text_time'"
            )
        return cls(
            in_channels=f.integer("in_channels"),
            out_channels=f.integer("out_channels"),
            sample_size=_mended(f.size("sample_size"), raw) if addition is None else f.size("sample_size"),
            block_out_channels=channels,
            layers_per_block=f.per_level("layers_per_block", levels, DEEPEST),
            down_attention=tuple(t == _DOWN[1] for t in f.strings("down_block_types", _DOWN, levels)),
            up_attention=tuple(t == _UP[1] for t in f.strings("up_block_types", _UP, levels)),
            transformer_layers=f.per_level("transformer_layers_per_block", levels, DEEPEST),
            num_heads=heads,
            cross_attention_dim=context[0],
            use_linear_projection=f.flag("use_linear_projection"),
            upcast_attention=f.flag("upcast_attention"),
            norm_num_groups=groups,
            norm_eps=f.number("norm_eps"),
            flip_sin_to_cos=f.flag("flip_sin_to_cos"),
            freq_shift=f.number("freq_shift"),
            time_embedding_dim=f.optional_integer("time_embedding_dim") or 4 * channels[0],
            time_cond_proj_dim=f.optional_integer("time_cond_proj_dim"),
            addition_embed_type=addition,
            addition_time_embed_dim=time_ids_dim,
            projection_class_embeddings_input_dim=addition_dim,
        )


def _mended(size: tuple[int, int] | None, raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """64 at least for SD 1.x as diffusers before 0.9 wrote it: its files say 32, whatever the model was trained at.
    diffusers' StableDiffusionPipeline reads them like this."""
    version = re.match(r"(\d+)\.(\d+)", str(raw.get("_diffusers_version")))
    old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    return (64, 64) if old and size is not None and size[0] == size[1] < 64 else size
