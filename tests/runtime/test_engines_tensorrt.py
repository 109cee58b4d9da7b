"""What the TensorRT engine asks of TensorRT, against a stand-in that adds one. The real thing is in the file beside."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx_bindings as rtx
import torch
from helpers.fake_tensorrt import (
    ADD_ONE,
    FakeContext,
    FakeCuda,
    FakeEngine,
    FakeStream,
    FakeTensorRT,
    install,
)
from latentrt.errors import BackendError, EngineSizeError, RequestError
from latentrt.runtime.engine_store import StoredEngine
from latentrt.runtime.engines import lazy, plugins, trt
from latentrt.runtime.engines import tensorrt as engines
from latentrt.runtime.engines.scratch import Scratch
from latentrt.runtime.engines.sizes import Axis, Profile
from latentrt.runtime.engines.tensorrt import TensorRTEngine
from latentrt.runtime.graph import Graphs
from latentrt.runtime.memory import RESERVE
from torch import Tensor

CPU = torch.device("cpu")
NARROW, WIDE = Profile({"batch": Axis(2, 2, 3)}), Profile({"batch": Axis(1, 2, 32)})


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeTensorRT, FakeCuda]:
    return install(monkeypatch, {b"an engine": ADD_ONE})


@pytest.fixture
def fake(stand_ins: tuple[FakeTensorRT, FakeCuda]) -> FakeTensorRT:
    return stand_ins[0]


@pytest.fixture
def cuda(stand_ins: tuple[FakeTensorRT, FakeCuda]) -> FakeCuda:
    return stand_ins[1]


Load = Callable[..., TensorRTEngine]


@pytest.fixture
def load(fake: FakeTensorRT, cuda: FakeCuda, tmp_path: Path) -> Load:
    def load(
        product: str = "tensorrt",
        scratch: Scratch | None = None,
        plan: bytes = b"an engine",
        with_plugins: Mapping[str, str] | None = None,
    ) -> TensorRTEngine:
        (tmp_path / "model.plan").write_bytes(plan)
        stored = StoredEngine("0", tmp_path / "model.plan", (WIDE, NARROW), {}, with_plugins or {}, False)
        return TensorRTEngine(ADD_ONE, stored, trt.product(product), CPU, scratch or Scratch(CPU))

    return load


def x_of(batch: int) -> dict[str, Tensor]:
    return {"x": torch.arange(batch * 4, dtype=torch.float32).view(batch, 4)}


def test_a_program_runs_over_the_caller_s_own_tensors(load: Load, fake: FakeTensorRT) -> None:
    engine, static, out = load(), x_of(2), {"y": torch.empty(2, 4)}
    program = engine.bind(static, out)
    assert program.capturable
    bound = len(fake.calls)
    for value in (1.0, 7.0):
        static["x"].fill_(value)
        program.prepare()
        program.run()
        assert out["y"].eq(value + 1).all()
    after = [call[1] for call in fake.calls[bound:]]
    # Addresses are bound once, and scratch is told where it is another.
    assert after == ["set_device_memory", "execute_async_v3", "execute_async_v3"]
    assert fake.contexts == 1
    engine(x_of(2))
    assert fake.contexts == 2  # a call has tensors of the engine's own
    assert out["y"].eq(8).all()


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            {"x": torch.zeros(2, 4).double()},
            {"y": torch.zeros(2, 4)},
            r"x is torch.float64; bound, it must be torch.float32",
        ),
        ({"x": torch.zeros(4, 2).T}, {"y": torch.zeros(2, 4)}, r"x is torch.float32, not contiguous; bound"),
        ({"x": torch.zeros(2, 4)}, {}, r"also writes y"),
        ({"x": torch.zeros(2, 4)}, {"y": torch.zeros(3, 4)}, r"y is \[3, 4\].*should be \[2, 4\]"),
        ({"x": torch.zeros(99, 4)}, {"y": torch.zeros(99, 4)}, r"batch"),
        ({"z": torch.zeros(2, 4)}, {"y": torch.zeros(2, 4)}, r"takes x; got z"),
    ],
)
def test_tensors_that_cannot_be_bound(load: Load, inputs: Any, outputs: Any, message: str) -> None:
    with pytest.raises((BackendError, RequestError), match=message):
        load().bind(inputs, outputs)


@pytest.mark.parametrize(
    ("capturable", "why"), [(True, []), (False, ["TensorRT for RTX says so"])], ids=["yes", "no"]
)
def test_what_tensorrt_for_rtx_can_capture(
    load: Load,
    cuda: FakeCuda,
    fake: FakeTensorRT,
    caplog: pytest.LogCaptureFixture,
    capturable: bool,
    why: list[str],
) -> None:
    fake.capturable = capturable
    assert load("tensorrt").bind(x_of(1), {"y": torch.empty(1, 4)}).capturable
    assert fake.named("is_stream_capturable") == []
    assert load("tensorrt-rtx").bind(x_of(1), {"y": torch.empty(1, 4)}).capturable == capturable
    assert caplog.messages == [f"the engine of unet runs without a CUDA graph: {told}" for told in why]
    # Asked of another stream than the current one, which may be the default.
    names = [call[1] for call in fake.calls[-2:]]
    assert names == ["set_device_memory", "is_stream_capturable"]
    assert fake.calls[-1][2] != cuda.stream.cuda_stream


def test_the_order_of_calls(load: Load, fake: FakeTensorRT) -> None:
    out = load()(x_of(1))
    assert list(out) == ["y"]
    assert torch.equal(out["y"], x_of(1)["x"] + 1)
    assert [call[1] for call in fake.calls] == [
        "set_optimization_profile_async",
        "set_tensor_address",
        "set_input_shape",
        "infer_shapes",
        "set_tensor_address",
        "set_device_memory",
        "execute_async_v3",
    ]
    assert fake.strategies == [rtx.ExecutionContextAllocationStrategy.USER_MANAGED]


def test_the_products_own_api_has_what_is_called() -> None:
    """A stand-in agrees with anything; the real classes do not."""
    for fake, real in ((FakeContext, rtx.IExecutionContext), (FakeEngine, rtx.ICudaEngine)):
        called = [name for name in vars(fake) if not name.startswith("_")]
        assert called
        assert [name for name in called if not hasattr(real, name)] == []
    for name in ("streamable_weights_size", "device_memory_size_v2"):
        assert hasattr(rtx.ICudaEngine, name)
    assert hasattr(rtx.IRuntimeConfig, "set_execution_context_allocation_strategy")
    assert hasattr(rtx.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")


def test_addresses_are_bound_once_per_size(load: Load, fake: FakeTensorRT) -> None:
    engine = load()
    for _ in range(3):
        for batch in (1, 2):
            assert torch.equal(engine(x_of(batch))["y"], x_of(batch)["x"] + 1)
    assert fake.contexts == 2
    assert len(fake.named("set_tensor_address")) == 4
    assert len(fake.named("execute_async_v3")) == 6


def test_outputs_are_the_callers(load: Load) -> None:
    engine = load()
    first = engine(x_of(2))["y"]
    kept = first.clone()
    engine({"x": torch.full((2, 4), 9.0)})
    assert torch.equal(first, kept)


def test_a_caller_s_inference_mode_does_not_mark_what_is_kept(load: Load) -> None:
    engine = load()
    with torch.inference_mode():
        engine(x_of(2))
    assert torch.equal(engine(x_of(2))["y"], x_of(2)["x"] + 1)


def test_the_narrowest_profile_is_picked(load: Load, fake: FakeTensorRT) -> None:
    engine = load()
    for batch in (1, 2, 3, 4):
        engine(x_of(batch))
    assert [call[2] for call in fake.named("set_optimization_profile_async")] == [0, 1, 1, 0]


def test_sizes_outside_every_profile_are_refused(load: Load, fake: FakeTensorRT) -> None:
    with pytest.raises(
        EngineSizeError, match=r"of unet was built for other sizes than batch 33: it takes batch"
    ):
        load()(x_of(33))
    assert fake.contexts == 0


def test_scratch_grows_and_is_shared(load: Load, fake: FakeTensorRT) -> None:
    scratch = Scratch(CPU)
    one, other = load(scratch=scratch), load(scratch=scratch)
    for engine, batch in ((one, 2), (other, 4), (one, 2), (other, 1)):
        engine(x_of(batch))
    memory = [call[2:] for call in fake.named("set_device_memory")]
    assert [size for _, size in memory] == [200, 400, 400, 400]
    assert len({address for address, _ in memory[1:]}) == 1


def test_another_stream_waits_for_the_scratch(load: Load, cuda: FakeCuda, fake: FakeTensorRT) -> None:
    engine = load()
    first, second = cuda.stream, FakeStream(2)
    engine(x_of(1))
    engine(x_of(1))
    cuda.stream = second
    engine(x_of(1))
    assert (first.waited, second.waited) == (["stream 99"] * 2, ["event of 1", "stream 99"])
    assert engine._stream.waited == ["stream 1", "stream 1", "stream 2"]  # type: ignore[attr-defined]
    assert [call[2] for call in fake.named("execute_async_v3")] == [99, 99, 99]


def test_an_execution_is_never_on_the_default_stream(
    load: Load, cuda: FakeCuda, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On which TensorRT synchronises. What is captured is on the stream of the capture, which is another."""
    monkeypatch.setattr(
        FakeStream, "wait_stream", lambda *two: fake.calls.append((*(s.cuda_stream for s in two), "waits"))
    )
    program = load().bind(x_of(1), {"y": torch.empty(1, 4)})
    fake.calls.clear()
    program.run()
    assert fake.calls[1:] == [(99, 1, "waits"), (1, "execute_async_v3", 99), (1, 99, "waits")]
    fake.calls.clear()
    cuda.stream, cuda.capturing = FakeStream(7), True
    program.run()
    assert fake.calls == [(1, "execute_async_v3", 7)]


