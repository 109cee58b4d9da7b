"""`runtime/loading.py`: weights that were replaced between the load of a checkpoint and their first use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt import Pipeline
from latentrt.errors import CheckpointError
from latentrt.export import check
from latentrt.runtime.cache import Store
from latentrt.runtime.cache_contents import contents
from latentrt.runtime.engines.split import in_parts
from latentrt.runtime.loading import load_components
from latentrt.runtime.prepare import find_or_export_onnx
from latentrt.runtime.weights import open_checkpoint
from safetensors.torch import load_file, save_file

Tiny = Callable[..., Path]

CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1, "output_type": "pt"}
CHANGED = "have changed since it was loaded; load the pipeline again"


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be changed."""
    return shutil.copytree(tiny("sdxl"), tmp_path / "model")


def retrained(file: Path) -> bytes:
    """The file with other numbers of the same names and shapes."""
    aside = file.with_suffix(".new")
    save_file({name: 0.9 * x for name, x in load_file(file).items()}, aside)
    data = aside.read_bytes()
    aside.unlink()
    return data


def replace_weights(folder: Path, component: str) -> None:
    for file in (folder / component).glob("*.safetensors"):
        aside = file.with_suffix(".new")
        aside.write_bytes(retrained(file))
        os.replace(aside, file)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_pipeline_does_not_take_other_weights_than_it_was_loaded_with(
    backend: str, folder: Path, tiny: Tiny, tmp_path: Path, shared_export_cache: Path
) -> None:
    cache = tmp_path / "cache"
    pipe = Pipeline.from_pretrained(folder, backend=backend, cache_dir=cache)
    replace_weights(folder, "unet")
    with pytest.raises(CheckpointError, match=f"unet of {folder}.*{CHANGED}"):
        pipe("a cat", **CALL)
    assert "unet" not in [entry.description["name"] for entry in contents(Store(cache))]
    original = {"backend": backend, "dtype": "float32"}
    picture = Pipeline.from_pretrained(tiny("sdxl"), **original, cache_dir=cache)("a cat", **CALL).images
    expected = Pipeline.from_pretrained(tiny("sdxl"), **original, cache_dir=shared_export_cache)
    assert torch.equal(picture, expected("a cat", **CALL).images)


def test_no_network_is_built_from_other_weights(folder: Path, tmp_path: Path) -> None:
    """Nor are the parts of a UNet, of which engines are made."""
    found = load_components(open_checkpoint(folder, cache_dir=tmp_path / "cache"), torch.float32)
    networks = [part for component in found.values() for part in (component, *in_parts(component))]
    assert len(networks) > len(found) > 4
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        replace_weights(folder, name)
    for network in networks:
        with pytest.raises(CheckpointError, match=CHANGED):
            network.build()


def test_weights_that_change_during_an_export_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written over in place: the parameters are views of the file."""
    component = load_components(open_checkpoint(folder, cache_dir=tmp_path), torch.float32)["vae_decoder"]
    write_model = check.write_model

    def late(*arguments: Any) -> None:
        (file,) = (folder / "vae").glob("*.safetensors")
        file.write_bytes(retrained(file))
        write_model(*arguments)

    monkeypatch.setattr(check, "write_model", late)
    with pytest.raises(CheckpointError, match=CHANGED):
        find_or_export_onnx(component, cache_dir=tmp_path)
    assert contents(Store(tmp_path)) == []


def test_weights_that_were_only_touched_are_the_same(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, backend="eager", cache_dir=tmp_path)
    for file in folder.rglob("*.safetensors"):
        os.utime(file)
    assert pipe("a cat", **CALL).images.isfinite().all()
