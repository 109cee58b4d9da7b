"""An ONNX graph as it grows: nodes named by the module they come from, constants kept once, weights by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from .functions import DOMAIN, PLUGIN

__all__ = ["TRANSPOSED", "Builder", "Weight"]

TRANSPOSED = ".T"
"""Ends the name of a weight that is stored transposed: [in, out], as a MatMul of more than two dimensions wants it."""


class Weight:
    """A parameter, which becomes an initializer in the layout that its use asks for."""

    def __init__(self, builder: Builder, name: str, data: Tensor) -> None:
        self._builder, self._name, self._data = builder, name, data.detach()

    def plain(self) -> ir.Value:
        """As it is."""
        return self._builder.initializer(self._name, TorchTensor(self._data, name=self._name))

    def transposed(self) -> ir.Value:
        """With its two dimensions exchanged, which is done when the model is written: no second copy is held."""
        name, data = self._name + TRANSPOSED, self._data
        tensor = ir.LazyTensor(
            lambda: TorchTensor(data.t().contiguous(), name=name),
            dtype=from_torch_dtype(data.dtype),
            shape=ir.Shape(data.shape[::-1]),
            name=name,
        )
        return self._builder.initializer(name, tensor)


Operand = ir.Value | Weight


class Builder:
    """Nodes and initializers so far.

    Attributes:
        module: path of the module whose nodes are being added; part of their names.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.module = ""
        self._constants: dict[tuple[torch.dtype, tuple[int, ...], str], ir.Value] = {}
        self._used: dict[str, int] = {}

    def op(
        self, kind: str, *inputs: Operand | None, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """Append a node; its output, or the tuple of them where there are several."""
        name = self._unique(f"{self.module}/{kind}" if self.module else kind)
        operands = [None if x is None else self.value(x) for x in inputs]
        node = ir.node(kind, operands, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if i == 0 else f"{name}:{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def ours(self, kind: str, *inputs: Operand, outputs: int = 1, **attributes: Any) -> Any:
        """Append one of the project's operators."""
        return self.op(kind, *inputs, domain=DOMAIN, outputs=outputs, **attributes, **PLUGIN)

    def value(self, x: Operand) -> ir.Value:
        """A weight as its initializer; anything else as it is."""
        return x.plain() if isinstance(x, Weight) else x

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """The initializer of that name, made of `tensor` the first time."""
        if name not in self.initializers:
            self.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
        return self.initializers[name]

    def constant(self, content: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        """A small constant, one initializer however often it is asked for."""
        data = torch.as_tensor(content, dtype=dtype, device="cpu")
        key = (dtype, tuple(data.shape), repr(data.tolist()))
        if key not in self._constants:
            name = self._unique("constant")
            self._constants[key] = self.initializer(name, TorchTensor(data, name=name))
        return self._constants[key]

    def sizes(self, sizes: Sequence[int | ir.Value]) -> ir.Value:
        """A vector of sizes, some of which are known only when the model runs: those are vectors of one."""
        parts: list[ir.Value] = []
        known: list[int] = []
        for size in sizes:
            if isinstance(size, int):
                known.append(size)
                continue
            if known:
                parts.append(self.constant(known))
                known = []
            parts.append(size)
        if known:
            parts.append(self.constant(known))
        result: ir.Value = parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
        return result

    def cast(self, x: Operand, dtype: torch.dtype) -> ir.Value:
        """x in another dtype; x itself where it has that dtype already."""
        value, wanted = self.value(x), from_torch_dtype(dtype)
        result: ir.Value = value if value.dtype == wanted else self.op("Cast", value, to=wanted)
        return result

    def _unique(self, name: str) -> str:
        count = self._used[name] = self._used.get(name, -1) + 1
        return f"{name}.{count}" if count else name
