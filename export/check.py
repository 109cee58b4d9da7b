"""What an exported model computes, held against the module it was traced from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError, ExportError
from ..runtime.engines.base import Component, example_inputs
from ..runtime.engines.onnxruntime import open_session, run_session

__all__ = ["LIMITS", "check_export", "relative_error"]

# Largest max|a - b| / max|b| over an output that passes. In float32 both sides differ by the order of their
# sums only, some 1e-6; in float16 PyTorch rounds after every operator, and ONNX Runtime computes in float32.
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2}


def check_export(
    component: Component, path: Path, *, module: nn.Module | None = None, seed: int = 0
) -> dict[str, Any]:
    """Run the model in ONNX Runtime on the CPU and compare it with PyTorch, on seeded inputs.

    At the sizes it was traced with, and at others: batch 1, and half as much again in every other dimension.

    Returns:
        The relative error of each output at each sizes, for the manifest. Empty for dtypes that ONNX Runtime
        cannot run on the CPU.

    Raises:
        ExportError: an error is beyond the limit of the component's dtype, or the model does not run.
    """
    limit = LIMITS.get(component.dtype)
    if limit is None:
        return {}
    module = component.build() if module is None else module
    cpu = torch.device("cpu")
    figures: dict[str, Any] = {}
    try:
        session = open_session(path, cpu)
        for sizes in _sizes(component):
            inputs = example_inputs(component, sizes, seed)
            with torch.inference_mode():
                result = module(*inputs)
            wanted = (result,) if isinstance(result, Tensor) else tuple(result)
            got = run_session(component, session, list(inputs), cpu)
            errors = {
                spec.name: relative_error(a, b)
                for spec, a, b in zip(component.outputs, got, wanted, strict=True)
            }
            figures[" ".join(f"{name}={size}" for name, size in sizes.items())] = errors
    except BackendError as error:
        raise ExportError(f"the export of {component.name} does not load: {error}") from error
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        raise ExportError(f"the export of {component.name} does not run: {error}") from error
    if not all(error <= limit for errors in figures.values() for error in errors.values()):
        raise ExportError(
            f"the export of {component.name} computes something else than PyTorch: "
            f"relative errors {figures}, limit {limit} in {component.dtype}"
        )
    return {"relative_error": figures, "limit": limit}


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|, in float64; infinite where the shapes differ, nan where either is not finite."""
    if a.shape != b.shape:
        return float("inf")
    wanted = b.double()
    return float((a.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _sizes(component: Component) -> list[Mapping[str, int]]:
    traced = dict(component.example_sizes)
    other = {name: 1 if name == "batch" else size * 3 // 2 for name, size in traced.items()}
    return [traced, other]
