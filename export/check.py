"""A component written as ONNX, and what the model computes held against the module it was traced from."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError, ExportError
from ..runtime.engines.base import Component, example_inputs
from ..runtime.engines.onnxruntime import open_session, run_session
from .measures import relative_error
from .onnx import to_model, write_model
from .passes import DEFAULT, Report

__all__ = ["LIMITS", "Expected", "check_export", "expected_outputs", "export_checked"]

# Largest max|a - b| / max|b| over an output that passes. In float32 both sides differ by the order of their
# sums only, some 1e-6; in float16 PyTorch rounds after every operator, and ONNX Runtime computes in float32.
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3}


@dataclass(frozen=True)
class Expected:
    """What the module makes of example inputs of these sizes."""

    sizes: Mapping[str, int]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def export_checked(
    component: Component, path: Path, passes: Sequence[str] = DEFAULT
) -> tuple[list[Report], dict[str, Any]]:
    """Write a component to `path`, with its weights beside it, and compare it with PyTorch.

    Returns:
        What each pass did, and the figures of the check: see `check_export`.

    Raises:
        ExportError: it cannot be exported, or the export computes something else.
        CheckpointError: its weights were replaced since the checkpoint was loaded.
        OSError: the files cannot be written.
    """
    module = component.build()
    model, reports = to_model(component, module, passes)
    write_model(component, model, path)
    expected = expected_outputs(component, module)
    if component.check_weights is not None:
        component.check_weights()
    # The module goes before ONNX Runtime comes, so that the weights are in memory once. The traced program refers to
    # itself, hence the collector.
    del module, model
    gc.collect()
    return reports, check_export(component, path, expected)


def expected_outputs(component: Component, module: nn.Module) -> list[Expected]:
    """Run the module on seeded inputs, at the sizes it is traced with and at others.

    The others are batch 1, and half as much again in every other dimension. Convolutions in float16 are computed in
    float32 and rounded, as a GPU does: PyTorch's own on the CPU take minutes for a VAE.
    """
    traced = dict(component.example_sizes)
    other = {name: 1 if name == "batch" else size * 3 // 2 for name, size in traced.items()}
    expected = []
    for sizes in (traced, other):
        inputs = example_inputs(component, sizes)
        with torch.inference_mode(), _wide_convolutions(module):
            result = module(*inputs)
        expected.append(Expected(sizes, inputs, (result,) if isinstance(result, Tensor) else tuple(result)))
    return expected


@contextmanager
def _wide_convolutions(module: nn.Module) -> Iterator[None]:
    """Convolutions in half precision computed in float32, one at a time; what they take and give stays as it is."""

    def widened(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            bias = None if conv.bias is None else conv.bias.float()
            out: Tensor = conv._conv_forward(x.float(), conv.weight.float(), bias)
            return out.to(x.dtype)

        return forward

    changed = [
        m
        for m in module.modules()
        if isinstance(m, nn.Conv2d) and any(p.dtype == torch.float16 for p in m.parameters())
    ]
    for conv in changed:
        conv.forward = widened(conv)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for conv in changed:
            del conv.forward


def check_export(component: Component, path: Path, expected: Sequence[Expected]) -> dict[str, Any]:
    """Run the model in ONNX Runtime on the CPU and compare it with what its module made of the same inputs.

    Returns:
        The relative error of each output at each of the sizes, for the manifest. Empty for dtypes that ONNX
        Runtime cannot run on the CPU.

    Raises:
        ExportError: an error is beyond the limit of the component's dtype, or the model does not run.
    """
    cpu = torch.device("cpu")
    if component.dtype not in LIMITS:
        return {}
    try:
        # As it was written: a session that optimises it would hold the weights of a full-size UNet three times.
        session = open_session(path, cpu, optimized=False)
    except BackendError as error:
        raise ExportError(f"the export of {component.name} does not load: {error}") from error
    limit = LIMITS[component.dtype]
    figures: dict[str, dict[str, float]] = {}
    for case in expected:
        try:
            got = run_session(component, session, list(case.inputs), cpu)
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise ExportError(f"the export of {component.name} does not run: {error}") from error
        figures[" ".join(f"{name}={size}" for name, size in case.sizes.items())] = {
            spec.name: relative_error(a, b)
            for spec, a, b in zip(component.outputs, got, case.outputs, strict=True)
        }
    if not all(error <= limit for errors in figures.values() for error in errors.values()):
        raise ExportError(
            f"the export of {component.name} computes something else than PyTorch: "
            f"relative errors {figures}, limit {limit} in {component.dtype}"
        )
    reference = "PyTorch" if component.dtype == torch.float32 else "PyTorch, its convolutions in float32"
    return {"relative_error": figures, "limit": limit, "reference": reference}
