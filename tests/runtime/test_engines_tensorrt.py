"""`runtime/engines/tensorrt.py`: what the TensorRT engine asks of TensorRT, against a stand-in that adds one. The real
one is in test_engines_tensorrt_gpu.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tensorrt_rtx_bindings as rtx
import torch
from helpers.fake_tensorrt import (
    FakeContext,
    FakeCuda,
    FakeEngine,
    FakeStream,
    FakeTensorRT,
    x_of,
)
from latentrt.errors import BackendError, EngineSizeError, RequestError
from latentrt.runtime.engines.tensorrt import TensorRTEngine

CPU = torch.device("cpu")


Load = Callable[..., TensorRTEngine]


def test_a_program_runs_over_the_caller_s_own_tensors(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    engine, static, out = load_engine(), x_of(2), {"y": torch.empty(2, 4)}
    program = engine.bind(static, out)
    assert program.capturable
    bound = len(fake_tensorrt.calls)
    for value in (1.0, 7.0):
        static["x"].fill_(value)
        program.prepare()
        program.run()
        assert out["y"].eq(value + 1).all()
    after = [call[1] for call in fake_tensorrt.calls[bound:]]
    # Addresses are bound once, and scratch is told where it is another.
    assert after == ["set_device_memory", "execute_async_v3", "execute_async_v3"]
    assert fake_tensorrt.contexts == 1
    engine(x_of(2))
    assert fake_tensorrt.contexts == 2  # a call has tensors of the engine's own
    assert out["y"].eq(8).all()


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            {"x": torch.zeros(2, 4).double()},
            {"y": torch.zeros(2, 4)},
            r"x is torch.float64; .* needs it as torch.float32",
        ),
        (
            {"x": torch.zeros(4, 2).T},
            {"y": torch.zeros(2, 4)},
            r"x is torch.float32, not contiguous; .* contiguous",
        ),
        ({"x": torch.zeros(2, 4)}, {}, r"also has the outputs y"),
        ({"x": torch.zeros(2, 4)}, {"y": torch.zeros(3, 4)}, r"y is \[3, 4\].*should be \[2, 4\]"),
        ({"x": torch.zeros(99, 4)}, {"y": torch.zeros(99, 4)}, r"batch"),
        ({"z": torch.zeros(2, 4)}, {"y": torch.zeros(2, 4)}, r"takes x; got z"),
    ],
)
def test_tensors_that_cannot_be_bound(load_engine: Load, inputs: Any, outputs: Any, message: str) -> None:
    with pytest.raises((BackendError, RequestError), match=message):
        load_engine().bind(inputs, outputs)


@pytest.mark.parametrize(
    ("capturable", "why"),
    [(True, []), (False, ["TensorRT for RTX reports that it cannot be captured"])],
    ids=["yes", "no"],
)
def test_what_tensorrt_for_rtx_can_capture(
    load_engine: Load,
    fake_cuda: FakeCuda,
    fake_tensorrt: FakeTensorRT,
    caplog: pytest.LogCaptureFixture,
    capturable: bool,
    why: list[str],
) -> None:
    fake_tensorrt.capturable = capturable
    assert load_engine("tensorrt").bind(x_of(1), {"y": torch.empty(1, 4)}).capturable
    assert fake_tensorrt.named("is_stream_capturable") == []
    assert load_engine("tensorrt-rtx").bind(x_of(1), {"y": torch.empty(1, 4)}).capturable == capturable
    assert caplog.messages == [f"the engine of unet runs without a CUDA graph: {told}" for told in why]
    # Asked of another stream than the current one, which may be the default.
    names = [call[1] for call in fake_tensorrt.calls[-2:]]
    assert names == ["set_device_memory", "is_stream_capturable"]
    assert fake_tensorrt.calls[-1][2] != fake_cuda.stream.cuda_stream


def test_the_order_of_calls(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    out = load_engine()(x_of(1))
    assert list(out) == ["y"]
    assert torch.equal(out["y"], x_of(1)["x"] + 1)
    assert [call[1] for call in fake_tensorrt.calls] == [
        "set_optimization_profile_async",
        "set_tensor_address",
        "set_input_shape",
        "infer_shapes",
        "set_tensor_address",
        "set_device_memory",
        "execute_async_v3",
    ]
    assert fake_tensorrt.strategies == [rtx.ExecutionContextAllocationStrategy.USER_MANAGED]


def test_the_products_own_api_has_what_is_called() -> None:
    """A stand-in agrees with anything; the real classes do not."""
    for fake_tensorrt, real in ((FakeContext, rtx.IExecutionContext), (FakeEngine, rtx.ICudaEngine)):
        called = [name for name in vars(fake_tensorrt) if not name.startswith("_")]
        assert called
        assert [name for name in called if not hasattr(real, name)] == []
    for name in ("streamable_weights_size", "device_memory_size_v2"):
        assert hasattr(rtx.ICudaEngine, name)
    assert hasattr(rtx.IRuntimeConfig, "set_execution_context_allocation_strategy")
    assert hasattr(rtx.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")


def test_addresses_are_bound_once_per_size(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    engine = load_engine()
    for _ in range(3):
        for batch in (1, 2):
            assert torch.equal(engine(x_of(batch))["y"], x_of(batch)["x"] + 1)
    assert fake_tensorrt.contexts == 2
    assert len(fake_tensorrt.named("set_tensor_address")) == 4
    assert len(fake_tensorrt.named("execute_async_v3")) == 6


def test_outputs_are_the_callers(load_engine: Load) -> None:
    engine = load_engine()
    first = engine(x_of(2))["y"]
    kept = first.clone()
    engine({"x": torch.full((2, 4), 9.0)})
    assert torch.equal(first, kept)


def test_a_caller_s_inference_mode_does_not_mark_what_is_kept(load_engine: Load) -> None:
    engine = load_engine()
    with torch.inference_mode():
        engine(x_of(2))
    assert torch.equal(engine(x_of(2))["y"], x_of(2)["x"] + 1)


def test_the_narrowest_profile_is_picked(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    engine = load_engine()
    for batch in (1, 2, 3, 4):
        engine(x_of(batch))
    assert [call[2] for call in fake_tensorrt.named("set_optimization_profile_async")] == [0, 1, 1, 0]


def test_sizes_outside_every_profile_are_refused(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    with pytest.raises(
        EngineSizeError, match=r"of unet was built for other sizes than batch 33: it takes batch"
    ):
        load_engine()(x_of(33))
    assert fake_tensorrt.contexts == 0


def test_an_engine_is_closed_when_it_has_run(load_engine: Load, fake_cuda: FakeCuda) -> None:
    """On whatever stream that was: TensorRT forbids to destroy a context that is running."""
    engine = load_engine()
    engine(x_of(1))
    contexts = weakref.WeakSet(engine._contexts.values())
    first, second = fake_cuda.stream, FakeStream(2)
    fake_cuda.stream = second
    here = []
    second.synchronize = lambda: here.append(len(contexts))  # type: ignore[method-assign]
    engine.close()
    assert (first.waited, second.waited, here) == (["stream 99"], ["event of 1"], [1])
    assert len(contexts) == 0


def test_an_unreferenced_engine_is_freed_at_once(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT
) -> None:
    """Its weights may be most of a GPU, and the collector does not know of them. What runs is waited for first."""
    engine = load_engine()
    engine(x_of(1))
    here: list[int] = []
    fake_cuda.stream = FakeStream(2)
    fake_cuda.stream.synchronize = lambda: here.append(len(fake_tensorrt.alive))  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        del engine
        assert (len(fake_tensorrt.alive), here, fake_cuda.stream.waited) == (0, [1], ["event of 1"])
    finally:
        gc.enable()


def test_a_closed_engine_says_so(load_engine: Load) -> None:
    engine = load_engine()
    engine(x_of(1))
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="unet was closed; load it again"):
        engine(x_of(1))
