"""The protocol's helpers, the eager back end and the choice among back ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from latentrt.errors import BackendError, BackendUnavailableError, UnknownBackendError
from latentrt.runtime.engines.base import (
    Component,
    TensorSpec,
    check_inputs,
    example_inputs,
    ordered_inputs,
    output_shapes,
)
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.engines.lazy import EngineLoader
from latentrt.runtime.engines.registry import (
    backend_names,
    choose,
    describe,
    get_backend,
)
from latentrt.runtime.loading import load_components
from latentrt.runtime.weights import open_checkpoint
from torch import nn

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def load(component: Component) -> Any:
    return EagerBackend().load(component, device=CPU, cache_dir=None)


@pytest.fixture
def no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find_spec(name, *a)
    )


# --- examples and arguments


def test_examples_are_seeded_and_keep_to_their_values() -> None:
    component = tiny.text_encoder()
    ids, layer = example_inputs(component, {"batch": 50}, seed=3)
    again, _ = example_inputs(component, {"batch": 50}, seed=3)
    other, _ = example_inputs(component, {"batch": 50}, seed=4)
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    assert ids.shape == (50, 77)
    assert ids.dtype == torch.int64
    assert (ids[:, -1] == 59).all()  # each prompt ends
    assert 0 <= ids.min() < 5
    assert ids[:, :-1].max() == 59  # vocab_size - 1: the bound itself is not drawn
    assert layer.shape == ()


def test_float_examples() -> None:
    sample, timestep, *_ = example_inputs(
        tiny.unet(torch.float16), {**tiny.unet().example_sizes, "batch": 99}
    )
    assert sample.dtype == torch.float16
    assert 0.8 < sample.float().std() < 1.2
    assert timestep.dtype == torch.float32
    assert 0 <= timestep.min() < 100
    assert 900 < timestep.max() < 1000


def test_outputs_have_the_shapes_that_their_inputs_say() -> None:
    components = load_components(open_checkpoint("demo"), torch.float32).values()
    assert len(components) == 5
    for component in components:
        drawn = example_inputs(component, {**component.example_sizes, "batch": 1})
        inputs = {spec.name: x for spec, x in zip(component.inputs, drawn, strict=True)}
        found = load(component)(inputs)
        assert output_shapes(component, inputs) == {name: tuple(x.shape) for name, x in found.items()}
        assert {spec.name: spec.dtype for spec in component.outputs} == {n: x.dtype for n, x in found.items()}


@pytest.mark.parametrize(
    ("model", "dtype", "upcast", "runs_in", "tf32"),
    [
        ("sdxl", torch.float16, torch.float32, torch.float32, True),
        ("sdxl", torch.float16, torch.bfloat16, torch.bfloat16, False),
        ("sdxl", torch.float32, torch.float32, torch.float32, False),
        ("sd15", torch.float16, torch.float32, torch.float16, False),
    ],
)
def test_a_vae_that_is_in_float32_for_its_range_alone_may_be_rounded(
    model: str,
    dtype: torch.dtype,
    upcast: torch.dtype,
    runs_in: torch.dtype,
    tf32: bool,
    tiny: Callable[..., Path],
) -> None:
    """Only it: where float32 was asked for, so was its accuracy."""
    found = load_components(open_checkpoint(tiny(model)), dtype, upcast=upcast)
    for name, component in found.items():
        wanted = (runs_in, tf32) if name.startswith("vae") else (dtype, False)
        assert (component.dtype, component.tf32) == wanted, name


def test_integers_without_values_cannot_be_drawn() -> None:
    spec = TensorSpec("index", ("batch",), torch.int64)
    component = Component("table", nn.Identity, torch.float32, (spec,), (), "", {"batch": 2})
    with pytest.raises(BackendError, match=r"table: index is torch.int64 and states no values"):
        example_inputs(component, {"batch": 2})


def test_inputs_are_ordered_and_cast() -> None:
    component = tiny.unet()
    inputs = tiny.named_inputs(component)
    shuffled = {name: inputs[name] for name in sorted(inputs, reverse=True)}
    shuffled["timestep"] = shuffled["timestep"].long()
    ordered = ordered_inputs(component, shuffled)
    assert [x.shape for x in ordered] == [inputs[s.name].shape for s in component.inputs]
    assert ordered[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"affine takes x; got $"),
        ({"y": torch.zeros(2, 4)}, r"affine takes x; got x, y"),
        ({"x": torch.zeros(2, 5)}, r"affine: x has shape \[2, 5\], should be \[batch=2, 4\]"),
        ({"x": torch.zeros(4)}, r"affine: x has shape \[4\], should be"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = {k: v for k, v in ({"x": torch.zeros(2, 4)} | change).items() if v is not None}
    with pytest.raises(BackendError, match=message):
        check_inputs(tiny.affine(), inputs)


def test_a_shared_dimension_has_one_size() -> None:
    component = tiny.unet()
    inputs = tiny.named_inputs(component)
    inputs["timestep"] = torch.zeros(3)
    with pytest.raises(BackendError, match=r"unet: timestep has shape \[3\], should be \[batch=2\]"):
        check_inputs(component, inputs)


# --- eager


def test_eager_computes_the_module() -> None:
    component = tiny.text_encoder()
    inputs = example_inputs(component, {"batch": 2})
    got = load(component)({"layer": inputs[1], "input_ids": inputs[0]})
    sequence, pooled = component.build()(*inputs)
    assert torch.equal(got["sequence"], sequence)
    assert torch.equal(got["pooled"], pooled)
    assert not got["pooled"].requires_grad


def test_eager_in_half_precision() -> None:
    got = load(tiny.affine(torch.bfloat16))({"x": torch.ones(2, 4)})
    assert got["y"].dtype == torch.bfloat16


def test_a_closed_engine_says_so() -> None:
    engine = load(tiny.affine())
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="affine was closed"):
        engine({"x": torch.zeros(2, 4)})


# --- the choice


def test_an_unknown_back_end_lists_those_there_are() -> None:
    with pytest.raises(
        UnknownBackendError,
        match=r"no back end 'tensorflow'; there are onnxruntime, eager, triton, tensorrt, tensorrt-rtx, and auto",
    ):
        choose("tensorflow", CPU)
    assert {get_backend(name).name for name in backend_names()} == set(backend_names())


def test_auto_takes_onnxruntime_on_the_cpu_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="latentrt"):
        backend = choose("auto", CPU)
    assert backend.name == "onnxruntime"
    assert "back end onnxruntime: the best for cpu; ONNX Runtime 1." in caplog.text


@pytest.mark.usefixtures("no_onnxruntime")
def test_auto_without_onnxruntime_says_what_it_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="latentrt"):
        backend = choose("auto", CPU)
    assert backend.name == "eager"
    passed_over = 'passed over onnxruntime: onnxruntime is not installed (pip install "latentrt[cpu]")'
    assert passed_over in caplog.text
    assert [row.name for row in describe(CPU) if row.available] == ["eager", "triton"]


@pytest.mark.usefixtures("no_onnxruntime")
def test_an_unavailable_back_end_says_why_and_what_to_do() -> None:
    with pytest.raises(BackendUnavailableError, match=r"not installed; pip install \"latentrt\[cpu\]\""):
        choose("onnxruntime", CPU)


def test_bfloat16_is_not_for_onnxruntime() -> None:
    with pytest.raises(BackendUnavailableError, match="no bfloat16 convolution; use float32 or float16"):
        choose("onnxruntime", CPU, torch.bfloat16)
    assert choose("auto", CPU, torch.bfloat16).name == "eager"


def test_a_back_end_runs_every_dtype_there_is(cache_dir: Path) -> None:
    """As a float16 pipeline's VAE, which was upcast for the GPU that it leaves."""
    loader = EngineLoader("auto", CPU, torch.float32, cache_dir)
    upcast = loader.engine(tiny.affine(torch.bfloat16))
    assert loader.backend.name == "onnxruntime"
    loader.move(CPU)
    assert loader.backend.name == "eager"
    assert upcast({"x": torch.zeros(2, 4, dtype=torch.bfloat16)})["y"].dtype == torch.bfloat16
    loader = EngineLoader("onnxruntime", CPU, torch.float32, cache_dir)
    engine = loader.engine(tiny.affine())
    upcast = loader.engine(tiny.affine(torch.bfloat16))
    loaded = engine.load()
    with pytest.raises(BackendUnavailableError, match="no bfloat16 convolution"):
        loader.move(CPU)
    assert not upcast.present
    assert engine.load() is loaded


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="sees no CUDA device; install a CUDA build of PyTorch"):
        choose("eager", CUDA)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_it_says_so(name: str, cache_dir: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match=rf"{name}'.*runs on NVIDIA GPUs only; use device 'cuda'"
    ):
        get_backend(name).load(tiny.affine(), device=CPU, cache_dir=cache_dir)


def test_a_device_without_a_provider() -> None:
    with pytest.raises(BackendUnavailableError, match="no provider for mps; use device 'cpu' or 'cuda'"):
        choose("onnxruntime", torch.device("mps"))


def test_describe_has_every_back_end_and_one_preferred() -> None:
    rows = describe(CPU)
    assert {row.name for row in rows} == set(backend_names())
    assert [row.name for row in rows if row.preferred] == ["onnxruntime"]
    assert all(row.available or row.remedy for row in rows)
    assert [row.name for row in describe(CPU) if row.available] == ["onnxruntime", "eager", "triton"]


def test_named_dimensions_are_filled_in() -> None:
    assert TensorSpec("x", ("batch", 4, "height"), torch.float32).shape({"batch": 3, "height": 5}) == (
        3,
        4,
        5,
    )
