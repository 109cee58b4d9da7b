"""The autoencoder between pixels and latents.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.1 and
appendix G. Parameters are named as diffusers' AutoencoderKL names them; encoder and decoder are separate
modules, so that each can be loaded and exported without the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...kernels import attention
from .config import DEEPEST, Fields
from .layers import Downsample, GroupNorm, GroupNormSiLU, ResidualLinear, ResnetBlock, Upsample

__all__ = ["VAEConfig", "VAEDecoder", "VAEEncoder", "rename_legacy_vae_keys"]

_EPS = 1e-6  # of every norm; not a field of config.json

_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_FIXED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "act_fn": (lambda value: value in ("silu", "swish"), "'silu' or 'swish'"),
    "latents_mean": (lambda value: value is None, "None"),
    "latents_std": (lambda value: value is None, "None"),
    "shift_factor": (lambda value: value in (None, 0), "None or 0"),
}


@dataclass(frozen=True)
class VAEConfig:
    """What an autoencoder is made of.

    Attributes:
        in_channels, out_channels: of the image the encoder takes and the decoder makes.
        latent_channels: of the latents; the encoder's output has twice as many.
        block_out_channels: channels of each level, finest first.
        layers_per_block: residual blocks of each level of the encoder; the decoder has one more.
        norm_num_groups: of every group norm.
        scaling_factor: the diffusion model sees latents times this.
        force_upcast: the weights overflow in float16: run in float32 or bfloat16.
        use_quant_conv, use_post_quant_conv: a 1x1 convolution after the encoder, before the decoder.
        mid_block_add_attention: self-attention at the coarsest level.
    """

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VAEConfig:
        """Read a parsed config.json.

        Raises:
            UnsupportedConfigError: naming the field and its value.
        """
        f = Fields("vae", raw, defaults=_DEFAULTS, fixed=_FIXED, inert=("sample_size",))
        channels = f.integers("block_out_channels")
        f.strings("down_block_types", ("DownEncoderBlock2D",), len(channels))
        f.strings("up_block_types", ("UpDecoderBlock2D",), len(channels))
        groups = f.integer("norm_num_groups")
        if any(c % groups for c in channels):
            raise f.unsupported("norm_num_groups", groups, f"a divisor of block_out_channels {channels}")
        return cls(
            in_channels=f.integer("in_channels"),
            out_channels=f.integer("out_channels"),
            latent_channels=f.integer("latent_channels"),
            block_out_channels=channels,
            layers_per_block=f.integer("layers_per_block", DEEPEST),
            norm_num_groups=groups,
            scaling_factor=f.number("scaling_factor"),
            force_upcast=f.flag("force_upcast"),
            use_quant_conv=f.flag("use_quant_conv"),
            use_post_quant_conv=f.flag("use_post_quant_conv"),
            mid_block_add_attention=f.flag("mid_block_add_attention"),
        )

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))


class VAEDecoder(nn.Module):
    """Latents to an image."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None
        self.decoder = _Decoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """latents: [B, latent_channels, h, w], already divided by the scaling factor.

        Returns:
            [B, out_channels, h * scale, w * scale], nominally in [-1, 1]; not clamped.
        """
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        out: Tensor = self.decoder(latents)
        return out


class VAEEncoder(nn.Module):
    """An image to the moments of its latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = _Encoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, in_channels, H, W] in [-1, 1], H and W multiples of `scale`.

        Returns:
            [B, 2 * latent_channels, H / scale, W / scale]: means, then log-variances, not scaled.
        """
        moments: Tensor = self.encoder(image)
        return self.quant_conv(moments) if self.quant_conv is not None else moments


class _Attention(nn.Module):
    """One head over all pixels, around a skip connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, _EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([ResidualLinear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], which may be overwritten -> [B, C, H, W]."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (layer(h).unsqueeze(2) for layer in (self.to_q, self.to_k, self.to_v))  # [B, HW, 1, C]
        to_out: Any = self.to_out[0]
        out: Tensor = to_out.add(attention(q, k, v).squeeze(2), x)
        return out


class _MidBlock(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, _EPS) for _ in range(2))
        self.attentions = nn.ModuleList(
            [_Attention(channels, groups)] if config.mid_block_add_attention else []
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention_block in self.attentions:
            x = attention_block(x)
        out: Tensor = self.resnets[1](x)
        return out


class _Level(nn.Module):
    """Residual blocks, then a downsampling or an upsampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        groups: int,
        *,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups, _EPS)
            for i in range(count)
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups, down=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = _MidBlock(config)
        self.conv_norm_out = GroupNormSiLU(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(self.mid_block(x)))
        return out


class _Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups  # coarsest first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _MidBlock(config)
        self.up_blocks = nn.ModuleList(
            _Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, up=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNormSiLU(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_KEY = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")


def rename_legacy_vae_keys(key: str) -> str:
    """The present name of a weight in an older checkpoint; any other key comes back as it is.

    Older files may also hold the attention's weights as 1x1 convolutions, [C, C, 1, 1]: `load_into` takes them.
    """
    match = _LEGACY_KEY.fullmatch(key)
    return f"{match[1]}.{_LEGACY[match[2]]}.{match[3]}" if match else key
