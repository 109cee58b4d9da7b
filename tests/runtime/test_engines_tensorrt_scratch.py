"""`engines/tensorrt.py`: scratch memory, streams and captures, against a stand-in for TensorRT."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_tensorrt import (
    ADD_ONE,
    FakeCuda,
    FakeStream,
    FakeTensorRT,
    x_of,
)
from latentrt.errors import BackendError
from latentrt.runtime.engines import lazy
from latentrt.runtime.engines import tensorrt as engines
from latentrt.runtime.engines.scratch import Scratch
from latentrt.runtime.engines.tensorrt import TensorRTEngine
from latentrt.runtime.graph import Graphs

CPU = torch.device("cpu")
Load = Callable[..., TensorRTEngine]


def test_scratch_grows_and_is_shared(load_engine: Load, fake_tensorrt: FakeTensorRT) -> None:
    scratch = Scratch(CPU)
    one, other = load_engine(scratch=scratch), load_engine(scratch=scratch)
    for engine, batch in ((one, 2), (other, 4), (one, 2), (other, 1)):
        engine(x_of(batch))
    memory = [call[2:] for call in fake_tensorrt.named("set_device_memory")]
    assert [size for _, size in memory] == [200, 400, 400, 400]
    assert len({address for address, _ in memory[1:]}) == 1


def test_another_stream_waits_for_the_scratch(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT
) -> None:
    engine = load_engine()
    first, second = fake_cuda.stream, FakeStream(2)
    engine(x_of(1))
    engine(x_of(1))
    fake_cuda.stream = second
    engine(x_of(1))
    assert (first.waited, second.waited) == (["stream 99"] * 2, ["event of 1", "stream 99"])
    assert engine._stream.waited == ["stream 1", "stream 1", "stream 2"]  # type: ignore[attr-defined]
    assert [call[2] for call in fake_tensorrt.named("execute_async_v3")] == [99, 99, 99]


def test_an_execution_is_never_on_the_default_stream(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On which TensorRT synchronises. What is captured is on the stream of the capture, which is another."""
    monkeypatch.setattr(
        FakeStream,
        "wait_stream",
        lambda *two: fake_tensorrt.calls.append((*(s.cuda_stream for s in two), "waits")),
    )
    program = load_engine().bind(x_of(1), {"y": torch.empty(1, 4)})
    fake_tensorrt.calls.clear()
    program.run()
    assert fake_tensorrt.calls[1:] == [(99, 1, "waits"), (1, "execute_async_v3", 99), (1, 99, "waits")]
    fake_tensorrt.calls.clear()
    fake_cuda.stream, fake_cuda.capturing = FakeStream(7), True
    program.run()
    assert fake_tensorrt.calls == [(1, "execute_async_v3", 7)]


def test_a_capture_before_a_first_run_is_refused(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT
) -> None:
    engine = load_engine()
    engine(x_of(1))
    fake_cuda.capturing = True
    engine(x_of(1))
    with pytest.raises(BackendError, match="unet cannot be captured before it has run once at these sizes"):
        engine(x_of(2))
    assert fake_tensorrt.contexts == 1


def test_a_capture_keeps_its_scratch(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT
) -> None:
    engine = load_engine()
    engine(x_of(1))
    fake_cuda.capturing = True
    engine(x_of(1))
    fake_cuda.capturing = False
    held = fake_tensorrt.named("set_device_memory")[-1][2]
    engine(x_of(8))  # grows it
    assert fake_tensorrt.named("set_device_memory")[-1][2] != held
    context, _ = engine._contexts.values()
    assert [buffer.data_ptr() for buffer in context.captured] == [held]


def test_scratch_is_freed_with_its_captured_program(load_engine: Load, fake_cuda: FakeCuda) -> None:
    """It may be gigabytes: a larger size came, and then the loop of the smaller one was dropped."""
    engine = load_engine()
    x, y = x_of(1), {"y": torch.empty(1, 4)}
    program = engine.bind(x, y)
    program.run()
    fake_cuda.capturing = True
    program.run()
    program.run()
    fake_cuda.capturing = False
    first = weakref.ref(engine._scratch._buffer)
    engine(x_of(4))
    gc.collect()
    assert first() is not None
    assert first() is not engine._scratch._buffer
    del program
    gc.collect()
    assert first() is None


def test_a_recorded_call_keeps_what_it_was_recorded_over(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT
) -> None:
    """A CUDA graph has addresses only: of the context's memory, and of the scratch."""

    class OfAddresses(Graphs):
        def capture(self, work: Callable[[], object], what: str) -> Any:
            work()
            fake_cuda.capturing = True
            work()
            fake_cuda.capturing = False
            return SimpleNamespace(replay=lambda: None)

    engine = load_engine()
    call = lazy._CapturedCall(ADD_ONE, engine, x_of(1), OfAddresses(CPU))
    scratch = weakref.ref(engine._scratch._buffer)
    engine(x_of(4))  # grows it
    engine.close()
    gc.collect()
    assert (len(fake_tensorrt.alive), scratch() is None) == (1, False)
    del call
    gc.collect()
    assert (len(fake_tensorrt.alive), scratch() is None) == (0, True)


def test_scratch_too_small_for_a_capture_is_refused(fake_cuda: FakeCuda) -> None:
    fake_cuda.capturing = True
    with pytest.raises(BackendError, match="captured before it has run"):
        Scratch(CPU).begin(fake_cuda.stream, 10)


def test_the_least_recently_used_context_is_freed(
    load_engine: Load, fake_cuda: FakeCuda, fake_tensorrt: FakeTensorRT
) -> None:
    engine = load_engine()
    engine(x_of(1))
    fake_cuda.capturing = True
    engine(x_of(1))  # captured: stays whatever comes
    fake_cuda.capturing = False
    for batch in range(2, 2 + engines._CONTEXTS):
        engine(x_of(batch))
    calls = 1 + engines._CONTEXTS
    assert fake_cuda.stream.waited == ["stream 99"] * calls  # the engine's own
    engine(x_of(2))  # now 3 is the one used longest ago
    first, second = fake_cuda.stream, FakeStream(2)
    fake_cuda.stream = second
    engine(x_of(30))
    # What ran on the first stream is waited for as well.
    assert first.waited == ["stream 99"] * (calls + 1)
    assert second.waited == ["event of 1", "all", "event of 1", "stream 99"]
    before = fake_tensorrt.contexts
    for batch in (1, 2, 4, 30):
        engine(x_of(batch))
    assert fake_tensorrt.contexts == before
    engine(x_of(3))
    assert fake_tensorrt.contexts == before + 1
