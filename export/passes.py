"""Rewrites of an ONNX model, each by a name, each leaving what the model computes as it was.

They run on the graph as translated, before it is written. The operators' nodes stay nodes: none inlines a function.
A pass changes the model in place and removes what it leaves unused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from ..errors import RequestError
from .builder import TRANSPOSED

__all__ = ["DEFAULT", "PASSES", "Report", "Size", "check_names", "run_passes"]

Pass = Callable[[ir.Model], None]


@dataclass(frozen=True)
class Size:
    """What a model holds: its graph's nodes, its initializers, and their bytes."""

    nodes: int
    initializers: int
    bytes: int

    @classmethod
    def of(cls, model: ir.Model) -> Size:
        tensors = [value.const_value for value in model.graph.initializers.values()]
        return cls(len(model.graph), len(tensors), sum(t.nbytes for t in tensors if t is not None))


@dataclass(frozen=True)
class Report:
    """What one pass did to a model's size."""

    name: str
    before: Size
    after: Size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_passes(model: ir.Model, names: Sequence[str]) -> list[Report]:
    """Run the passes of those names, in the order given.

    Raises:
        RequestError: there is no pass of a name; those there are are listed.
    """
    check_names(names)
    reports = []
    for name in names:
        before = Size.of(model)
        PASSES[name](model)
        reports.append(Report(name, before, Size.of(model)))
    return reports


def check_names(names: Sequence[str]) -> None:
    """Raise a RequestError unless each is the name of a pass."""
    unknown = [name for name in names if name not in PASSES]
    if unknown:
        raise RequestError(f"there is no pass {', '.join(unknown)}; there are {', '.join(PASSES)}")


def constant_folding(model: ir.Model) -> None:
    """Compute what depends on small constants only, such as the frequencies of the time embedding."""
    from onnxscript import optimizer  # a quarter of a second

    # Small results only: a folded weight would be stored beside the one it came from, under a name of no module.
    optimizer.fold_constants(model, input_size_limit=4096, output_size_limit=4096)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    dead_code(model)


def dead_code(model: ir.Model) -> None:
    """Remove identities, and nodes, initializers and functions that no output depends on."""
    # Not by onnx_ir's pass: it gives two outputs that are one tensor the same name.
    for node in list(model.graph):
        (result,) = node.outputs[:1]
        if _is(node, "Identity") and not result.is_graph_output():
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(result, source)
            model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


_F16, _BF16, _F32, _F64 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE
_I32, _I64 = ir.DataType.INT32, ir.DataType.INT64
# Casts that lose nothing, so that what comes back is what went in.
_EXACT = {(_F16, _F32), (_F16, _F64), (_BF16, _F32), (_BF16, _F64), (_F32, _F64), (_I32, _I64), (_I32, _F64)}


def cast_pairs(model: ir.Model) -> None:
    """Make one cast, or none, of a cast to a wider type and one from it; drop casts to the type a tensor has.

    A cast to a narrower type rounds: what follows it stays.
    """
    for node in model.graph:
        if not _is(node, "Cast"):
            continue
        source = node.inputs[0]
        before = source.producer() if source is not None else None
        if before is not None and _is(before, "Cast"):
            first = before.inputs[0]
            if first is not None and (first.dtype, _target(before)) in _EXACT:
                node.replace_input_with(0, first)
                source = first
        if source is not None and source.dtype == _target(node):
            _bypass(node, source)
    dead_code(model)


def transpose_pairs(model: ir.Model) -> None:
    """Make one transpose, or none, of two in a row."""
    for node in model.graph:
        source = node.inputs[0] if _is(node, "Transpose") else None
        before = source.producer() if source is not None else None
        if before is None or not _is(before, "Transpose") or before.inputs[0] is None:
            continue
        inner, outer = before.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
        order = [inner[i] for i in outer]
        node.replace_input_with(0, before.inputs[0])
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
        if order == sorted(order):
            _bypass(node, before.inputs[0])
    dead_code(model)


def fused_qkv(model: ir.Model) -> None:
    """Fuse the projections that one module applies to one tensor into one matmul: q, k and v, or k and v of a text.

    Their weights are concatenated, and so are their biases if each has one. Projections that are outputs of the model,
    such as the keys and values of a UNet's part `prompt`, stay as they are.
    """
    groups: dict[tuple[ir.Value, str], list[_Projection]] = {}
    for node in model.graph:
        projection = _projection(model.graph, node)
        if projection is not None and not projection.last.outputs[0].is_graph_output():
            groups.setdefault((projection.x, projection.module), []).append(projection)
    for (x, module), projections in groups.items():
        if len(projections) > 1 and len({p.bias is None for p in projections}) == 1:
            _fuse(model.graph, x, module, projections)
    dead_code(model)


