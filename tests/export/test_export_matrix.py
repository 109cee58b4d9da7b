"""`export/check.py` and `build_process.py`: every model, precision and form of UNet: exported, held against PyTorch on
ONNX Runtime, built by TensorRT for RTX.

`make test` does those of tests/export/test_export_demo.py and tests/export/test_demo_engines.py; here is the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from latentrt.export.build_process import build_in_child
from latentrt.export.folder import export_model
from latentrt.export.tensorrt import EngineRequest
from tolerances import EXPORT_FLOAT16, EXPORT_FLOAT32

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

LIMITS = {"float32": EXPORT_FLOAT32, "float16": EXPORT_FLOAT16}

# Smallest, best and largest of every named dimension; in latents, and pixels where an image is named.
SIZES = {"batch": (1, 2, 4), "height": (8, 16, 24), "width": (8, 16, 24)}
IMAGE = {f"image_{side}": (64, 128, 192) for side in ("height", "width")}


def profile(path: Path) -> dict[str, list[list[int]]]:
    """Shapes of a model's inputs."""
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {**SIZES, **IMAGE}
    return {
        value.name: [
            [sizes[d.dim_param][k] if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
            for k in range(3)
        ]
        for value in graph.input
    }


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["demo", "demo-refiner", "sd15", "sd21"])
def test_every_combination(
    model: str, dtype: torch.dtype, split: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = model if model.startswith("demo") else str(tiny(model))
    names = ["unet"] if split else []
    exported = list(export_model(source, tmp_path, dtype=dtype, components=names, split=split))
    assert len(exported) == (3 if split else {"demo": 5, "demo-refiner": 4}.get(model, 4))
    for made in exported:
        if made.dtype == "bfloat16":  # which ONNX Runtime cannot run on the CPU
            assert made.check == {}
        else:
            errors = [e for case in made.check["relative_error"].values() for e in case.values()]
            assert len(errors) >= 2
            assert max(errors) < LIMITS[made.dtype]
        onnx.checker.check_model(made.file, full_check=True)
        plan = made.file.with_suffix(".plan")
        figures = build_in_child(
            EngineRequest(
                made.component, "tensorrt-rtx", str(made.file), str(plan), (profile(made.file),), (89,)
            )
        )
        assert plan.stat().st_size == figures["engine_bytes"] > 5_000
        assert figures["layers"] > 5
