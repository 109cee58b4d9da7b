"""`engines/tensorrt.py`: how an engine is loaded and what TensorRT says meanwhile, against a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tensorrt_rtx_bindings as rtx
import torch
from helpers.fake_tensorrt import (
    ADD_ONE,
    WIDE,
    FakeCuda,
    FakeTensorRT,
    x_of,
)
from latentrt.errors import BackendError
from latentrt.runtime.engine_store import StoredEngine
from latentrt.runtime.engines import plugins, products
from latentrt.runtime.engines.scratch import Scratch
from latentrt.runtime.engines.tensorrt import TensorRTEngine
from latentrt.runtime.memory import RESERVE

CPU = torch.device("cpu")
Load = Callable[..., TensorRTEngine]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("create_execution_context", r"cannot make an execution context \(no memory\)"),
        ("set_optimization_profile_async", r"cannot take profile 1 \(Error Code 3: it broke\)"),
        ("set_tensor_address", r"has no tensor x \(Error Code 3: it broke\)"),
        ("set_input_shape", r"refuses x of shape \[2, 4\] \(Error Code 3: it broke\)"),
        ("execute_async_v3", r"failed \(Error Code 3: it broke\)"),
    ],
)
def test_errors_carry_the_log(load_engine: Load, fake_tensorrt: FakeTensorRT, call: str, what: str) -> None:
    engine = load_engine()
    fake_tensorrt.failing = call
    with pytest.raises(BackendError, match=rf"^TensorRT 1\.0\.fake, unet: {what}"):
        engine(x_of(2))
    fake_tensorrt.failing = ""
    assert torch.equal(engine(x_of(2))["y"], x_of(2)["x"] + 1)
    assert fake_tensorrt.log.errors == []


def test_unknown_output_shapes_are_refused(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    fake_tensorrt.unknown = ["y"]
    with pytest.raises(BackendError, match=r"cannot tell the shape of y \(it does not say why\)"):
        load_engine()(x_of(2))


def test_what_tensorrt_warns_of_at_load_is_passed_on(
    load_engine: Load, fake_tensorrt: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    fake_tensorrt.warnings = ["Using an engine plan file\n across different models of devices"]
    load_engine()
    assert caplog.messages == [
        "TensorRT, as it loads the engine of unet: Using an engine plan file across different models of devices"
    ]


def test_a_gpu_that_does_not_start(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    fake_tensorrt.failing = "Runtime"
    with pytest.raises(
        BackendError,
        match=r"unet: cannot start; see that its GPU and driver work \(CUDA initialization failure",
    ):
        load_engine()


def test_a_plan_that_is_none(load_engine: Load) -> None:
    with pytest.raises(BackendError, match=r"unet: cannot load \S*model.plan \(magicTag mismatch\)"):
        load_engine(plan=b"something else")


def test_an_engine_that_is_pruned_before_it_is_read(load_engine: Load, tmp_path: Path) -> None:
    stored = StoredEngine("0", tmp_path / "gone" / "model.plan", (WIDE,), {}, {}, False)
    with pytest.raises(
        BackendError, match=r"unet: \S*gone/model.plan was removed from the cache .*; try again"
    ):
        TensorRTEngine(ADD_ONE, stored, products.product("tensorrt"), CPU, Scratch(CPU))


GB = 1 << 30


@pytest.mark.parametrize("product", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("free", "held"),
    [(8 * GB, 5 * GB), (4 * GB, 4 * GB - RESERVE - 3200), (GB // 8, 0)],
    ids=["all fit", "some stay on the host", "all stay there"],
)
def test_weights_that_do_not_fit_stay_on_the_host(
    load_engine: Load,
    fake_cuda: FakeCuda,
    fake_tensorrt: FakeTensorRT,
    caplog: pytest.LogCaptureFixture,
    product: str,
    free: int,
    held: int,
) -> None:
    """Such an engine's execution is waited for, and cannot be captured: TensorRT's own words."""
    fake_tensorrt.streamable, fake_cuda.free = 5 * GB, free
    program = load_engine(product).bind(x_of(1), {"y": torch.empty(1, 4)})
    assert fake_tensorrt.engine is not None
    assert fake_tensorrt.engine.weight_streaming_budget_v2 == held
    assert program.capturable == (held == 5 * GB)
    told = [] if program.capturable else ["of its weights stay in host memory"]
    assert [message.split(" GB ")[-1] for message in caplog.messages] == told


def test_a_refused_streaming_budget_is_logged(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    fake_tensorrt.streamable, fake_cuda.free, fake_tensorrt.failing = (
        5 * GB,
        4 * GB,
        "weight_streaming_budget_v2",
    )
    assert load_engine().bind(x_of(1), {"y": torch.empty(1, 4)}).capturable
    (message,) = caplog.messages
    assert "keeps 5.37 GB of unet's weights on the GPU in place of the 4.03 GB asked for" in message


def test_rtx_specialises_before_it_runs(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    load_engine("tensorrt-rtx")(x_of(1))
    (config,) = fake_tensorrt.strategies
    eager = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == eager


def test_plugins_are_registered_before_the_engine_is_read(
    load_engine: Load, fake_tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        plugins, "loading", lambda trt, wanted: asked.append((trt, wanted, fake_tensorrt.engine))
    )
    load_engine(with_plugins={"GroupNorm": "1-x"})
    assert asked == [(fake_tensorrt, {"GroupNorm": "1-x"}, None)]


def test_a_plugin_that_is_missing_is_named(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    with pytest.raises(
        BackendError,
        match=r"^unet: its engine was built with the plugin Geglu 1-x, and this latentrt has only Group",
    ):
        load_engine(with_plugins={"Geglu": "1-x"})
    assert fake_tensorrt.engine is None


def test_a_plugin_s_refusal_is_in_the_error(
    load_engine: Load, fake_tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine()
    monkeypatch.setattr(
        plugins, "failures", lambda trt: ["GroupNorm: no kernels"] if trt is fake_tensorrt else []
    )
    fake_tensorrt.failing = "execute_async_v3"
    with pytest.raises(BackendError, match=r"unet: failed \(GroupNorm: no kernels; Error Code 3: it broke\)"):
        engine(x_of(2))
