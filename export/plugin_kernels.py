"""The kernels that a model's nodes need where plugins take them, compiled before its engine is built.

Read off the ONNX file: dtypes, channels and heads are in it. So the process that builds, which has neither PyTorch
nor Triton, finds them ready.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch

from ..errors import BuildError
from ..kernels.binaries import (
    AheadAttentionKernels,
    AttentionKernels,
    GroupNormKernels,
    Kernels,
    binaries,
)
from ..runtime.engines.plugin_launch import DTYPES, OPERATORS
from ..runtime.engines.plugins import AOT_ATTENTION
from .functions import DOMAIN
from .quick_plugins import key_of

__all__ = ["plugin_kernels"]

_DTYPES = {getattr(onnx.TensorProto, name.upper()): name for name in DTYPES if name != "float32"}
_DTYPES[onnx.TensorProto.FLOAT] = "float32"


def plugin_kernels(
    model: Path, names: Sequence[str], archs: Sequence[int], *, cache: Path | None = None
) -> dict[str, dict[str, str]]:
    """The file of each set of kernels, by key and architecture; ready to be written as JSON.

    Args:
        model: the ONNX file.
        names: of the plugins that are on.
        archs: compute capabilities such as 89.
        cache: of compiled kernels.

    Raises:
        BuildError: a node has no shape a kernel can be compiled for.
        BackendError: a kernel does not compile, or Triton is not there.
    """
    wanted = {
        (key, arch): _kernels(key, arch) for key in dict.fromkeys(_keys(model, set(names))) for arch in archs
    }
    files = binaries(list(wanted.values()), cache, processes=os.cpu_count() or 1)
    found: dict[str, dict[str, str]] = {}
    for (key, arch), file in zip(wanted, files, strict=True):
        found.setdefault(key, {})[str(arch)] = str(file)
    return found


def _keys(model: Path, names: set[str]) -> Iterator[str]:
    aot = AOT_ATTENTION in names
    names = {name.partition(":")[0] for name in names}
    graph = onnx.load(model, load_external_data=False).graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    weights = {weight.name for weight in graph.initializer}
    for node in graph.node:
        if node.domain != DOMAIN or node.op_type not in names:
            continue
        operator = OPERATORS[node.op_type]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        first = types.get(node.input[0])
        untold = [name for name in node.input if name not in types and name not in weights]
        if untold or first is None or first.elem_type not in _DTYPES:
            raise BuildError(
                f"{model}: node {node.name!r} ({node.op_type}) has no type and shape that its plugin takes; build "
                "without it"
            )
        shapes = [
            tuple(d.dim_value or -1 for d in types[name].shape.dim) if name in types else ()
            for name in node.input
        ]
        key = key_of if aot and node.op_type == AOT_ATTENTION.partition(":")[0] else operator.key
        yield key(_DTYPES[first.elem_type], shapes, attributes)


def _kernels(key: str, arch: int) -> Kernels:
    kind, *rest = key.split()
    fields = dict(field.split("=") for field in rest)
    dtype = getattr(torch, fields["dtype"])
    if kind == "attention-aot":
        return AheadAttentionKernels(
            dtype, int(fields["columns"]), fields["short"] == "1", float(fields["scale"]), arch
        )
    if kind == "attention":
        return AttentionKernels(
            dtype, int(fields["columns"]), fields["short"] == "1", fields["negative"] == "1", arch
        )
    return GroupNormKernels(
        dtype,
        int(fields["channels"]),
        int(fields["groups"]),
        fields["silu"] == "1",
        fields["shift"] == "1",
        arch,
    )
