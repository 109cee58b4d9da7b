"""A checkpoint of a single small net, whose files a test can spoil."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.tiny_checkpoints import write_json


class Net(nn.Module):
    """A convolution and a norm: enough to go wrong in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 1)
        self.norm = nn.LayerNorm(6)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


STATE = {key: torch.randn(value.shape) for key, value in Net().state_dict().items()}


def folder_with(path: Path, files: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """A checkpoint whose UNet folder has these safetensors files."""
    write_json(path / "model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]})
    write_json(path / "unet" / "config.json", {})
    for name, state in files.items():
        save_file(dict(state), path / "unet" / name)
    return path