def test_a_capture_before_a_first_run_is_refused(load: Load, cuda: FakeCuda, fake: FakeTensorRT) -> None:
    engine = load()
    engine(x_of(1))
    cuda.capturing = True
    engine(x_of(1))
    with pytest.raises(BackendError, match="unet was captured before it had run; run it once at these sizes"):
        engine(x_of(2))
    assert fake.contexts == 1


def test_a_capture_keeps_its_scratch(load: Load, cuda: FakeCuda, fake: FakeTensorRT) -> None:
    engine = load()
    engine(x_of(1))
    cuda.capturing = True
    engine(x_of(1))
    cuda.capturing = False
    held = fake.named("set_device_memory")[-1][2]
    engine(x_of(8))  # grows it
    assert fake.named("set_device_memory")[-1][2] != held
    context, _ = engine._contexts.values()
    assert [buffer.data_ptr() for buffer in context.captured] == [held]


def test_a_captured_program_s_scratch_goes_with_it(load: Load, cuda: FakeCuda) -> None:
    """It may be gigabytes: a larger size came, and then the loop of the smaller one was dropped."""
    engine = load()
    x, y = x_of(1), {"y": torch.empty(1, 4)}
    program = engine.bind(x, y)
    program.run()
    cuda.capturing = True
    program.run()
    program.run()
    cuda.capturing = False
    first = weakref.ref(engine._scratch._buffer)
    engine(x_of(4))
    gc.collect()
    assert first() is not None
    assert first() is not engine._scratch._buffer
    del program
    gc.collect()
    assert first() is None


