"""Export: components written as ONNX and checked against the PyTorch they came from."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.engines.base import Component

__all__ = ["export_checked"]


def export_checked(component: Component, path: Path) -> dict[str, Any]:
    """Write a component to `path` as ONNX, with its weights beside it, and hold it against PyTorch.

    Returns:
        The figures of the check: see `check_export`.

    Raises:
        ExportError: it cannot be exported, or the export computes something else.
        OSError: the files cannot be written.
    """
    # Here, because the process that builds engines is of this package and needs neither torch nor its memory.
    from .check import check_export, expected_outputs
    from .onnx import export_component

    module = component.build()
    export_component(component, module, path)
    expected = expected_outputs(component, module)
    # The module goes before ONNX Runtime comes, so that the weights are in memory once. The traced program
    # refers to itself, hence the collector.
    del module
    gc.collect()
    return check_export(component, path, expected)
