"""Export: components written as ONNX and checked against the PyTorch they came from."""

from __future__ import annotations

from .check import check_export
from .onnx import export_component

__all__ = ["check_export", "export_component"]