def test_a_recorded_call_keeps_what_it_was_recorded_over(
    load: Load, cuda: FakeCuda, fake: FakeTensorRT
) -> None:
    """A CUDA graph has addresses only: of the context's memory, and of the scratch."""

    class OfAddresses(Graphs):
        def capture(self, work: Callable[[], object], what: str) -> Any:
            work()
            cuda.capturing = True
            work()
            cuda.capturing = False
            return SimpleNamespace(replay=lambda: None)

    engine = load()
    call = lazy._Call(ADD_ONE, engine, x_of(1), OfAddresses(CPU))
    scratch = weakref.ref(engine._scratch._buffer)
    engine(x_of(4))  # grows it
    engine.close()
    gc.collect()
    assert (len(fake.alive), scratch() is None) == (1, False)
    del call
    gc.collect()
    assert (len(fake.alive), scratch() is None) == (0, True)


def test_scratch_too_small_for_a_capture_is_refused(cuda: FakeCuda) -> None:
    cuda.capturing = True
    with pytest.raises(BackendError, match="captured before it had run"):
        Scratch(CPU).begin(cuda.stream, 10)


def test_the_context_used_longest_ago_goes(load: Load, cuda: FakeCuda, fake: FakeTensorRT) -> None:
    engine = load()
    engine(x_of(1))
    cuda.capturing = True
    engine(x_of(1))  # captured: stays whatever comes
    cuda.capturing = False
    for batch in range(2, 2 + engines._CONTEXTS):
        engine(x_of(batch))
    calls = 1 + engines._CONTEXTS
    assert cuda.stream.waited == ["stream 99"] * calls  # the engine's own
    engine(x_of(2))  # now 3 is the one used longest ago
    first, second = cuda.stream, FakeStream(2)
    cuda.stream = second
    engine(x_of(30))
    # What ran on the first stream is waited for as well.
    assert first.waited == ["stream 99"] * (calls + 1)
    assert second.waited == ["event of 1", "all", "event of 1", "stream 99"]
    before = fake.contexts
    for batch in (1, 2, 4, 30):
        engine(x_of(batch))
    assert fake.contexts == before
    engine(x_of(3))
    assert fake.contexts == before + 1


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
def test_errors_carry_the_log(load: Load, fake: FakeTensorRT, call: str, what: str) -> None:
    engine = load()
    fake.failing = call
    with pytest.raises(BackendError, match=rf"^TensorRT 1\.0\.fake, unet: {what}"):
        engine(x_of(2))
    fake.failing = ""
    assert torch.equal(engine(x_of(2))["y"], x_of(2)["x"] + 1)
    assert fake.log.errors == []


