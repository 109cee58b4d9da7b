"""`runtime/weights.py` and `loading.py`: checkpoints that a pipeline does not load, and what the message says: the
value, and what to do instead."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.tiny_checkpoints import write_json
from latentrt.errors import (
    CacheError,
    CheckpointError,
    CheckpointNotFoundError,
    UnsafeWeightsError,
    UnsupportedConfigError,
)

SMALL: dict[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "output_type": "np"}


def linked(source: Path, target: Path, *, without: str) -> Path:
    """A copy of a checkpoint whose folders are links, but for one that is to be spoilt."""
    target.mkdir()
    for part in source.iterdir():
        if part.name == without:
            shutil.copytree(part, target / part.name)
        elif part.is_dir():
            (target / part.name).symlink_to(part, target_is_directory=True)
        else:
            shutil.copy(part, target / part.name)
    return target


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("model", ["no/such-model", "/no/such/folder", "", "a b c", "~nobody_of_that_name/x"])
def test_unknown_models(model: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=f"{model!r} is not a local folder or file"):
        latentrt.Pipeline.from_pretrained(model)


def test_an_unknown_refiner(tiny: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointNotFoundError, match="'/no/refiner' is not a local folder or file"):
        latentrt.Pipeline.from_pretrained(tiny("sdxl"), "/no/refiner", backend="eager")


def test_an_inpainting_model_is_not_run_as_another(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = linked(tiny("sdxl"), tmp_path / "inpainting", without="unet")
    file = folder / "unet" / "config.json"
    write_json(file, {**json.loads(file.read_text("utf-8")), "in_channels": 9})
    for pair in ((folder, None), (tiny("sdxl"), folder)):
        with pytest.raises(UnsupportedConfigError, match=r"inpainting reads 9 channels .* latents have 4"):
            latentrt.Pipeline.from_pretrained(*pair, backend="eager")


def test_a_refiner_of_another_family(tiny: Callable[..., Path]) -> None:
    """Its latents have the same shape and mean something else."""
    with pytest.raises(CheckpointError, match="are not of one family; a refiner works on its base's latents"):
        latentrt.Pipeline.from_pretrained(tiny("sdxl"), tiny("sd15"), backend="eager")


def test_a_truncated_file_is_named(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = linked(tiny("sdxl"), tmp_path / "cut", without="unet")
    file = weights_of(folder / "unet")
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=f"{file.name}.*(cut|truncat|incomplete|short)"):
        latentrt.Pipeline.from_pretrained(folder, backend="eager")("a cat", **SMALL)


def test_pickles_are_refused(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = linked(tiny("sdxl"), tmp_path / "pickled", without="vae")
    weights_of(folder / "vae").unlink()
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeWeightsError, match=r"diffusion_pytorch_model\.bin"):
        latentrt.Pipeline.from_pretrained(folder, backend="eager")("a cat", **SMALL)


def test_a_scheduler_that_is_not_there_yet_is_named(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = linked(tiny("sdxl"), tmp_path / "heun", without="scheduler")
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "HeunDiscreteScheduler"})
    pipe = latentrt.Pipeline.from_pretrained(folder, backend="eager")
    with pytest.raises(UnsupportedConfigError, match=r"'HeunDiscreteScheduler'; latentrt has .* sampler="):
        pipe("a cat", **SMALL)
    assert np.isfinite(pipe("a cat", **SMALL, sampler="euler").images).all()


def test_fields_of_a_scheduler_that_is_not_there_can_be_given(
    tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    """For the sampler that takes its place."""
    folder = linked(tiny("sdxl"), tmp_path / "heun", without="scheduler")
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "HeunDiscreteScheduler"})
    pipe = latentrt.Pipeline.from_pretrained(
        folder, backend="eager", scheduler={"timestep_spacing": "trailing"}
    )
    made = pipe("a cat", **SMALL, sampler="euler")
    assert made.parameters[0]["timestep_spacing"] == "trailing"
    with pytest.raises(UnsupportedConfigError, match=r"'HeunDiscreteScheduler'"):
        pipe("a cat", **SMALL)


def test_a_user_without_a_home(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(Path, "expanduser", nowhere)
    monkeypatch.delenv("LATENTRT_CACHE", raising=False)
    with pytest.raises(CacheError, match="no home folder; set LATENTRT_CACHE or cache_dir"):
        latentrt.Pipeline.from_pretrained(tiny("sdxl"), backend="eager")


def test_a_tokenizer_of_another_model(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    folder = linked(tiny("sdxl"), tmp_path / "large", without="tokenizer_2")
    file = folder / "tokenizer_2" / "vocab.json"
    write_json(file, {**json.loads(file.read_text("utf-8")), "extra": 49_407})
    with pytest.raises(
        CheckpointError, match=r"tokenizer of text_encoder_2 has ids up to 49407 .* 1514 tokens"
    ):
        latentrt.Pipeline.from_pretrained(folder, backend="eager")
