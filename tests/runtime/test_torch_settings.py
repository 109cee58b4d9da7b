"""What a program tells PyTorch for its own tensors changes none of the pipeline's: default dtype, device, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_components as tiny
from helpers.tiny_requests import SEEDED_CALL
from latentrt import Pipeline
from latentrt.runtime.conditioning import guidance_scale_embedding
from latentrt.runtime.engines.base import Component
from latentrt.runtime.prepare import find_or_export_onnx
from latentrt.runtime.sampler import build_table
from latentrt.runtime.sampler_config import SamplerConfig
from latentrt.runtime.schedule import make_schedule
from torch import Tensor


@contextmanager
def told(what: str) -> Iterator[None]:
    """PyTorch as a program has set it."""
    dtype = torch.get_default_dtype()
    if what == "meta":
        torch.set_default_device(what)
    elif what != "autocast":
        torch.set_default_dtype(getattr(torch, what))
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


def rows(**config: Any) -> Tensor:
    return build_table(SamplerConfig.from_dict(config, "ddim"), 2).rows


anything = pytest.mark.parametrize("what", ["float64", "bfloat16", "meta", "autocast"])


@anything
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_picture_stays_as_it_is(what: str, backend: str, load: Callable[..., Pipeline]) -> None:
    def make() -> list[Any]:
        pipe, previews = load(backend=backend), []
        images = pipe(
            **SEEDED_CALL,
            previewer=pipe.fit_previewer(),
            callback_on_progress=lambda _, step, told: previews.append(told["preview"]),
        ).images
        encoded = pipe(
            **{**SEEDED_CALL, "output_type": "latent"}, image=torch.from_numpy(images).movedim(3, 1)
        ).images
        return [images, encoded, *previews]

    wanted = make()
    make_schedule.cache_clear()
    with told(what):
        got = make()
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize("what", ["float64", "bfloat16", "meta"])
def test_a_picture_in_tiles_stays_as_it_is(what: str, pipe: Pipeline) -> None:
    latents = torch.randn(1, 4, 20, 12, generator=torch.Generator().manual_seed(0))
    wanted = pipe.vae.decode(latents, tile=8)
    with told(what):
        got = pipe.vae.decode(latents, tile=8)
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


@anything
@pytest.mark.parametrize("component", [tiny.text_encoder(), tiny.vae_decoder()], ids=lambda c: c.name)
def test_an_export_stays_as_it_is(what: str, component: Component, tmp_path: Path) -> None:
    module = component.build()
    component = replace(component, build=lambda: module)
    wanted = find_or_export_onnx(component, cache_dir=tmp_path / "plain")
    with told(what):
        got = find_or_export_onnx(component, cache_dir=tmp_path / "told")
    for file in wanted.parent.glob("model*"):
        assert (got.parent / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("what", ["float64", "bfloat16", "meta"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: guidance_scale_embedding([7.5, 3.0], 16),
        rows,
        lambda: rows(beta_schedule="scaled_linear"),
        lambda: rows(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3),
    ],
    ids=["guidance", "linear", "scaled linear", "trained"],
)
def test_tables_stay_as_they_are(what: str, make: Callable[[], Tensor]) -> None:
    wanted = make()
    make_schedule.cache_clear()
    with told(what):
        got = make()
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)