def test_shapes_that_cannot_be_told(load: Load, fake: FakeTensorRT) -> None:
    fake.unknown = ["y"]
    with pytest.raises(BackendError, match=r"cannot tell the shape of y \(it does not say why\)"):
        load()(x_of(2))


def test_what_tensorrt_warns_of_at_load_is_passed_on(
    load: Load, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    fake.warnings = ["Using an engine plan file\n across different models of devices"]
    load()
    assert caplog.messages == [
        "TensorRT, as it loads the engine of unet: Using an engine plan file across different models of devices"
    ]


def test_a_gpu_that_does_not_start(load: Load, fake: FakeTensorRT) -> None:
    fake.failing = "Runtime"
    with pytest.raises(
        BackendError,
        match=r"unet: cannot start; see that its GPU and driver work \(CUDA initialization failure",
    ):
        load()


def test_a_plan_that_is_none(load: Load) -> None:
    with pytest.raises(BackendError, match=r"unet: cannot load \S*model.plan \(magicTag mismatch\)"):
        load(plan=b"something else")


def test_an_engine_that_is_pruned_before_it_is_read(load: Load, tmp_path: Path) -> None:
    stored = StoredEngine("0", tmp_path / "gone" / "model.plan", (WIDE,), {}, {}, False)
    with pytest.raises(
        BackendError, match=r"unet: \S*gone/model.plan was removed from the cache .*; try again"
    ):
        TensorRTEngine(ADD_ONE, stored, trt.product("tensorrt"), CPU, Scratch(CPU))


GB = 1 << 30


@pytest.mark.parametrize("product", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("free", "held"),
    [(8 * GB, 5 * GB), (4 * GB, 4 * GB - RESERVE - 3200), (GB // 8, 0)],
    ids=["all fit", "some stay on the host", "all stay there"],
)
def test_weights_that_do_not_fit_stay_on_the_host(
    load: Load,
    cuda: FakeCuda,
    fake: FakeTensorRT,
    caplog: pytest.LogCaptureFixture,
    product: str,
    free: int,
    held: int,
) -> None:
    """Such an engine's execution is waited for, and cannot be captured: TensorRT's own words."""
    fake.streamable, cuda.free = 5 * GB, free
    program = load(product).bind(x_of(1), {"y": torch.empty(1, 4)})
    assert fake.engine is not None
    assert fake.engine.weight_streaming_budget_v2 == held
    assert program.capturable == (held == 5 * GB)
    told = [] if program.capturable else ["of its weights stay in host memory"]
    assert [message.split(" GB ")[-1] for message in caplog.messages] == told


def test_a_budget_that_is_refused_is_told(
    load: Load, cuda: FakeCuda, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    fake.streamable, cuda.free, fake.failing = 5 * GB, 4 * GB, "weight_streaming_budget_v2"
    assert load().bind(x_of(1), {"y": torch.empty(1, 4)}).capturable
    (message,) = caplog.messages
    assert "keeps 5.37 GB of unet's weights on the GPU, and was told 4.03 GB" in message


def test_rtx_specialises_before_it_runs(load: Load, fake: FakeTensorRT) -> None:
    load("tensorrt-rtx")(x_of(1))
    (config,) = fake.strategies
    eager = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert config.dynamic_shapes_kernel_specialization_strategy == eager


def test_plugins_are_registered_before_the_engine_is_read(
    load: Load, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(plugins, "loading", lambda trt, wanted: asked.append((trt, wanted, fake.engine)))
    load(with_plugins={"GroupNorm": "1-x"})
    assert asked == [(fake, {"GroupNorm": "1-x"}, None)]


def test_a_plugin_that_is_missing_is_named(load: Load, fake: FakeTensorRT) -> None:
    with pytest.raises(
        BackendError,
        match=r"^unet: its engine was built with the plugin Geglu 1-x, and this latentrt has only Group",
    ):
        load(with_plugins={"Geglu": "1-x"})
    assert fake.engine is None


def test_what_a_plugin_refused_is_told(
    load: Load, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load()
    monkeypatch.setattr(plugins, "failures", lambda trt: ["GroupNorm: no kernels"] if trt is fake else [])
    fake.failing = "execute_async_v3"
    with pytest.raises(BackendError, match=r"unet: failed \(GroupNorm: no kernels; Error Code 3: it broke\)"):
        engine(x_of(2))


def test_an_engine_is_closed_when_it_has_run(load: Load, cuda: FakeCuda) -> None:
    """On whatever stream that was: TensorRT forbids to destroy a context that is running."""
    engine = load()
    engine(x_of(1))
    contexts = weakref.WeakSet(engine._contexts.values())
    first, second = cuda.stream, FakeStream(2)
    cuda.stream = second
    here = []
    second.synchronize = lambda: here.append(len(contexts))  # type: ignore[method-assign]
    engine.close()
    assert (first.waited, second.waited, here) == (["stream 99"], ["event of 1"], [1])
    assert len(contexts) == 0


def test_an_engine_that_nobody_has_is_gone_at_once(load: Load, cuda: FakeCuda, fake: FakeTensorRT) -> None:
    """Its weights may be most of a GPU, and the collector does not know of them. What runs is waited for first."""
    engine = load()
    engine(x_of(1))
    here: list[int] = []
    cuda.stream = FakeStream(2)
    cuda.stream.synchronize = lambda: here.append(len(fake.alive))  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        del engine
        assert (len(fake.alive), here, cuda.stream.waited) == (0, [1], ["event of 1"])
    finally:
        gc.enable()


def test_a_closed_engine_says_so(load: Load) -> None:
    engine = load()
    engine(x_of(1))
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="unet was closed; load it again"):
        engine(x_of(1))
