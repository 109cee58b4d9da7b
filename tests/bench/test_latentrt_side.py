"""`bench/latentrt_side.py`: how latentrt is set up as a side, and its eager modules in diffusers' place."""

from __future__ import annotations

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
from latentrt.bench.monitor import Span
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
    seen: list[tuple[bool, bool]] = []

    def channels_last(name: str, count: int) -> bool:
        engines = [e.load() for e in side._pipe._loader._engines if e.component.name == name]
        assert len(engines) == count
        found = {
            weight.is_contiguous(memory_format=torch.channels_last)
            for engine in engines
            for weight in engine._module.parameters()
            if weight.ndim == 4 and weight.shape[1:] == (4, 3, 3)
        }
        (last,) = found
        return last

    def spans(*_: Any) -> list[Span]:
        """The UNets are quicker in channels_last, the VAE is slower."""
        unet, vae = channels_last("unet", 2), channels_last("vae_decoder", 1)
        seen.append((unet, vae))
        return [Span("refiner", 0, 0.20 - 0.01 * unet), Span("decode", 0, 0.20 + 0.10 * vae)]

    with monkeypatch.context() as patch:
        patch.setattr(latentrt_side, "_spans", spans)
        side.tune()
    assert seen == [(False, False)] * 3 + [(True, True)] * 3
    assert side.settings.endswith(", UNet channels_last, VAE contiguous")
    assert side._pipe.backend == "eager"
    assert likeness(side(["a cat"], [3]).images, before)[0] > 100
    assert (channels_last("unet", 2), channels_last("vae_decoder", 1)) == (True, False)
