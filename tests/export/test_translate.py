"""Traced operations in ONNX: forms that no model of the tests has, what a graph is made of, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from latentrt.errors import ExportError
from latentrt.export.builder import TRANSPOSED
from latentrt.export.check import export_checked
from latentrt.export.functions import DOMAIN, OPSET, PLUGIN, VERSION
from latentrt.kernels import attention, geglu, group_norm_silu, layer_norm, linear_geglu
from latentrt.runtime.engines.base import Component, TensorSpec
from torch import Tensor, nn


class Forms(nn.Module):
    """[B, 8, H, W] -> [B, N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.proj = nn.Parameter(torch.rand(16, 8))
        self.conv = nn.Conv2d(8, 8, 3, stride=(2, 1), padding=(0, 1), bias=False)
        self.out = nn.Linear(8, 4)
        self.register_buffer("table", torch.rand(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(self.conv(x) - 1, (1, 2, 3, 0))
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        h = group_norm_silu(h * self.table[2:3].reshape(8, 1, 1), self.weight, self.bias, 4, 1e-5)
        rows = layer_norm(h.flatten(2).transpose(1, 2), self.weight, self.bias, 1e-5)  # [B, N, 8]
        q = rows.unflatten(2, (2, 4))
        rows = attention(q, q, q, 0.7).flatten(-2) + geglu(torch.cat([rows, rows], -1)) / 3
        return self.out(linear_geglu(rows, self.proj)).sigmoid() * torch.arange(4)


def of(make: Callable[[], nn.Module], *outputs: str) -> Component:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    f32 = torch.float32
    given = (TensorSpec("x", ("batch", 8, "height", "width"), f32),)
    made = tuple(TensorSpec(name, ("batch", "rows", 4), f32) for name in outputs)
    return Component("forms", build, f32, given, made, "0", {"batch": 2, "height": 8, "width": 6})


def test_forms_that_no_model_has(tmp_path: Path) -> None:
    component = of(Forms, "y")
    _, figures = export_checked(component, tmp_path / "model.onnx")
    assert max(max(errors.values()) for errors in figures["relative_error"].values()) < 1e-5


def test_what_a_model_is_made_of(tmp_path: Path) -> None:
    component = of(Forms, "y")
    path = tmp_path / "model.onnx"
    export_checked(component, path)
    model = ir.load(path)
    assert dict(model.graph.opset_imports) == {"": OPSET, DOMAIN: VERSION}
    ours = {node.name: node for node in model.graph if node.domain == DOMAIN}
    assert set(ours) == {"GroupNormSilu", "LayerNorm", "DotProductAttention", "Geglu", "Geglu.1"}
    assert {function.name for function in model.functions.values()} == {n.op_type for n in ours.values()}
    for node in ours.values():
        assert {key: node.attributes[key].as_string() for key in PLUGIN} == PLUGIN
    assert ours["GroupNormSilu"].attributes["num_groups"].as_int() == 4
    assert ours["DotProductAttention"].attributes["scale"].as_float() == pytest.approx(0.7)
    names = set(model.graph.initializers)
    assert names >= {
        "weight",
        "bias",
        "conv.weight",
        "out.bias",
        f"out.weight{TRANSPOSED}",
        f"proj{TRANSPOSED}",
    }
    assert "proj" not in names
    stored = model.graph.initializers[f"proj{TRANSPOSED}"].const_value
    assert stored is not None
    assert torch.equal(torch.from_numpy(stored.numpy().copy()), component.build().proj.t())
    assert any(node.name.startswith("conv/Conv") for node in model.graph)


class Twice(nn.Module):
    """The same tensor under two names, and an input passed on."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.exp()
        return y, y, x


def test_outputs_that_are_one_tensor_keep_their_names(tmp_path: Path) -> None:
    component = of(Twice, "a", "b", "c")
    path = tmp_path / "model.onnx"
    export_checked(component, path)
    model = onnx.load(path)
    assert [output.name for output in model.graph.output] == ["a", "b", "c"]
    assert Counter(node.op_type for node in model.graph.node) == {"Exp": 1, "Identity": 2}


class Untranslated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            Untranslated,
            r"forms: aten\.softplus\.default, called in inner\.1, has no translation to ONNX; write the",
        ),
        (
            lambda: Calls(lambda x: F.pad(x, (1, 1), value=2.0)),
            r"pad with mode 'constant' and value 2\.0 .*zeros",
        ),
        (
            lambda: Calls(lambda x: F.scaled_dot_product_attention(x, x, x)),
            r"scaled_dot_product_attention is translated with is_causal=True, .* use latentrt\.kernels\.attention",
        ),
    ],
    ids=["unknown", "padding", "attention"],
)
def test_what_has_no_translation_is_named(tmp_path: Path, make: Callable[[], nn.Module], why: str) -> None:
    component = of(make, "y")
    with pytest.raises(ExportError, match=why):
        export_checked(component, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
