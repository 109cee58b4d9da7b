"""A component written as ONNX and held against the PyTorch it came from, its weights in memory once."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.engines.base import Component
from .check import check_export, expected_outputs
from .onnx import to_model, write_model
from .passes import DEFAULT, Report

__all__ = ["export_checked"]


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
