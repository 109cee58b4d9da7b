"""A component as an ONNX file, with its weights in a file beside it: traced, translated, tidied, written, checked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn

from ..errors import ExportError
from ..kernels import as_nodes
from ..runtime.engines.base import Component, example_inputs
from .translate import to_onnx

__all__ = ["export_component", "trace"]


def export_component(component: Component, module: nn.Module, path: Path) -> Path:
    """Write the component to `path` and its weights to `path` + ".data".

    Every named dimension of the inputs is dynamic, and shared by the inputs that name it. The model says in
    its metadata which component it is and what made it.

    Args:
        component: what to export.
        module: what `component.build` made; it is not changed.
        path: the .onnx file, in a folder that exists.

    Returns:
        `path`.

    Raises:
        ExportError: torch.export, the ONNX exporter or ONNX's checker refuse it.
        OSError: the files cannot be written.
    """
    try:
        model = to_onnx(trace(component, module), component)
        _describe(model, component)
        ir.save(model, path, external_data=f"{path.name}.data")
    except (OSError, ExportError):
        raise
    except Exception as error:  # torch.export and ONNX share no base
        raise ExportError(f"{component.name} cannot be exported to ONNX: {error}") from error
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{component.name} was exported to an invalid ONNX model: {error}") from error
    return path


def trace(component: Component, module: nn.Module) -> torch.export.ExportedProgram:
    """The component's module as one graph over aten and the project's operators.

    Raises:
        Exception: whatever torch.export raises, where the module has no such graph.
    """
    dims = {
        name: _dimension(name, component.example_sizes[name])
        for spec in component.inputs
        for name in spec.dims
        if isinstance(name, str)
    }
    shapes = tuple(
        {i: dims[name] for i, name in enumerate(spec.dims) if isinstance(name, str)} or None
        for spec in component.inputs
    )
    with _quietly(), torch.no_grad(), as_nodes():
        return torch.export.export(
            module,
            example_inputs(component, component.example_sizes),
            dynamic_shapes=shapes,
            # Else "a level below is not 1 pixel high" is a guard, and the smallest sizes are refused.
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _dimension(name: str, example: int) -> torch.export.Dim:
    """A dimension that may vary. Tracing wants the coarsest level of a network to stay above one pixel, as it is in the
    example; what it writes holds below that too, as the tests of the smallest sizes show."""
    return torch.export.Dim(name, min=1 if name == "batch" else example // 2 + 1)


def _describe(model: ir.Model, component: Component) -> None:
    """Write into the model's metadata what it is."""
    model.producer_name = "latentrt"
    model.producer_version = metadata.version("latentrt")
    model.metadata_props.update(
        {
            "latentrt.component": component.name,
            "latentrt.fingerprint": component.fingerprint,
            "latentrt.dtype": str(component.dtype).removeprefix("torch."),
            "latentrt.version": metadata.version("latentrt"),
            "torch.version": torch.__version__,
        }
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's warnings about its own internals: an export is judged by its checks."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