PASSES: dict[str, Pass] = {
    "constant-folding": constant_folding,
    "dead-code": dead_code,
    "cast-pairs": cast_pairs,
    "transpose-pairs": transpose_pairs,
    "fused-qkv": fused_qkv,
}
"""Passes by name."""
DEFAULT = ("constant-folding", "dead-code", "cast-pairs", "transpose-pairs")
"""What an export runs unless told otherwise. fused-qkv is not among them: it was not seen to gain anything."""


def _is(node: ir.Node, kind: str) -> bool:
    return node.op_type == kind and node.domain == ""


def _target(cast: ir.Node) -> ir.DataType:
    return ir.DataType(cast.attributes["to"].as_int())


def _bypass(node: ir.Node, source: ir.Value) -> None:
    """Let `source` take the place of the node's output, but for an output of the model, which keeps its name."""
    if not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(source)


@dataclass(frozen=True)
class _Projection:
    """A matmul with a weight, and the addition of its bias."""

    x: ir.Value
    module: str
    leaf: str
    weight: ir.Value
    bias: ir.Value | None
    last: ir.Node


def _projection(graph: ir.Graph, node: ir.Node) -> _Projection | None:
    """The projection that a MatMul node computes; None if it is not a module's `to_q`, `k_proj` or the like."""
    if not _is(node, "MatMul"):
        return None
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.name is None or weight.name not in graph.initializers:
        return None
    module, _, leaf = weight.name.removesuffix(f".weight{TRANSPOSED}").rpartition(".")
    if leaf not in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj"):
        return None
    users = node.outputs[0].consumers()
    if len(users) == 1 and _is(users[0], "Add"):
        others = [v for v in users[0].inputs if v is not None and v is not node.outputs[0]]
        if len(others) == 1 and others[0].name == f"{module}.{leaf}.bias":
            return _Projection(x, module, leaf, weight, others[0], users[0])
    return _Projection(x, module, leaf, weight, None, node)


def _fuse(graph: ir.Graph, x: ir.Value, module: str, projections: Sequence[_Projection]) -> None:
    name = f"{module}.{'+'.join(p.leaf for p in projections)}"
    first = min((p.weight.consumers()[0] for p in projections), key=list(graph).index)
    matmul = ir.node(
        "MatMul",
        [x, _side_by_side(graph, [p.weight for p in projections], f"{name}.weight{TRANSPOSED}")],
        name=f"{name}/MatMul",
    )
    made = [matmul]
    biases = [p.bias for p in projections if p.bias is not None]
    if biases:
        bias = _side_by_side(graph, biases, f"{name}.bias")
        made.append(ir.node("Add", [matmul.outputs[0], bias], name=f"{name}/Add"))
    widths = ir.tensor([_tensor(p.weight).shape.numpy()[-1] for p in projections], dtype=ir.DataType.INT64)
    sizes = _initializer(graph, f"{name}/widths", widths)
    split = ir.node(
        "Split",
        [made[-1].outputs[0], sizes],
        {"axis": -1},
        num_outputs=len(projections),
        name=f"{name}/Split",
    )
    made.append(split)
    for node in made:
        for i, output in enumerate(node.outputs):
            output.name = f"{node.name}:{i}"
            output.type = x.type
    graph.insert_before(first, made)
    for projection, output in zip(projections, split.outputs, strict=True):
        output.shape = projection.last.outputs[0].shape
        projection.last.outputs[0].replace_all_uses_with(output)


def _side_by_side(graph: ir.Graph, values: Sequence[ir.Value], name: str) -> ir.Value:
    """An initializer of several, joined along the last dimension when it is written, not before."""
    tensors = [_tensor(value) for value in values]
    shapes = [tensor.shape.numpy() for tensor in tensors]

    def join() -> ir.TensorProtocol:
        dtype = to_torch_dtype(tensors[0].dtype)
        flat = (torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype) for tensor in tensors)
        parts = [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]
        return TorchTensor(torch.cat(parts, -1), name=name)

    shape = ir.Shape([*shapes[0][:-1], sum(each[-1] for each in shapes)])
    return _initializer(graph, name, ir.LazyTensor(join, dtype=tensors[0].dtype, shape=shape, name=name))


def _tensor(initializer: ir.Value) -> ir.TensorProtocol:
    assert initializer.const_value is not None
    return initializer.const_value


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value
