"""`bench/latentrt_side.py`: how latentrt is set up as a side, and its eager modules in diffusers' place."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentrt.bench import latentrt_side
from latentrt.bench.cases import Case, sides_named
from latentrt.bench.gates import likeness
from latentrt.bench.latentrt_side import LatentrtSide
from latentrt.bench.side import factory
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.parts import load_parts


@pytest.mark.parametrize(
    ("place", "there", "dtype"),
    [
        ("cuda", False, torch.bfloat16),
        ("cuda", True, torch.float32),
        ("cpu", False, torch.float32),
    ],
)
def test_the_eager_reference_decodes_as_triton_does_where_diffusers_is_not_there(
    place: str, there: bool, dtype: torch.dtype, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 its decoder would flatter every speedup."""
    monkeypatch.setattr(
        latentrt_side, "load_parts", lambda *args, **how: load_parts(*args, **{**how, "device": "cpu"})
    )
    monkeypatch.setattr("latentrt.bench.cases.find_spec", lambda name: object() if there else None)
    made = {}
    for name in ("latentrt-eager", "latentrt-eager@float32"):
        (spec,) = sides_named([name])
        exact = torch.float32 if spec.dtype else torch.float16
        made[name] = factory(spec)(case, torch.device(place), exact, tmp_path, **spec.options)
    half, exact = made.values()
    assert (half._pipe.vae.dtype, exact._pipe.vae.dtype) == (dtype, torch.float32)
    assert f"VAE in {str(dtype).removeprefix('torch.')}" in half.settings
    assert EagerBackend.upcast == torch.float32  # of any other pipeline
    images = half(["a cat"], [3]).images
    assert np.isfinite(images).all()


@pytest.mark.parametrize(
    ("backend", "place", "tries"),
    [
        ("triton", "cuda", True),
        ("eager", "cuda", True),
        ("tensorrt", "cuda", False),
        ("triton", "cpu", False),
    ],
)
def test_convolutions_of_pytorch_are_set_up_alike_on_both_sides(
    backend: str, place: str, tries: bool, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    vae = SimpleNamespace(dtype=torch.float16)
    pipe: Any = SimpleNamespace(backend=backend, device=torch.device(place), vae=vae)
    side = LatentrtSide(case, pipe)
    assert torch.backends.cudnn.benchmark is tries
    assert ("cudnn.benchmark" in side.settings) is tries


def test_latentrts_eager_modules_run_as_diffusers_does(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand in for it: without CUDA graphs, which are the default on a GPU, and in the quicker layout, without
    the other one's weights."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        latentrt_side,
        "load_parts",
        lambda *args, **options: asked.update(options) or load_parts(*args, **options),
    )
    (spec,) = sides_named(["latentrt-eager"])
    side: Any = factory(spec)(case, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
    assert asked["graphs"] is False
    vae = SimpleNamespace(dtype=torch.float16)
    on_gpu: Any = SimpleNamespace(backend="eager", device=torch.device("cuda"), vae=vae)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert type(side)(case, on_gpu).settings.endswith(", no CUDA graphs")

    before = side(["a cat"], [3]).images
    seen: list[Any] = []

    def weight() -> torch.Tensor:
        engines = [lazy.load() for lazy in side._pipe._loader._engines if lazy.component.name == "unet"]
        assert len(engines) == 2  # base and refiner
        return engines[0]._module.conv_in.weight

    def seconds(place: torch.device) -> float:
        seen.append(weight().is_contiguous(memory_format=torch.channels_last))
        return time.perf_counter() + 1000 * (not seen[-1])

    monkeypatch.setattr("latentrt.bench.side.now", seconds)
    side.tune()
    assert seen == [False] * 3 + [True] * 3
    assert weight().is_contiguous(memory_format=torch.channels_last)
    assert side.settings.endswith(", channels_last")
    assert side._pipe.backend == "eager"
    assert likeness(side(["a cat"], [3]).images, before)[0] > 100
