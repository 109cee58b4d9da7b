"""Each pass alone: on a small graph that needs it, and on one that must stay as it is; then all on real models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from helpers import tiny_components as tiny
from latentrt.errors import RequestError
from latentrt.export.measures import relative_error
from latentrt.export.onnx import to_model
from latentrt.export.passes import DEFAULT, PASSES, Size, run_passes
from latentrt.runtime.engines.base import Component, example_inputs
from torch import Tensor

NODE = "latentrt.GroupNorm <num_groups = 1, epsilon = 0.1> "
FUNCTION = """
<domain: "latentrt", opset_import: ["": 23]>
GroupNorm <num_groups, epsilon> (x, weight, bias) => (y) { two = Constant <value_ints = [1, 2]> () three = Shape(two)
    z = Mul(x, weight) a = Identity(z) y = Add(a, bias) }
"""


def parse(body: str, *, x: str = "float[n,4]", y: str = "float[n,4]", weights: str = "") -> ir.Model:
    """A model from ONNX's text, x -> y; `weights` are initializers."""
    text = f"""<ir_version: 10, opset_import: ["": 23, "latentrt": 1]>
    g ({x} x) => ({y} y) <{weights}> {{ {body} }}"""
    model = ir.from_onnx_text(text + (FUNCTION if "latentrt" in body else ""))
    for value in model.graph.inputs:
        assert value.dtype is not None
    return model


def run(model: ir.Model, *inputs: Tensor) -> list[Tensor]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.array(y)) for y in session.run(None, feeds)]


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


X = torch.arange(12, dtype=torch.float32).reshape(3, 4)
HALF, WIDE = int(ir.DataType.FLOAT16), int(ir.DataType.FLOAT)

# pass, what it gets, what is left of it
NEEDED: list[tuple[str, Callable[[], ir.Model], list[str]]] = [
    (
        "constant-folding",
        lambda: parse(
            "r = Range(zero, four, one) s = Mul(r, r) e = Exp(s) y = Add(x, e)",
            weights="float zero = {0}, float four = {4}, float one = {1}",
        ),
        ["Add"],
    ),
    (
        "dead-code",
        lambda: parse(
            "a = Identity(x) b = Exp(x) c = Mul(b, w) y = Sin(a)", weights="float[4] w = {1, 2, 3, 4}"
        ),
        ["Sin"],
    ),
    ("cast-pairs", lambda: parse(f"a = Cast<to={WIDE}>(x) y = Exp(a)"), ["Exp"]),
    (
        "cast-pairs",
        lambda: parse(
            f"a = Cast<to={WIDE}>(x) b = Cast<to={HALF}>(a) y = Exp(b)", x="float16[n,4]", y="float16[n,4]"
        ),
        ["Exp"],
    ),
    (
        "cast-pairs",
        lambda: parse(f"a = Cast<to={WIDE}>(x) y = Cast<to=11>(a)", x="float16[n,4]", y="double[n,4]"),
        ["Cast"],
    ),
    (
        "transpose-pairs",
        lambda: parse("a = Transpose<perm=[1,0]>(x) b = Transpose<perm=[1,0]>(a) y = Exp(b)"),
        ["Exp"],
    ),
    (
        "transpose-pairs",
        lambda: parse(
            "a = Transpose<perm=[1,2,0]>(x) y = Transpose<perm=[0,2,1]>(a)",
            x="float[n,4,2]",
            y="float[4,n,2]",
        ),
        ["Transpose"],
    ),
    (
        "fused-qkv",
        lambda: parse(
            "q = MatMul(x, wq) k = MatMul(x, wk) s = Mul(q, k) y = Exp(s)",
            y="float[n,2]",
            weights="float[4,2] wq = {1,0,0,0,0,0,0,1}, float[4,2] wk = {0,0,1,0,1,0,0,0}",
        ),
        ["MatMul", "Split", "Mul", "Exp"],
    ),
]
KEPT: list[tuple[str, Callable[[], ir.Model]]] = [
    ("constant-folding", lambda: parse("a = Exp(x) y = Add(a, w)", weights="float[4] w = {1, 2, 3, 4}")),
    ("dead-code", lambda: parse(f"y = {NODE}(x, w, w)", weights="float[4] w = {1, 2, 3, 4}")),
    # Rounded to half on the way.
    ("cast-pairs", lambda: parse(f"a = Cast<to={HALF}>(x) b = Cast<to={WIDE}>(a) y = Exp(b)")),
    (
        "transpose-pairs",
        lambda: parse("a = Transpose<perm=[1,0]>(x) b = Exp(a) y = Transpose<perm=[1,0]>(b)"),
    ),
    (
        "fused-qkv",  # of two modules
        lambda: parse(
            "q = MatMul(x, wq) k = MatMul(x, wk) y = Mul(q, k)",
            y="float[n,2]",
            weights="float[4,2] wq = {1,0,0,0,0,0,0,1}, float[4,2] wk = {0,0,1,0,1,0,0,0}",
        ),
    ),
]


