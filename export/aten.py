"""What each traced operation is in ONNX: one function for each, with the operation's own parameters.

`b` is the graph as it grows and `fake` what tracing knows of the result: its shape, with symbols for sizes that vary,
and its dtype. A size that varies is a vector of one int64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from ..errors import ExportError
from .builder import Builder, Operand, Weight

__all__ = ["TABLE"]

Translation = Callable[..., Any]
Size = int | ir.Value
TABLE: dict[Any, Translation] = {}
"""Translations, by the target of a traced call."""

_aten = torch.ops.aten
_ours = torch.ops.latentrt


def _of(*targets: Any) -> Callable[[Translation], Translation]:
    def register(translation: Translation) -> Translation:
        TABLE.update(dict.fromkeys(targets, translation))
        return translation

    return register


# --- the project's operators


@_of(_ours.attention.default)
def _attention(
    b: Builder, fake: Tensor, q: Operand, k: Operand, v: Operand, scale: float | None = None
) -> Any:
    return b.ours("DotProductAttention", q, k, v, scale=fake.shape[-1] ** -0.5 if scale is None else scale)


@_of(_ours.group_norm.default)
def _group_norm(
    b: Builder, fake: Tensor, x: Operand, weight: Operand, bias: Operand, num_groups: int, eps: float
) -> Any:
    return b.ours("GroupNorm", x, weight, bias, num_groups=num_groups, epsilon=eps)


@_of(_ours.group_norm_silu.default)
def _group_norm_silu(
    b: Builder,
    fake: Tensor,
    x: Operand,
    weight: Operand,
    bias: Operand,
    num_groups: int,
    eps: float,
    shift: Operand | None = None,
) -> Any:
    if shift is None:
        return b.ours("GroupNormSilu", x, weight, bias, num_groups=num_groups, epsilon=eps)
    return b.ours("ShiftGroupNormSilu", x, shift, weight, bias, num_groups=num_groups, epsilon=eps)


@_of(_ours.layer_norm.default)
def _layer_norm(b: Builder, fake: Tensor, x: Operand, weight: Operand, bias: Operand, eps: float) -> Any:
    return b.ours("LayerNorm", x, weight, bias, epsilon=eps)


@_of(_ours.add_layer_norm.default)
def _add_layer_norm(
    b: Builder, fake: Any, x: Operand, residual: Operand, weight: Operand, bias: Operand, eps: float
) -> Any:
    return b.ours("AddLayerNorm", x, residual, weight, bias, outputs=2, epsilon=eps)


@_of(_ours.geglu.default)
def _geglu(b: Builder, fake: Tensor, x: Operand) -> Any:
    return b.ours("Geglu", x)


@_of(_ours.linear_geglu.default)
def _linear_geglu(b: Builder, fake: Tensor, x: Operand, weight: Operand, bias: Operand | None = None) -> Any:
    if bias is None:
        return b.ours("Geglu", b.op("MatMul", x, _transposed(b, weight)))
    return b.ours("LinearGeglu", x, _transposed(b, weight), bias)


# --- matmuls and convolutions


@_of(_aten.linear.default)
def _linear(b: Builder, fake: Tensor, x: Operand, weight: Operand, bias: Operand | None = None) -> Any:
    if fake.ndim == 2:
        return b.op("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)
    y = b.op("MatMul", x, _transposed(b, weight))
    return y if bias is None else b.op("Add", y, bias)


def _transposed(b: Builder, weight: Operand) -> ir.Value:
    if isinstance(weight, Weight):
        return weight.transposed()
    transposed: ir.Value = b.op("Transpose", weight, perm=[1, 0])
    return transposed


@_of(_aten.conv2d.default)
def _conv2d(
    b: Builder,
    fake: Tensor,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    return b.op(
        "Conv",
        x,
        weight,
        *([] if bias is None else [bias]),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


@_of(_aten.scaled_dot_product_attention.default)
def _causal_attention(
    b: Builder,
    fake: Tensor,
    q: Operand,
    k: Operand,
    v: Operand,
    mask: Operand | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> Any:
    """[B, H, S, D], of a fixed S. As matmuls and a softmax: TensorRT refuses ONNX's Attention in float32."""
    length, columns = fake.shape[-2:]
    if mask is not None or not is_causal or not isinstance(length, int):
        raise ExportError(
            "scaled_dot_product_attention is translated with is_causal=True, without a mask and for a fixed "
            "number of tokens only; use latentrt.kernels.attention"
        )
    q = b.op("Mul", q, b.constant(columns**-0.5, fake.dtype))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores.dtype = b.value(v).dtype
    future = b.constant(np.triu(np.full((length, length), -np.inf), 1), torch.float32)
    weights = b.op("Softmax", b.op("Add", b.cast(scores, torch.float32), future), axis=-1)
    weights.dtype = ir.DataType.FLOAT
    return b.op("MatMul", b.cast(weights, fake.dtype), v)


