"""Writes checkpoints with random weights, at any size, for machines without the published ones.

They are written one tensor at a time, in float16, so that no more than the largest tensor is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.models.clip import CLIPTextConfig, CLIPTextEncoder
from ..runtime.models.unet import UNet, UNetConfig
from ..runtime.models.vae import VAEConfig, VAEDecoder, VAEEncoder
from ..runtime.tokenizer_files import clip_merges, clip_vocabulary
from .machine import ROOT

__all__ = ["PUBLISHED", "component_bytes", "write_checkpoint", "write_weights"]

PUBLISHED = ROOT / "runtime" / "data"
"""Folders with the configurations of published checkpoints: `sdxl_base`, `sdxl_refiner`, `sd15`, `sd21`."""

_WEIGHTS = {
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def component_bytes(configs: Path) -> dict[str, int]:
    """Component (its folder's name) -> bytes of its weights in float16.

    Args:
        configs: a diffusers folder; only its configurations are read.
    """
    return {name: 2 * sum(s.numel() for s in shapes.values()) for name, shapes in _shapes(configs).items()}


def write_checkpoint(
    folder: Path,
    configs: Path,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    device: torch.device | None = None,
) -> Path:
    """Write a checkpoint with the configurations of another one and random weights, from a fixed seed.

    Components that two checkpoints share get the same weights, such as the second text encoder and the VAE of base and
    refiner. If `folder` exists, nothing is written.

    Args:
        folder: to write; it appears only when it is complete.
        configs: a diffusers folder, which needs no weights and no tokenizer's tables.
        changes: component -> fields of its configuration to replace.
        device: on which weights are drawn, see `write_weights`.

    Returns:
        `folder`.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    # An earlier run may have been killed while it wrote.
    shutil.rmtree(partial, ignore_errors=True)
    weights = shutil.ignore_patterns("*.safetensors", "*.bin")
    shutil.copytree(configs, partial, ignore=weights)
    for tokenizer in partial.glob("tokenizer*"):
        _write_tokenizer(tokenizer)
    for name, fields in (changes or {}).items():
        file = partial / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **fields}, indent=2) + "\n")
    for name, shapes in _shapes(partial).items():
        write_weights(partial / name / _WEIGHTS[name], shapes, device)
    partial.rename(folder)
    return folder


def write_weights(file: Path, shapes: Mapping[str, torch.Size], device: torch.device | None = None) -> None:
    """Write random float16 weights of these names and shapes as a safetensors file.

    Weights preserve the variance of their inputs, norms' weights are 1 and biases 0, so that a forward in float16
    stays finite. The seed is fixed: on one kind of device the weights are always the same, on another one they differ.

    Args:
        device: on which they are drawn, the CPU if None. For SDXL a GPU takes seconds, not minutes.
    """
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    device = device or torch.device("cpu")
    random = torch.Generator(device).manual_seed(0)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for key, shape in shapes.items():
            if len(shape) > 1:
                tensor = torch.randn(shape, generator=random, device=device).div_(shape[1:].numel() ** 0.5)
            else:
                tensor = torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
            stream.write(tensor.half().cpu().numpy().data)
    if device.type == "cuda":
        # Memory that this process keeps would be missing to the sides that are measured.
        torch.cuda.empty_cache()


def _shapes(configs: Path) -> dict[str, dict[str, torch.Size]]:
    """Component -> key -> shape, for every component that has a configuration."""
    shapes_by_component = {}
    for name in _WEIGHTS:
        file = configs / name / "config.json"
        if file.is_file():
            with torch.device("meta"):
                modules = _modules(name, json.loads(file.read_text("utf-8")))
            shapes_by_component[name] = {
                key: t.shape for module in modules for key, t in module.state_dict().items()
            }
    return shapes_by_component


def _modules(name: str, config: Mapping[str, Any]) -> tuple[nn.Module, ...]:
    if name == "unet":
        return (UNet(UNetConfig.from_dict(config)),)
    if name == "vae":
        vae = VAEConfig.from_dict(config)
        return VAEEncoder(vae), VAEDecoder(vae)
    # Which layer's output is used makes no difference to the weights.
    return (CLIPTextEncoder(CLIPTextConfig.from_dict(config), normalize_sequence=False),)


def _write_tokenizer(folder: Path) -> None:
    """Write CLIP's tables, unless there are any."""
    if (folder / "vocab.json").exists():
        return
    merges = clip_merges()
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(merges)), "utf-8")
    (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in merges), "utf-8")
