"""`runtime/parts.py`: parts as `from_pretrained` asks for them, and what only `load_parts` takes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latentrt
import pytest
import torch
from latentrt.errors import RequestError
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.parts import load_parts

Tiny = Callable[..., Path]


def test_parts_are_loaded_by_the_arguments_of_from_pretrained() -> None:
    """Which passes all of them on: with these defaults, and none besides."""
    taken = dict(inspect.signature(load_parts).parameters)
    del taken["upcast"]
    assert taken == dict(inspect.signature(latentrt.Pipeline.from_pretrained).parameters)


@pytest.mark.parametrize(
    ("dtype", "upcast", "runs_in"),
    [
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float16, None, torch.float32),
        # Where nothing overflows, nothing is upcast.
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_a_vae_that_overflows_in_float16_runs_in_the_dtype_asked_for(
    dtype: torch.dtype, upcast: torch.dtype | None, runs_in: torch.dtype, tiny: Tiny
) -> None:
    parts = load_parts(tiny("sdxl"), backend="eager", dtype=dtype, device="cpu", upcast=upcast)
    assert parts.vae.dtype == runs_in
    assert {engine.component.dtype for engine in (parts.vae.decoder, parts.vae.encoder)} == {runs_in}
    assert parts.base.unet.component.dtype == dtype


def test_an_upcast_is_of_one_pipeline_alone(tiny: Tiny) -> None:
    """Loaded before or after it, others have their back end's."""
    how = {"backend": "eager", "dtype": torch.float16, "device": "cpu"}
    before = latentrt.Pipeline.from_pretrained(tiny("sdxl"), **how)
    asked = latentrt.Pipeline(load_parts(tiny("sdxl"), **how, upcast=torch.bfloat16))
    after = latentrt.Pipeline.from_pretrained(tiny("sdxl"), **how)
    found = [pipe.vae.dtype for pipe in (before, asked, after)]
    assert found == [torch.float32, torch.bfloat16, torch.float32]
    assert (
        asked("a cat", num_inference_steps=1, height=16, width=16, seed=0, output_type="pt")
        .images.isfinite()
        .all()
    )
    assert EagerBackend.upcast == asked._loader.backend.upcast == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [
        *({"model": value} for value in (None, 5, b"demo")),
        *({name: 5} for name in ("refiner", "cache_dir", "variant", "revision")),
        {"variant": Path("fp16")},
    ],
    ids=str,
)
def test_what_is_no_name_or_path_is_refused_by_its_own(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(RequestError, match=re.escape(f"{name} is {value!r}; it must be a str")):
        latentrt.Pipeline.from_pretrained(**{"model": "demo", **arguments})
