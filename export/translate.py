"""A traced module as an ONNX model.

The trace is what `torch.export` makes, before any decomposition: the operations that the models' source calls, some
thirty of them, each translated by a function of `aten`. PyTorch's own exporter knows all operations; for that it
decomposes and retraces, which takes several times as long and leaves a graph that others have to tidy. An operation
without a translation is an error naming it and the module that calls it; the check after each export is what holds
every translation to PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx

from ..errors import ExportError
from ..runtime.engines.base import Component, TensorSpec
from .aten import TABLE
from .builder import Builder, Weight
from .functions import DOMAIN, OPSET, VERSION, functions_of

__all__ = ["to_onnx"]


def to_onnx(program: torch.export.ExportedProgram, component: Component) -> ir.Model:
    """The program's graph in ONNX, its weights under the names they have in the module.

    Args:
        program: what `torch.export.export` made of the component's module under `kernels.as_nodes`.
        component: whose inputs and outputs it has.

    Raises:
        ExportError: an operation has no translation; it and the module that calls it are named.
    """
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    specs = dict(zip(signature.user_inputs, component.inputs, strict=True))
    builder = Builder()
    dims: dict[str, str] = {}
    values: dict[fx.Node, Any] = {}
    inputs: list[ir.Value] = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            name = names[node.name]
            values[node] = Weight(builder, name, tensors[name])
        elif node.op == "placeholder":
            spec = specs[node.name]
            inputs.append(_interface(spec))
            values[node] = inputs[-1]
            named = zip(node.meta["val"].shape, spec.dims, strict=True)
            dims |= {str(size): dim for size, dim in named if isinstance(dim, str)}
    needed = _needed(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function" and node in needed:
            try:
                values[node] = _translated(builder, node, values, dims)
            except ExportError as error:
                raise ExportError(f"{component.name}: {error}") from error
    outputs: list[ir.Value] = []
    for node, spec in zip(program.graph.output_node().args[0], component.outputs, strict=True):
        output = builder.value(values[node])
        if output.producer() is None or output in outputs:
            output = builder.op("Identity", output)
        _describe(output, spec)
        outputs.append(output)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports={"": OPSET, DOMAIN: VERSION},
        name=component.name,
    )
    return ir.Model(graph, ir_version=10, functions=functions_of(builder.nodes))


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """What the outputs depend on; assertions about sizes are not among it."""
    needed: set[fx.Node] = set()
    todo = [graph.output_node()]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    return needed


def _translated(
    builder: Builder, node: fx.Node, values: Mapping[fx.Node, Any], dims: Mapping[str, str]
) -> Any:
    """What the node computes: a value, or a tuple of values. `dims` are the names of tracing's symbols."""
    builder.module = _module(node)
    translation = TABLE.get(node.target)
    if translation is None:
        where = f", called in {builder.module}," if builder.module else ""
        raise ExportError(
            f"{node.target}{where} has no translation to ONNX; write the module with the operations of "
            "export/aten.py, or add this one there"
        )
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    fake = node.meta["val"]
    result = translation(builder, fake, *args, **kwargs)
    several = (tuple(result), tuple(fake)) if isinstance(result, tuple) else ((result,), (fake,))
    for value, known in zip(*several, strict=True):
        _annotate(value, known, dims)
    return result


def _module(node: fx.Node) -> str:
    """Path of the module that calls the operation; empty for the outermost."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty") else path  # torch's own placeholder


def _annotate(value: Any, fake: Any, dims: Mapping[str, str]) -> None:
    """Dtype, and the dimensions that are fixed or an input's, as tracing found them."""
    if isinstance(fake, Tensor) and isinstance(value, ir.Value):
        value.dtype = from_torch_dtype(fake.dtype)
        if value.shape is None:
            value.shape = ir.Shape([n if isinstance(n, int) else dims.get(str(n)) for n in fake.shape])


def _interface(spec: TensorSpec) -> ir.Value:
    value = ir.Value(name=spec.name)
    _describe(value, spec)
    return value


def _describe(value: ir.Value, spec: TensorSpec) -> None:
    value.name = spec.name
    value.dtype = from_torch_dtype(spec.dtype)
    value.shape = ir.Shape(list(spec.dims))