def named(model: ir.Model, modules: tuple[str, str]) -> ir.Model:
    """With the weights' names that ONNX's text cannot have."""
    for short, module in zip(("wq", "wk"), modules, strict=True):
        if short in model.graph.initializers:
            model.graph.initializers[short].name = f"{module}.to_{short[1]}.weight.T"
    return model


def inputs_of(model: ir.Model) -> Tensor:
    (value,) = model.graph.inputs
    x = (
        torch.arange(24.0).reshape(3, 4, 2) / 20
        if value.shape is not None and len(value.shape) == 3
        else X / 20
    )
    return x.half() if value.dtype == ir.DataType.FLOAT16 else x


@pytest.mark.parametrize(
    ("name", "make", "left"), NEEDED, ids=[f"{i}-{n}" for i, (n, *_) in enumerate(NEEDED)]
)
def test_where_it_is_needed(name: str, make: Callable[[], ir.Model], left: list[str]) -> None:
    model = named(make(), ("m", "m"))
    x = inputs_of(model)
    before, size = run(model, x), Size.of(model)
    (report,) = run_passes(model, [name])
    assert kinds(model) == left
    assert (report.name, report.before, report.after) == (name, size, Size.of(model))
    assert report.after.nodes <= report.before.nodes + 1
    assert relative_error(run(model, x)[0], before[0]) < 1e-6


@pytest.mark.parametrize(("name", "make"), KEPT, ids=[name for name, _ in KEPT])
def test_where_it_must_not_act(name: str, make: Callable[[], ir.Model]) -> None:
    model = named(make(), ("m", "n"))
    before = [(node.op_type, node.domain) for node in model.graph]
    (report,) = run_passes(model, [name])
    assert [(node.op_type, node.domain) for node in model.graph] == before
    assert report.before == report.after


def test_projections_that_are_outputs_stay() -> None:
    weights = "float[4,2] wq = {1,0,0,0,0,0,0,1}, float[4,2] wk = {0,0,1,0,1,0,0,0}"
    model = named(
        parse("k = MatMul(x, wk) y = MatMul(x, wq)", y="float[n,2] k, float[n,2]", weights=weights),
        ("m", "m"),
    )
    before = run(model, X)
    run_passes(model, ["fused-qkv"])
    assert kinds(model) == ["MatMul", "MatMul"]
    for a, b in zip(run(model, X), before, strict=True):
        assert torch.equal(a, b)


def test_an_unknown_pass() -> None:
    with pytest.raises(
        RequestError, match=r"there is no pass fusing; there are constant-folding, dead-code, .*fused-qkv"
    ):
        run_passes(parse("y = Exp(x)"), ["dead-code", "fusing"])


@pytest.fixture(scope="module")
def unet() -> tuple[Component, ir.Model]:
    component = tiny.unet()
    return component, to_model(component, component.build(), passes=())[0]


def run_named(model: ir.Model, values: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [str(value.name) for value in model.graph.outputs]
    given = [values[str(value.name)] for value in model.graph.inputs]
    return dict(zip(names, run(model, *given), strict=True))


def test_all_passes_on_a_unet(unet: tuple[Component, ir.Model]) -> None:
    component, model = unet
    given = example_inputs(component, component.example_sizes)
    values = {spec.name: x for spec, x in zip(component.inputs, given, strict=True)}
    tidied = model.clone()
    reports = run_passes(tidied, list(PASSES))
    assert set(DEFAULT) < set(PASSES)
    assert reports[0].after.nodes < reports[0].before.nodes  # the frequencies of the time embedding
    ours = sorted(node.op_type for node in model.graph if node.domain)
    assert sorted(node.op_type for node in tidied.graph if node.domain) == ours  # nothing was inlined
    assert (
        kinds(tidied).count("MatMul") == kinds(model).count("MatMul") - 3 * 4
    )  # four blocks: three to one, two to one
    before, after = run_named(model, values), run_named(tidied, values)
    assert relative_error(after["out_sample"], before["out_sample"]) < 1e-5