# --- one element at a time


def _binary(kind: str) -> Translation:
    def translation(b: Builder, fake: Tensor, x: Any, y: Any) -> Any:
        return b.op(kind, _operand(b, x, fake.dtype), _operand(b, y, fake.dtype))

    return translation


def _operand(b: Builder, x: Any, dtype: torch.dtype) -> ir.Value:
    return b.constant(x, dtype) if isinstance(x, (int, float)) else b.cast(x, dtype)


for _kind, _target in (
    ("Add", _aten.add.Tensor),
    ("Sub", _aten.sub.Tensor),
    ("Mul", _aten.mul.Tensor),
    ("Div", _aten.div.Tensor),
):
    TABLE[_target] = _binary(_kind)


def _unary(kind: str) -> Translation:
    return lambda b, fake, x: b.op(kind, x)


for _kind, _target in (
    ("Exp", _aten.exp.default),
    ("Sin", _aten.sin.default),
    ("Cos", _aten.cos.default),
    ("Sigmoid", _aten.sigmoid.default),
    ("Gelu", _aten.gelu.default),
):
    TABLE[_target] = _unary(_kind)


@_of(_aten.silu.default)
def _silu(b: Builder, fake: Tensor, x: Operand) -> Any:
    return b.op("Mul", x, b.op("Sigmoid", x))


@_of(_aten.eq.Scalar)
def _equal(b: Builder, fake: Tensor, x: ir.Value, value: int) -> Any:
    assert x.dtype is not None
    return b.op("Equal", x, b.constant(value, to_torch_dtype(x.dtype)))


@_of(_aten.to.dtype)
def _to(b: Builder, fake: Tensor, x: Operand, dtype: torch.dtype, *rest: Any) -> Any:
    return b.cast(x, fake.dtype)


# --- shapes


@_of(_aten.flatten.using_ints)
def _flatten(b: Builder, fake: Tensor, x: Operand, start: int = 0, end: int = -1) -> Any:
    """Dimensions before `start` are kept, as a 0 says; those after `end` must be fixed."""
    start %= fake.ndim
    return b.op("Reshape", x, b.sizes([*[0] * start, -1, *fake.shape[start + 1 :]]))


@_of(_aten.unflatten.int)
def _unflatten(b: Builder, fake: Tensor, x: Operand, dim: int, sizes: Sequence[Size]) -> Any:
    """Dimensions before `dim` are kept, as a 0 says; those after the unflattened ones must be fixed."""
    dim %= fake.ndim - len(sizes) + 1
    return b.op("Reshape", x, b.sizes([*[0] * dim, *sizes, *fake.shape[dim + len(sizes) :]]))


@_of(_aten.reshape.default)
def _reshape(b: Builder, fake: Tensor, x: Operand, shape: Sequence[Size]) -> Any:
    return b.op("Reshape", x, b.sizes(shape))


