"""`runtime/graph.py`: captures that fail, are interrupted, or are broken by another thread."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers.fake_captures import BROKEN, FakeAllocator
from latentrt.errors import BackendError, CaptureError
from latentrt.runtime.graph import Graphs, _abandon

NOT_IN_CAPTURES = "CUDA error: operation not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("ended", "captured", "told"),
    [
        pytest.param(False, False, ["end", "release"], id="before PyTorch 2.12"),
        pytest.param(True, False, ["release"], id="later, of a graph that was not captured"),
        pytest.param(True, True, [], id="later, of one that was"),
        pytest.param(None, False, [], id="without such functions"),
    ],
)
def test_a_failed_capture_releases_its_pool(
    ended: bool | None, captured: bool, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless PyTorch does it; releasing a pool twice would free what other graphs hold."""
    asked: list[tuple[object, ...]] = []

    class Graph:
        def pool(self) -> tuple[int, int]:
            if captured:
                return (0, 7)
            raise RuntimeError("called without a preceding successful capture")

    def end(*what: object) -> None:
        if ended:
            raise RuntimeError("not currently recording to mempool_id")
        asked.append(("end", *what))

    for name, call in (
        ("endAllocateToPool", end),
        ("releasePool", lambda *what: asked.append(("release", *what))),
    ):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", None if ended is None else call, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _abandon((0, 7), Graph(), None, begun=True)  # type: ignore[arg-type]
    assert asked == [(what, 1, (0, 7)) for what in told]


def test_work_that_fails_leaves_the_next_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether before it is captured or while it is."""
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))

    def fail(after: int) -> Callable[[], None]:
        runs = itertools.count()

        def work() -> None:
            if next(runs) == after:
                raise RuntimeError("out of luck")

        return work

    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        graphs.capture(fail(0), "work")
    assert "reset the generator" not in cuda.log
    with pytest.raises(CaptureError, match="the work cannot be captured"):
        graphs.capture(fail(1), "the work")
    assert cuda.log[-1] == "reset the generator"
    gc.collect()  # frames of errors hold graphs
    assert cuda.into is None
    assert set(cuda.holders.values()) == {0}
    kept = graphs.capture(cuda.work, "work")
    with pytest.raises(CaptureError):
        graphs.capture(fail(1), "the work")
    gc.collect()
    assert sorted(cuda.holders.values()) == [0, 0, 1]
    also = graphs.capture(cuda.work, "work")
    assert sorted(cuda.holders.values()) == [0, 0, 1, 1]
    del kept, also


def breaking(cuda: FakeAllocator, error: BaseException | None, times: int) -> Callable[[], None]:
    """Work whose capture is broken so often, and which then fails with an error, unless None."""
    captures = itertools.count(1)

    def work() -> None:
        if cuda.capturing and next(captures) <= times:
            cuda.broken = True
            if error is not None:
                raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        None,
        RuntimeError(BROKEN),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART"),
        BackendError("TensorRT 10.16, unet: execution failed"),
    ],
    ids=lambda error: "at its end" if error is None else str(error)[:40],
)
def test_a_capture_that_something_else_breaks_is_made_once_more(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries do not say what it is that fails."""
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))
    kept = graphs.capture(breaking(cuda, error, 1), "work")
    assert cuda.log.count("capture") == 2
    kind = BackendError if isinstance(error, BackendError) else CaptureError
    with pytest.raises(kind, match=re.escape(str(error or BROKEN)[:40])):
        graphs.capture(breaking(cuda, error, 2), "work")
    assert cuda.log.count("capture") == 4
    gc.collect()  # frames of errors hold graphs
    assert sorted(cuda.holders.values()) == [0, 0, 1]
    del kept


@pytest.mark.parametrize("error", [RuntimeError(NOT_IN_CAPTURES), KeyboardInterrupt("now")])
def test_a_capture_that_its_own_work_breaks_fails_at_once(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the error of the work: that of the capture's end says nothing of it."""
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))
    kind = CaptureError if isinstance(error, RuntimeError) else KeyboardInterrupt
    with pytest.raises(kind, match=str(error)):
        graphs.capture(breaking(cuda, error, 1), "work")
    assert cuda.log.count("capture") == 1


def test_the_error_of_a_capture_is_its_work_s_whatever_its_caller_was_handling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))

    def work() -> None:
        if cuda.capturing:
            raise RuntimeError(NOT_IN_CAPTURES)

    try:
        raise ValueError("something else")
    except ValueError:
        with pytest.raises(CaptureError, match=NOT_IN_CAPTURES):
            graphs.capture(work, "work")


@pytest.mark.parametrize("where", ["before it begins", "after it began", "before it ends"])
def test_an_interrupted_capture_releases_the_share_that_it_took(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other: PyTorch ends the process where a graph gives up a share that was released for it."""
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))
    kept = graphs.capture(cuda.work, "work")
    cuda.interrupted.add(where)
    with pytest.raises(KeyboardInterrupt, match=where):
        graphs.capture(cuda.work, "work")
    gc.collect()  # frames of errors hold graphs
    assert (cuda.capturing, cuda.into) == (False, None)
    assert cuda.holders == {(0, 1): 1}
    also = graphs.capture(cuda.work, "work")
    assert cuda.holders == {(0, 1): 1, (0, 2): 1}
    del kept, also


@pytest.mark.parametrize(
    "failed", [RuntimeError(BROKEN), BackendError("TensorRT 10.16, unet: execution failed")]
)
def test_an_interruption_is_what_comes_of_a_capture_whose_work_had_failed(
    failed: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not made once more."""
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))
    cuda.interrupted.add("before it ends")
    with pytest.raises(KeyboardInterrupt, match="before it ends"):
        graphs.capture(breaking(cuda, failed, 1), "work")
    assert cuda.log.count("capture") == 1
