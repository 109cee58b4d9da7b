"""`runtime/parts.py`, `weights.py` and `cache.py`: relative paths are those of the working directory at the load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt import Pipeline
from latentrt.runtime.cache import cache_root
from safetensors.torch import load_file, save_file

Tiny = Callable[..., Path]

CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 5, "seed": 1, "output_type": "pt"}


@pytest.fixture
def here(tmp_path: Path, tiny: Tiny) -> Path:
    """A folder with a base and a refiner."""
    for kind in ("sdxl", "refiner"):
        shutil.copytree(tiny(kind), tmp_path / "here" / kind)
    return tmp_path / "here"


@pytest.fixture
def elsewhere(tmp_path: Path, here: Path) -> Path:
    """Another one, whose models of the same names have other weights."""
    folder = shutil.copytree(here, tmp_path / "elsewhere")
    for file in folder.rglob("*.safetensors"):
        save_file({name: 0.9 * x for name, x in load_file(file).items()}, file)
    return folder


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.parametrize("given", ["cache_dir", "LATENTRT_CACHE"])
def test_a_loaded_pipeline_stays_what_it_is(
    backend: str, given: str, here: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_below(elsewhere)
    cache = {"cache_dir": "cache"} if given == "cache_dir" else {}
    if given == "LATENTRT_CACHE":
        monkeypatch.setenv("LATENTRT_CACHE", "cache")
    monkeypatch.chdir(here)
    (here / "link").symlink_to("refiner")
    pipe = Pipeline.from_pretrained("sdxl", "link", backend=backend, **cache)
    monkeypatch.chdir(elsewhere)
    made = pipe("a cat", **CALL)
    assert files_below(elsewhere) == before
    assert (made.parameters[0]["model"], made.parameters[0]["refiner"]) == ("sdxl", "refiner")
    same = Pipeline.from_pretrained(
        here / "sdxl", here / "refiner", backend=backend, cache_dir=here / "cache"
    )
    assert torch.equal(made.images, same("a cat", **CALL).images)
    if backend == "onnxruntime":
        assert (here / "cache" / "entries").is_dir()


def test_a_link_to_the_cache_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to("cache")
    monkeypatch.chdir(tmp_path)
    assert cache_root("link") == tmp_path / "link"