@_of(_aten.transpose.int)
def _transpose(b: Builder, fake: Tensor, x: Operand, dim0: int, dim1: int) -> Any:
    order = list(range(fake.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return b.op("Transpose", x, perm=order)


@_of(_aten.unsqueeze.default)
def _unsqueeze(b: Builder, fake: Tensor, x: Operand, dim: int) -> Any:
    return b.op("Unsqueeze", x, b.constant([dim]))


@_of(_aten.squeeze.dim)
def _squeeze(b: Builder, fake: Tensor, x: Operand, dim: int) -> Any:
    return b.op("Squeeze", x, b.constant([dim]))


@_of(_aten.cat.default)
def _cat(b: Builder, fake: Tensor, tensors: Sequence[Operand], dim: int = 0) -> Any:
    return b.op("Concat", *tensors, axis=dim)


@_of(_aten.stack.default)
def _stack(b: Builder, fake: Tensor, tensors: Sequence[Operand], dim: int = 0) -> Any:
    return b.op("Concat", *(b.op("Unsqueeze", x, b.constant([dim])) for x in tensors), axis=dim)


@_of(_aten.pad.default)
def _pad(
    b: Builder,
    fake: Tensor,
    x: Operand,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Any:
    """PyTorch counts from the last dimension: [left, right, top, bottom]."""
    if mode != "constant" or value:
        raise ExportError(
            f"pad with mode {mode!r} and value {value} has no translation to ONNX; pad with zeros"
        )
    before, after = list(pad[-2::-2]), list(pad[::-2])
    kept = [0] * (fake.ndim - len(before))
    return b.op("Pad", x, b.constant([*kept, *before, *kept, *after]))


@_of(_aten.upsample_nearest2d.vec)
def _upsample(
    b: Builder, fake: Tensor, x: Operand, size: Sequence[Size] | None, scales: Sequence[float] | None = None
) -> Any:
    how: dict[str, Any] = {
        "mode": "nearest",
        "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
    }
    if size is None:
        assert scales is not None
        return b.op("Resize", x, None, b.constant([1, 1, *scales], torch.float32), **how)
    return b.op("Resize", x, None, None, b.sizes([b.op("Shape", x, start=0, end=2), *size]), **how)


@_of(_aten.slice.Tensor)
def _slice(
    b: Builder, fake: Tensor, x: Operand, dim: int = 0, start: int = 0, end: int = 2**63 - 1, step: int = 1
) -> Any:
    shape = b.value(x).shape
    size = None if shape is None else shape[dim]
    if isinstance(size, int) and start == 0 and end >= size and step == 1:
        return b.value(x)
    return b.op("Slice", x, *(b.constant([at]) for at in (start, end, dim, step)))


# --- rows


@_of(_aten.embedding.default)
def _embedding(b: Builder, fake: Tensor, table: Operand, ids: Operand, *padding: Any) -> Any:
    return b.op("Gather", table, ids)


@_of(_aten.index_select.default)
def _index_select(b: Builder, fake: Tensor, x: Operand, dim: int, index: Operand) -> Any:
    return b.op("Gather", x, index, axis=dim)


@_of(_aten.index.Tensor)
def _index(b: Builder, fake: Tensor, x: Operand, indices: Sequence[Operand]) -> Any:
    """One index each for the first dimensions, all vectors of one length."""
    columns = [b.op("Unsqueeze", index, b.constant([-1])) for index in indices]
    return b.op("GatherND", x, b.op("Concat", *columns, axis=-1))


@_of(_aten.argmax.default)
def _argmax(b: Builder, fake: Tensor, x: Operand, dim: int, keepdim: bool = False) -> Any:
    return b.op("ArgMax", x, axis=dim, keepdims=int(keepdim))


@_of(_aten.arange.default)
def _arange(b: Builder, fake: Tensor, end: Size, **options: Any) -> Any:
    if isinstance(end, int):
        return b.constant(range(end), fake.dtype)
    steps = b.op("Range", b.constant(0), b.op("Squeeze", end), b.constant(1))
    steps.dtype = ir.DataType.INT64
    return b.cast(steps, fake.dtype)


# --- sizes


@_of(_aten.sym_size.int)
def _size(b: Builder, fake: Any, x: Operand, dim: int) -> Any:
    return b.op("Shape", x, start=dim, end=dim + 1)


def _arithmetic(kind: str) -> Translation:
    """Integer arithmetic on symbolic sizes."""
    return lambda b, fake, x, y: b.op(kind, *(b.constant([n]) if isinstance(n, int) else n for n in (x, y)))


TABLE[operator.add] = _arithmetic("Add")
TABLE[operator.sub] = _arithmetic("Sub")
TABLE[operator.mul] = _arithmetic("Mul")
# ONNX rounds integer division toward zero and Python down, which is the same for sizes: none is negative.
TABLE[operator.floordiv] = _arithmetic("Div")
TABLE[operator.getitem] = lambda b, fake, several, i: several[i]
