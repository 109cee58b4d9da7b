"""Published sizes, without weights: key for key and shape for shape what diffusers and transformers build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.published_configs import SD15_UNET, SD15_VAE, SD21_TEXT_ENCODER, SD21_UNET, sdxl
from latentrt.runtime.models.clip import CLIPTextConfig, CLIPTextEncoder, rename_clip_keys
from latentrt.runtime.models.unet import UNet, UNetConfig
from latentrt.runtime.models.vae import VAEConfig, VAEDecoder, VAEEncoder
from torch import Tensor, nn
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

Shapes = dict[str, tuple[int, ...]]


def shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def nothing_computed(module: nn.Module) -> None:
    """Built on meta and filled by assignment: a tensor made along the way would stay on meta."""
    assert not list(module.buffers())
    assert all(p.device.type == "meta" for p in module.parameters())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (sdxl("base", "unet"), 2_567_463_684),
        (sdxl("refiner", "unet"), 2_259_526_660),
        (SD15_UNET, 859_520_964),
        (SD21_UNET, 865_910_724),
    ],
    ids=["SDXL base", "SDXL refiner", "SD 1.5", "SD 2.1"],
)
def test_unet(config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(config))
        theirs = UNet2DConditionModel.from_config(config)
    nothing_computed(ours)
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert parameters(ours) == count


@pytest.mark.parametrize("config", [sdxl("base", "vae"), SD15_VAE], ids=["SDXL", "SD 1.5"])
def test_vae(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        encoder, decoder = (half(VAEConfig.from_dict(config)) for half in (VAEEncoder, VAEDecoder))
        theirs = AutoencoderKL.from_config(config)
    nothing_computed(encoder)
    nothing_computed(decoder)
    ours = shapes(encoder.state_dict()) | shapes(decoder.state_dict())
    assert ours == shapes(theirs.state_dict())
    assert parameters(encoder, decoder) == 83_653_863


@pytest.mark.parametrize(
    ("config", "model", "count"),
    [
        (sdxl("base", "text_encoder"), CLIPTextModel, 123_060_480),
        (sdxl("base", "text_encoder_2"), CLIPTextModelWithProjection, 694_659_840),
        (SD21_TEXT_ENCODER, CLIPTextModel, 340_387_840),
    ],
    ids=["CLIP-L", "OpenCLIP bigG", "OpenCLIP H"],
)
def test_text_encoder(config: dict[str, Any], model: Any, count: int) -> None:
    with torch.device("meta"):
        ours = CLIPTextEncoder(CLIPTextConfig.from_dict(config), normalize_sequence=False)
        theirs = model(TheirConfig(**config))
    nothing_computed(ours)
    renamed = {rename_clip_keys(key): shape for key, shape in shapes(theirs.state_dict()).items()}
    assert shapes(ours.state_dict()) == renamed
    assert parameters(ours) == count
