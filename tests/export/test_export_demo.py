"""`export/check.py`: the demo checkpoint's components, base and refiner, in every precision.

Every export was checked when it was made: by onnx.checker, and on ONNX Runtime against PyTorch in the same precision,
at two sizes. What that found is in the manifest.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from latentrt.export.measures import relative_error
from latentrt.runtime.engines.base import Component, example_inputs
from latentrt.runtime.engines.onnxruntime import open_session, run_session
from latentrt.runtime.loading import load_components
from latentrt.runtime.prepare import find_or_export_onnx
from latentrt.runtime.weights import open_checkpoint
from tolerances import EXPORT_FLOAT16, EXPORT_FLOAT32

NAMES = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
CPU = torch.device("cpu")

# The others are as the base's: text encoders of the same shape, and a VAE that stays in float32 beside float16.
ALWAYS = [
    *(("demo", name, torch.float32) for name in NAMES),
    ("demo-refiner", "unet", torch.float32),
    ("demo", "text_encoder_2", torch.float16),
    ("demo", "unet", torch.float16),
    ("demo", "unet", torch.bfloat16),
    ("demo", "vae_decoder", torch.bfloat16),
]
REST = [
    ("demo", "text_encoder", torch.float16),
    ("demo-refiner", "unet", torch.float16),
    ("demo", "text_encoder", torch.bfloat16),
    ("demo", "text_encoder_2", torch.bfloat16),
    ("demo", "vae_encoder", torch.bfloat16),
    ("demo-refiner", "unet", torch.bfloat16),
]


def find(model: str, name: str, dtype: torch.dtype) -> Component:
    return load_components(open_checkpoint(model), dtype)[name]


@pytest.mark.parametrize(
    ("model", "name", "dtype"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_components(shared_export_cache: Path, model: str, name: str, dtype: torch.dtype) -> None:
    path = find_or_export_onnx(find(model, name, dtype), cache_dir=shared_export_cache)
    figures = json.loads((path.parent / "manifest.json").read_text())["figures"]
    if dtype == torch.bfloat16:  # which ONNX Runtime cannot run on the CPU
        assert figures == {}
        onnx.checker.check_model(path, full_check=True)
        return
    limit = EXPORT_FLOAT32 if dtype == torch.float32 else EXPORT_FLOAT16
    found = [error for errors in figures["relative_error"].values() for error in errors.values()]
    assert len(found) >= 2
    assert max(found) < limit == figures["limit"]


def test_half_precision_is_close_to_single(shared_export_cache: Path) -> None:
    """The float16 export against PyTorch in float32, which rounds nowhere."""
    half = find("demo", "unet", torch.float16)
    sizes = {"batch": 2, "height": 16, "width": 16}
    inputs = example_inputs(half, sizes)
    session = open_session(find_or_export_onnx(half, cache_dir=shared_export_cache), CPU)
    (got,) = run_session(half, session, list(inputs), CPU)
    with torch.inference_mode():
        wanted = find("demo", "unet", torch.float32).build()(*(x.float() for x in inputs))
    assert relative_error(got, wanted) < EXPORT_FLOAT16
