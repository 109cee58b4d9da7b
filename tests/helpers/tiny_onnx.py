"""ONNX models of a few nodes, written by hand: for tests of builders, where exporting a module would add nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHAIN_SHAPES = {"x": [[1, 4, 8, 8], [1, 4, 16, 16], [2, 4, 32, 32]]}


def save(
    path: Path, nodes: list[Any], shape: tuple[int | str, ...] = ("batch", 8), opset: int = 20, **domains: int
) -> str:
    """A model of `nodes` from `x` to `y`, float32."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in domains.items())]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "graph", [x], [y]), opset_imports=opsets, ir_version=10),
        path,
    )
    return str(path)


def relu(path: Path) -> str:
    return save(path, [helper.make_node("Relu", ["x"], ["y"], name="/relu")])


def chain(path: Path, length: int) -> str:
    """Convolutions in a row: about a third of a second each to build."""
    random = np.random.default_rng(0)
    nodes, weights, channels, last = [], [], 4, "x"
    for k in range(length):
        wider = 8 * (k % 5 + 1)
        weight = random.standard_normal((wider, channels, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{k}"))
        nodes.append(helper.make_node("Conv", [last, f"w{k}"], [f"c{k}"], name=f"/conv{k}", pads=[1] * 4))
        nodes.append(helper.make_node("Softmax", [f"c{k}"], [f"s{k}"], name=f"/softmax{k}"))
        last, channels = f"s{k}", wider
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 4, "height", "width"))
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return str(path)
