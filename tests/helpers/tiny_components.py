"""Small random components, for tests of exports and back ends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from latentrt.runtime.engines.base import Component, TensorSpec, Values, example_inputs
from latentrt.runtime.engines.split import unet_parts
from latentrt.runtime.models.clip import CLIPTextConfig, CLIPTextEncoder
from latentrt.runtime.models.unet import UNet, UNetConfig
from latentrt.runtime.models.unet_parts import PARTS
from latentrt.runtime.models.vae import VAEConfig, VAEDecoder, VAEEncoder
from torch import Tensor, nn

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [2, 4],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
    "scaling_factor": 0.13,
}
CLIP: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "eos_token_id": 59,
    "projection_dim": 16,
}


def component(
    name: str,
    make: Callable[[], nn.Module],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    example_sizes: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Component:
    """A component with random weights, none of them trivial; its fingerprint is that of the weights."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = make()
            for key, parameter in module.named_parameters():
                noise = torch.randn_like(parameter) * (0.2 if parameter.dim() < 2 else 0)
                with torch.no_grad():
                    parameter.add_(noise)
                assert parameter.abs().max() > 0, key
        return module.eval().requires_grad_(False).to(dtype)

    digest = hashlib.sha256(str(dtype).encode())
    for tensor in build().state_dict().values():
        digest.update(tensor.float().numpy().tobytes())
    return Component(name, build, dtype, inputs, outputs, digest.hexdigest(), example_sizes)


def named_inputs(component: Component, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """Example inputs as an engine takes them; sizes that are not given are the component's example."""
    drawn = example_inputs(component, {**component.example_sizes, **sizes}, seed)
    return {spec.name: x for spec, x in zip(component.inputs, drawn, strict=True)}


def unet(dtype: torch.dtype = torch.float32, config: Mapping[str, Any] = UNET, seed: int = 0) -> Component:
    f32, c = torch.float32, UNetConfig.from_dict(config)
    sized = c.addition_embed_type == "text_time"
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim if sized else 0
    guidance = (
        () if (dim := c.time_cond_proj_dim) is None else (TensorSpec("timestep_cond", ("batch", dim), dtype),)
    )
    whole = component(
        "unet",
        partial(UNet, c),
        (
            TensorSpec("sample", ("batch", c.in_channels, "height", "width"), dtype),
            TensorSpec("timestep", ("batch",), f32, Values(0, 1000)),
            TensorSpec("encoder_hidden_states", ("batch", "tokens", c.cross_attention_dim), dtype),
            *((TensorSpec("text_embeds", ("batch", pooled), dtype),) if sized else ()),
            *((TensorSpec("time_ids", ("batch", 6), f32, Values(0, 1024)),) if sized else ()),
            *guidance,
        ),
        (TensorSpec("out_sample", ("batch", c.out_channels, "height", "width"), dtype),),
        {"batch": 2, "height": 8, "width": 6, "tokens": 77},
        dtype,
        seed,
    )
    whole = replace(whole, config=config)
    return replace(whole, parts=lambda: unet_parts(whole, c, lambda name: PARTS[name](whole.build())))


def vae_decoder(dtype: torch.dtype = torch.float32, config: Mapping[str, Any] = VAE) -> Component:
    c = VAEConfig.from_dict(config)
    return component(
        "vae_decoder",
        partial(VAEDecoder, c),
        (TensorSpec("latents", ("batch", 4, "height", "width"), dtype),),
        (TensorSpec("image", ("batch", 3, "image_height", "image_width"), dtype),),
        {"batch": 2, "height": 8, "width": 6},
        dtype,
    )


def vae_encoder(dtype: torch.dtype = torch.float32, config: Mapping[str, Any] = VAE) -> Component:
    c = VAEConfig.from_dict(config)
    return component(
        "vae_encoder",
        partial(VAEEncoder, c),
        (TensorSpec("image", ("batch", 3, "image_height", "image_width"), dtype, Values(-1, 1)),),
        (TensorSpec("moments", ("batch", 8, "height", "width"), dtype),),
        {"batch": 2, "image_height": 16, "image_width": 32},
        dtype,
    )


def text_encoder(dtype: torch.dtype = torch.float32, normalize_sequence: bool = False) -> Component:
    c = CLIPTextConfig.from_dict(CLIP)
    return component(
        "text_encoder",
        lambda: CLIPTextEncoder(c, normalize_sequence=normalize_sequence),
        (
            TensorSpec("input_ids", ("batch", 77), torch.int64, Values(0, c.vocab_size, last=c.eos_token_id)),
            TensorSpec("layer", (), torch.int64, Values(0, c.num_hidden_layers + 1)),
        ),
        (
            TensorSpec("sequence", ("batch", 77, c.hidden_size), dtype),
            TensorSpec("pooled", ("batch", c.projection_dim or c.hidden_size), dtype),
        ),
        {"batch": 2},
        dtype,
    )


class Affine(nn.Module):
    """The smallest module worth exporting: x -> silu(x W + b), where exporting a UNet would add nothing."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.linear(x))


def affine(dtype: torch.dtype = torch.float32, seed: int = 0) -> Component:
    return component(
        "affine",
        Affine,
        (TensorSpec("x", ("batch", 4), dtype),),
        (TensorSpec("y", ("batch", 4), dtype),),
        {"batch": 2},
        dtype,
        seed,
    )
