"""The operators' bodies of standard operators, run alone by ONNX Runtime, against the reference in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from latentrt.export.functions import DOMAIN, OPSET, PLUGIN, VERSION, function, functions_of
from latentrt.export.measures import relative_error
from latentrt.kernels import reference
from onnx_ir.tensor_adapters import from_torch_dtype
from tolerances import OPERATOR, OPERATOR_LARGE_MEAN, OPERATOR_TWO_ROUNDINGS
from torch import Tensor

GROUPS = {"num_groups": 3, "epsilon": 1e-5}
SCALE = 0.3


def draw(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0, mean: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) + mean).to(dtype) for shape in shapes]


def node_model(
    name: str, inputs: list[Tensor], outputs: int, attributes: Mapping[str, Any], **body: Any
) -> ir.Model:
    """A model of one node of ours, its inputs of any size."""
    values = []
    for i, x in enumerate(inputs):
        value = ir.Value(name=f"x{i}", type=ir.TensorType(from_torch_dtype(x.dtype)))
        value.shape = ir.Shape([f"d{i}_{k}" for k in range(x.ndim)])
        values.append(value)
    node = ir.node(name, values, {**attributes, **PLUGIN}, domain=DOMAIN, num_outputs=outputs, name="node")
    for i, value in enumerate(node.outputs):
        value.name = f"y{i}"
        value.dtype = from_torch_dtype(inputs[0].dtype)
        value.shape = ir.Shape([None] * inputs[0].ndim)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: VERSION}, name="g")
    return ir.Model(graph, ir_version=10, functions=[function(name, **body)])


def run(model: ir.Model, inputs: list[Tensor]) -> list[Tensor]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
    return [torch.from_numpy(np.asarray(y)) for y in session.run(None, feeds)]


def double(inputs: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in inputs]


# Of each: shapes of its inputs, its attributes, the reference over the same inputs. Sizes are small, and no two alike.
CASES: dict[str, tuple[list[tuple[int, ...]], dict[str, Any], Any]] = {
    "DotProductAttention": (
        [(2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8)],
        {"scale": SCALE},
        lambda q, k, v: reference.attention(q, k, v, SCALE),
    ),
    "GroupNorm": (
        [(2, 6, 5, 4), (6,), (6,)],
        GROUPS,
        lambda x, w, b: reference.group_norm(x, w, b, 3, 1e-5),
    ),
    "GroupNormSilu": (
        [(2, 6, 5, 4), (6,), (6,)],
        GROUPS,
        lambda x, w, b: reference.group_norm_silu(x, w, b, 3, 1e-5),
    ),
    "ShiftGroupNormSilu": (
        [(2, 6, 5, 4), (2, 6), (6,), (6,)],
        GROUPS,
        lambda x, s, w, b: reference.group_norm_silu(x, w, b, 3, 1e-5, s),
    ),
    "LayerNorm": (
        [(2, 5, 12), (12,), (12,)],
        {"epsilon": 1e-5},
        lambda x, w, b: reference.layer_norm(x, w, b, 1e-5),
    ),
    "AddLayerNorm": (
        [(2, 5, 12), (2, 5, 12), (12,), (12,)],
        {"epsilon": 1e-5},
        lambda x, r, w, b: reference.add_layer_norm(x, r, w, b, 1e-5),
    ),
    "Geglu": ([(2, 5, 12)], {}, reference.geglu),
    "LinearGeglu": (
        [(2, 5, 8), (8, 12), (12,)],
        {},
        lambda x, w, b: reference.linear_geglu(x, w.t(), b),
    ),
}
ROUNDED_TWICE = {"Geglu", "LinearGeglu", "AddLayerNorm"}
"""Where half types are rounded on the way too: before the gate, after the sum."""


def errors(name: str, inputs: list[Tensor], **body: Any) -> list[float]:
    attributes, wanted = CASES[name][1:]
    results = wanted(*double(inputs))
    results = results if isinstance(results, tuple) else (results,)
    got = run(node_model(name, inputs, len(results), attributes, **body), inputs)
    assert [y.dtype for y in got] == [inputs[0].dtype] * len(results)
    return [relative_error(a, b) for a, b in zip(got, results, strict=True)]


@pytest.mark.parametrize("casts", [True, False], ids=["any", "float32-only"])
@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, casts: bool) -> None:
    inputs = draw(*CASES[name][0], dtype=torch.float32)
    assert max(errors(name, inputs, casts=casts)) < OPERATOR["float32"]


@pytest.mark.parametrize("name", CASES)
def test_float16(name: str) -> None:
    inputs = draw(*CASES[name][0], dtype=torch.float16)
    limits = OPERATOR_TWO_ROUNDINGS if name in ROUNDED_TWICE else OPERATOR
    # ONNX Runtime multiplies attention's weights and values as rounded to float16.
    limits = OPERATOR_TWO_ROUNDINGS if name == "DotProductAttention" else limits
    assert max(errors(name, inputs)) < limits["float16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fused_attention(dtype: torch.dtype) -> None:
    inputs = draw(*CASES["DotProductAttention"][0], dtype=dtype)
    key = str(dtype).removeprefix("torch.")
    assert max(errors("DotProductAttention", inputs, fused_attention=True)) < OPERATOR_TWO_ROUNDINGS[key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["GroupNorm", "GroupNormSilu", "LayerNorm"])
def test_a_large_mean(name: str, dtype: torch.dtype) -> None:
    """125 times the deviation, where E[x^2] - E[x]^2 cancels."""
    x, *rest = draw(*CASES[name][0], dtype=torch.float32)
    inputs = [t.to(dtype) for t in (x + 125, *rest)]
    key = str(dtype).removeprefix("torch.")
    assert max(errors(name, inputs)) < OPERATOR_LARGE_MEAN[key]


def test_half_precision_statistics_do_not_overflow() -> None:
    """The sum of squares of these is beyond float16."""
    x, *rest = draw(*CASES["GroupNorm"][0], dtype=torch.float32)
    inputs = [t.half() for t in (x * 3000, *rest)]
    assert max(errors("GroupNorm", inputs)) < OPERATOR["float16"]


def test_half_precision_scores_do_not_overflow() -> None:
    """Products of 300 x 300 over 64 columns are beyond float16 before they are scaled."""
    attributes = {"scale": 1e-3}
    q, k, v = draw((1, 4, 2, 64), (1, 4, 2, 64), (1, 4, 2, 64), dtype=torch.float32)
    inputs = [(300 * q.sign()).half(), (300 * k.abs().sign()).half(), v.half()]
    (got,) = run(node_model("DotProductAttention", inputs, 1, attributes), inputs)
    wanted = reference.attention(*double(inputs), 1e-3)
    assert relative_error(got, wanted) < OPERATOR_TWO_ROUNDINGS["float16"]


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_valid(name: str) -> None:
    """Nothing on the CPU runs it."""
    inputs = draw(*CASES[name][0], dtype=torch.bfloat16)
    outputs = 2 if name == "AddLayerNorm" else 1
    onnx.checker.check_model(ir.to_proto(node_model(name, inputs, outputs, CASES[name][1])), full_check=True)


FAULTS = {
    "DotProductAttention": ("Softmax", "axis", 1),
    "GroupNorm": ("InstanceNormalization", "epsilon", 1.0),
    "LayerNorm": ("LayerNormalization", "epsilon", 1.0),
    "Geglu": ("Gelu", "approximate", "tanh"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_body_is_seen(name: str) -> None:
    kind, attribute, wrong = FAULTS[name]
    inputs = draw(*CASES[name][0], dtype=torch.float32)
    model = node_model(name, inputs, 1, CASES[name][1])
    (body,) = model.functions.values()
    (node,) = (n for n in body if n.op_type == kind)
    node.attributes.add(ir.convenience.convert_attribute(attribute, wrong))
    (got,) = run(model, inputs)
    assert relative_error(got, CASES[name][2](*double(inputs))) > 10 * OPERATOR["float32"]


def attention_node(dtype: torch.dtype, heads: int, columns: int) -> ir.Node:
    qkv = [ir.Value(name=n, type=ir.TensorType(from_torch_dtype(dtype))) for n in "qkv"]
    for value in qkv:
        value.shape = ir.Shape([None, None, heads, columns])
    return ir.node("DotProductAttention", qkv, {"scale": 1.0}, domain=DOMAIN)


@pytest.mark.parametrize(
    ("nodes", "fused"),
    [
        ([(torch.float16, 10, 64)], True),
        ([(torch.bfloat16, 20, 64), (torch.bfloat16, 2, 256)], True),
        ([(torch.float32, 10, 64)], False),  # TensorRT has no float32 kernel
        ([(torch.float16, 1, 64)], False),  # nor one of one head and one image
        ([(torch.float16, 2, 512)], False),  # nor one as wide as a VAE's
        ([(torch.float16, 10, 64), (torch.float32, 10, 64)], False),  # one body serves all
    ],
    ids=["half", "bfloat16", "float32", "one head", "wide", "mixed"],
)
def test_which_body_attention_has(nodes: list[tuple[torch.dtype, int, int]], fused: bool) -> None:
    (body,) = functions_of(attention_node(*node) for node in nodes)
    assert ("Attention" in {node.op_type for node in body}) == fused


def test_no_type_is_taken() -> None:
    """TensorRT's parser goes by the type alone, whatever the domain."""
    names = set(CASES)
    assert not names & {s.name for s in onnx.defs.get_all_schemas()}


def test_float32_bodies_have_no_casts() -> None:
    (body,) = functions_of([attention_node(torch.float32, 2, 64)])
    assert not {node.op_type for node in body} & {"Cast", "CastLike"}
    (body,) = functions_of([attention_node(torch.float32, 2, 64), attention_node(torch.float16, 2, 64)])
    assert {node.op_type for node in body} >= {"Cast", "CastLike"}
