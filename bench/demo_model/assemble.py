"""Write what was trained as diffusers lays out a pipeline: `out/demo`, with the refiner in `out/demo/refiner`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from .tokenizer import DEMO

VERSION = "0.36.0"  # the oldest diffusers these folders are meant for
BASE_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": VERSION,
    "feature_extractor": [None, None],
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
REFINER_INDEX = {
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "_diffusers_version": VERSION,
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the present weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    _write_json(
        folder / "config.json",
        {"_class_name": "UNet2DConditionModel", "_diffusers_version": VERSION, **config},
    )
    state = {k: v.detach().half().contiguous().cpu() for k, v in unet.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_pipelines(out: Path, scheduler: dict[str, Any]) -> None:
    """Gather the stages' folders into `out/demo`; what is not trained yet is left out."""
    demo = out / "demo"
    refiner = demo / "refiner"
    for name in ("tokenizer", "tokenizer_2"):
        if demo.resolve() != DEMO.resolve():
            shutil.copytree(DEMO / name, demo / name, dirs_exist_ok=True)
    for name in ("text_encoder", "text_encoder_2", "unet", "image_tower"):
        if (out / name).exists():
            shutil.copytree(out / name, demo / name, dirs_exist_ok=True)
    _copy_vae(out / "vae", demo / "vae")
    scheduler = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": VERSION, **scheduler}
    _write_json(demo / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(demo / "model_index.json", BASE_INDEX)
    if (out / "refiner_unet").exists():
        shutil.copytree(out / "refiner_unet", refiner / "unet", dirs_exist_ok=True)
        _write_json(refiner / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(refiner / "model_index.json", REFINER_INDEX)


def _copy_vae(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "_name_or_path"} | {"_diffusers_version": VERSION}
    _write_json(target / "config.json", config)
    state = load_file(source / "diffusion_pytorch_model.safetensors")
    save_file(
        {k: v.half() for k, v in state.items()},
        target / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
