"""`export/check.py` and `onnx.py`: exports against the modules they were traced from, at sizes that tracing never saw;
and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from helpers import tiny_components as tiny
from latentrt.errors import ExportError
from latentrt.export.check import LIMITS, check_export, expected_outputs, export_checked
from latentrt.export.functions import OPSET
from latentrt.export.measures import relative_error
from latentrt.runtime.engines.base import Component, TensorSpec
from latentrt.runtime.engines.onnxruntime import OnnxRuntimeEngine
from latentrt.runtime.prepare import find_or_export_onnx
from tolerances import EXPORT_FLOAT16, EXPORT_FLOAT32
from torch import Tensor, nn

CPU = torch.device("cpu")

# Latent sizes: odd at every level, not square, one pixel, one row, and larger than the example.
LATENTS = [(8, 6), (5, 7), (1, 1), (1, 9), (16, 24)]


def worst_error(component: Component, cache_dir: Path, **sizes: int) -> float:
    """The largest relative error over the outputs, for inputs of one draw."""
    engine = OnnxRuntimeEngine(component, find_or_export_onnx(component, cache_dir=cache_dir), CPU)
    inputs = tiny.named_inputs(component, seed=7, **sizes)
    with torch.inference_mode():
        result = component.build()(*inputs.values())
    wanted = (result,) if isinstance(result, Tensor) else result
    return max(relative_error(a, b) for a, b in zip(engine(inputs).values(), wanted, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), LATENTS)
def test_unet(cache_dir: Path, batch: int, height: int, width: int) -> None:
    error = worst_error(tiny.unet(), cache_dir, batch=batch, height=height, width=width)
    assert error < EXPORT_FLOAT32


@pytest.mark.parametrize("tokens", [1, 77, 154])
def test_unet_prompt_lengths(cache_dir: Path, tokens: int) -> None:
    assert worst_error(tiny.unet(), cache_dir, tokens=tokens) < EXPORT_FLOAT32


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), LATENTS)
def test_vae_decoder(cache_dir: Path, batch: int, height: int, width: int) -> None:
    error = worst_error(tiny.vae_decoder(), cache_dir, batch=batch, height=height, width=width)
    assert error < EXPORT_FLOAT32


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), LATENTS)
def test_vae_encoder(cache_dir: Path, batch: int, height: int, width: int) -> None:
    sizes = {"batch": batch, "image_height": 8 * height, "image_width": 8 * width}
    assert worst_error(tiny.vae_encoder(), cache_dir, **sizes) < EXPORT_FLOAT32


@pytest.mark.parametrize("batch", [1, 3])
def test_text_encoder(cache_dir: Path, batch: int) -> None:
    assert worst_error(tiny.text_encoder(), cache_dir, batch=batch) < EXPORT_FLOAT32


def test_text_encoder_layers(cache_dir: Path) -> None:
    component = tiny.text_encoder()
    engine = OnnxRuntimeEngine(component, find_or_export_onnx(component, cache_dir=cache_dir), CPU)
    inputs = tiny.named_inputs(component)
    sequences = [engine({**inputs, "layer": torch.tensor(layer)})["sequence"] for layer in (0, 1, 2)]
    for layer, sequence in enumerate(sequences):
        wanted = component.build()(inputs["input_ids"], torch.tensor(layer))[0]
        assert relative_error(sequence, wanted) < EXPORT_FLOAT32
    assert relative_error(sequences[1], sequences[2]) > 0.1


def test_unet_in_half_precision(cache_dir: Path) -> None:
    # One level is enough for what goes wrong in half precision: the time embedding is computed in float32.
    config = {
        **tiny.UNET,
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "transformer_layers_per_block": [1],
        "attention_head_dim": [2],
    }
    assert worst_error(tiny.unet(torch.float16, config), cache_dir, batch=3) < EXPORT_FLOAT16


def test_bfloat16_is_written_and_valid(tmp_path: Path) -> None:
    component = tiny.affine(torch.bfloat16)
    path = tmp_path / "model.onnx"
    _, check = export_checked(component, path)
    model = onnx.load(path)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert check == {}  # nothing on the CPU runs it


def test_the_model_says_what_it_is(cache_dir: Path) -> None:
    component = tiny.unet()
    path = find_or_export_onnx(component, cache_dir=cache_dir)
    model = onnx.load(path, load_external_data=False)
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["latentrt.component"] == "unet"
    assert properties["latentrt.fingerprint"] == component.fingerprint
    assert properties["latentrt.dtype"] == "float32"
    assert json.loads(properties["latentrt.config"]) == tiny.UNET
    assert properties["torch.version"] == torch.__version__
    assert properties["onnx.version"] == onnx.__version__
    assert {o.domain: o.version for o in model.opset_import}[""] == OPSET
    dims = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert dims["sample"] == ["batch", 4, "height", "width"]
    assert dims["timestep"] == ["batch"]
    assert dims["encoder_hidden_states"] == ["batch", "tokens", 24]
    assert dims["out_sample"] == ["batch", 4, "height", "width"]
    assert list(dims) == [spec.name for spec in (*component.inputs, *component.outputs)]


def test_the_model_holds_no_path_of_the_machine(cache_dir: Path) -> None:
    path = find_or_export_onnx(tiny.unet(), cache_dir=cache_dir)
    assert b".py" not in path.read_bytes()


def test_the_manifest_has_the_figures_of_the_check(cache_dir: Path) -> None:
    path = find_or_export_onnx(tiny.unet(), cache_dir=cache_dir)
    figures = json.loads((path.parent / "manifest.json").read_text())["figures"]
    assert figures["limit"] == LIMITS[torch.float32]
    errors = figures["relative_error"]
    assert list(errors) == ["batch=2 height=8 width=6 tokens=77", "batch=1 height=12 width=9 tokens=115"]
    assert all(0 < e["out_sample"] < EXPORT_FLOAT32 for e in errors.values())


# --- what is refused


class Pinned(nn.Module):
    """Uses the batch size as a number, which pins it while tracing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(len(x))[:, None]


