"""A component as an ONNX file, with its weights in a file beside it: traced, translated, tidied, written, checked."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
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
from ..runtime.place import dtype_name
from .passes import DEFAULT, Report, run_passes
from .translate import to_onnx

__all__ = ["to_model", "trace", "write_model"]


def to_model(
    component: Component, module: nn.Module, passes: Sequence[str] = DEFAULT
) -> tuple[ir.Model, list[Report]]:
    """The component in ONNX, its weights still those of the module.

    Every named dimension of the inputs is dynamic, and shared by the inputs that name it. The model says in
    its metadata which component it is, of which weights and configuration, and what made it.

    Args:
        component: what to export.
        module: what `component.build` made; it is not changed.
        passes: names of `passes.PASSES`, in order.

    Returns:
        The model, and what each pass did.

    Raises:
        ExportError: torch.export refuses it, or an operation has no translation.
        RequestError: no pass has that name.
    """
    try:
        model = to_onnx(trace(component, module), component)
    except ExportError:
        raise
    except Exception as error:  # torch.export's errors have no base of their own
        raise ExportError(f"{component.name} cannot be exported to ONNX: {error}") from error
    _describe(model, component)
    return model, run_passes(model, passes)


def write_model(component: Component, model: ir.Model, path: Path) -> None:
    """Write the model to `path`, in a folder that exists, and its weights to `path` + ".data".

    Raises:
        ExportError: ONNX's checker refuses it.
        OSError: the files cannot be written.
    """
    ir.save(model, path, external_data=f"{path.name}.data")
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{component.name} was exported to an invalid ONNX model: {error}") from error


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
    named = inspect.signature(module.forward).parameters.values()
    varying = next((k for k, p in enumerate(named) if p.kind is p.VAR_POSITIONAL), len(shapes))
    with _quietly(), torch.no_grad(), as_nodes():
        return torch.export.export(
            module,
            example_inputs(component, component.example_sizes),
            # To torch.export all that a `*` takes is one argument, and none is nothing.
            dynamic_shapes=shapes if not shapes[varying:] else (*shapes[:varying], shapes[varying:]),
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
            "latentrt.dtype": dtype_name(component.dtype),
            "latentrt.config": json.dumps(dict(component.config), sort_keys=True, default=str),
            **{
                f"{name}.version": metadata.version(name) for name in ("latentrt", "torch", "onnx", "onnx-ir")
            },
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