class Branching(nn.Module):
    """Has no graph: which way it goes depends on what is in the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def of(make: Callable[[], nn.Module]) -> Component:
    return Component(
        "affine",
        make,
        torch.float32,
        (TensorSpec("x", ("batch", 4), torch.float32),),
        (TensorSpec("y", ("batch", 4), torch.float32),),
        "0",
        {"batch": 2},
    )


@pytest.mark.parametrize(
    ("make", "why"), [(Pinned, "batch"), (Branching, "data-dependent")], ids=["pinned", "branching"]
)
def test_what_cannot_be_traced_is_refused(tmp_path: Path, make: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ExportError, match=rf"affine cannot be exported to ONNX: (?s:.*){why}"):
        export_checked(of(make), tmp_path / "model.onnx")


def test_an_export_that_computes_something_else_is_refused(cache_dir: Path) -> None:
    path = find_or_export_onnx(tiny.affine(), cache_dir=cache_dir)
    other = tiny.affine().build()
    with torch.no_grad():
        other.linear.bias[2] += 1e-2
    expected = expected_outputs(tiny.affine(), other)
    with pytest.raises(ExportError, match=r"of affine computes something else than PyTorch: .*limit 0\.0001"):
        check_export(tiny.affine(), path, expected)


def test_a_refused_export_is_not_kept(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    component = tiny.affine(seed=5)
    monkeypatch.setitem(LIMITS, torch.float32, -1.0)
    with pytest.raises(ExportError, match="computes something else"):
        find_or_export_onnx(component, cache_dir=cache_dir)
    monkeypatch.setitem(LIMITS, torch.float32, 1e-4)
    assert find_or_export_onnx(component, cache_dir=cache_dir).exists()


def test_an_export_that_does_not_run_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    component = tiny.affine()
    path = find_or_export_onnx(component, cache_dir=cache_dir)
    expected = expected_outputs(component, component.build())
    renamed = replace(component, inputs=(TensorSpec("z", ("batch", 4), torch.float32),))
    with pytest.raises(ExportError, match="the export of affine does not run"):
        check_export(renamed, path, expected)
    (tmp_path / "model.onnx").write_bytes(b"?")
    with pytest.raises(ExportError, match="the export of affine does not load"):
        check_export(component, tmp_path / "model.onnx", expected)


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.conv(x))


def test_half_precision_convolutions_are_compared_with_wide_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    half = TensorSpec("x", ("batch", 4, "height", 5), torch.float16)
    module = Convolving().half().requires_grad_(False)
    component = Component("c", Convolving, torch.float16, (half,), (half,), "0", {"batch": 2, "height": 6})
    seen: list[torch.dtype] = []
    convolve = nn.Conv2d._conv_forward

    def watch(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.extend([x.dtype, weight.dtype])
        return convolve(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", watch)
    first, _ = expected_outputs(component, module)
    assert set(seen) == {torch.float32}
    exact = Convolving().requires_grad_(False)
    exact.load_state_dict({name: x.float() for name, x in module.state_dict().items()})
    wanted = torch.nn.functional.silu(exact.conv(first.inputs[0].float()).half())
    assert first.outputs[0].dtype == torch.float16
    assert torch.equal(first.outputs[0], wanted)
    seen.clear()
    module(first.inputs[0])
    assert set(seen) == {torch.float16}  # the module is as it was
