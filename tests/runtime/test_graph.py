"""Recorded work: on the CPU, where a recording is the list of operations that a CUDA graph would hold."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from latentrt.errors import BackendError, CaptureError
from latentrt.runtime import graph
from latentrt.runtime.graph import Graph, Graphs, _abandon
from torch import Tensor

CPU = torch.device("cpu")

BROKEN = "CUDA error: operation failed due to a previous error during capture"
NOT_IN_CAPTURES = "CUDA error: operation not permitted when stream is capturing"


def test_a_replay_reads_what_its_static_tensors_hold_now() -> None:
    x, y = torch.zeros(3), torch.zeros(3)
    graph = Graphs(CPU).capture(lambda: y.copy_((x * 2 + 1).relu()), "work")
    for value in (-3.0, 0.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert y.equal(torch.full((3,), max(0.0, 2 * value + 1)))


def test_views_and_updates_in_place_are_replayed() -> None:
    x = torch.arange(6.0)
    graph = Graphs(CPU).capture(lambda: x.view(2, 3)[1].add_(x.view(2, 3)[0]), "work")
    x.copy_(torch.arange(6.0))
    graph.replay()
    graph.replay()
    assert x.tolist() == [0, 1, 2, 3, 6, 9]


def test_what_a_replay_leaves_in_tensors_of_its_own_is_lost() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    loop = _loop(x, y)
    loop.replay()
    loop.replay()
    assert y.isnan().all()


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


class FakeAllocator:
    """PyTorch's CUDA calls around a capture, in order, and who holds which pool of memory.

    Attributes:
        holders: of pools that were used, by their handles.
        capturing: whether a capture is under way.
        broken: whether something broke that capture.
        interrupted: where a capture is interrupted, each once: before or after it begins, or before it ends.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.holders: dict[tuple[int, int], int] = {}
        self.into: tuple[int, int] | None = None
        self.capturing = self.broken = False
        self.interrupted: set[str] = set()
        handles = ((0, k) for k in itertools.count(1))
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("current", self.log))
        patch.setattr(torch.cuda, "Stream", lambda device, priority: FakeStream("side", self.log))
        patch.setattr(torch.cuda, "set_stream", lambda stream: None)
        patch.setattr(torch.cuda, "empty_cache", lambda: self.log.append("empty the cache"))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        patch.setattr(torch.cuda, "graph", self._capture)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(
            torch._C, "_cuda_beginAllocateCurrentThreadToPool", lambda device, pool: self.begin(pool)
        )
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.end(pool))
        patch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.release(pool))
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self._clear, raising=False)
        patch.setattr(torch.cuda, "current_blas_handle", lambda: self.log.append(f"cuBLAS in {self.into}"))
        patch.setattr(graph, "_reset_generator", lambda device: self.log.append("reset the generator"))

    def begin(self, pool: tuple[int, int]) -> None:
        assert self.into is None
        assert self.holders.get(pool) != 0, "PyTorch: INTERNAL ASSERT FAILED use_count > 0"
        self.holders[pool] = self.holders.get(pool, 0) + 1
        self.into = pool

    def end(self, pool: tuple[int, int]) -> None:
        if self.into != pool:
            raise RuntimeError("not currently recording to mempool_id")
        self.into = None

    def _clear(self) -> None:
        assert self.into is not None  # or the next would be made outside of the pool
        self.log.append("clear workspaces")

    def release(self, pool: tuple[int, int]) -> None:
        self.holders[pool] -= 1
        assert self.holders[pool] >= 0

    @contextmanager
    def _capture(self, graph: FakeGraph, *, pool: tuple[int, int], **_: object) -> Iterator[None]:
        self.log.append("capture")
        self._interrupt("before it begins")
        self.begin(pool)
        graph.pool_of_capture, self.capturing = pool, True
        self._interrupt("after it began")
        try:
            yield
        finally:
            self._interrupt("before it ends")
            graph.capture_end()

    def _interrupt(self, where: str) -> None:
        if where in self.interrupted:
            self.interrupted.remove(where)
            raise KeyboardInterrupt(where)

    def work(self) -> None:
        self.log.append(f"work in {self.into}")


class FakeGraph:
    def __init__(self, owner: FakeAllocator) -> None:
        self._owner = owner
        self.pool_of_capture: tuple[int, int] | None = None
        self._ended = False

    def capture_end(self) -> None:
        assert self._owner.capturing
        assert self.pool_of_capture is not None
        self._owner.capturing = False
        self._owner.end(self.pool_of_capture)
        broken, self._owner.broken = self._owner.broken, False
        if broken:
            raise RuntimeError(BROKEN)
        self._ended = True

    def pool(self) -> tuple[int, int]:
        if self.pool_of_capture is None or not self._ended:
            raise RuntimeError("called without a preceding successful capture")
        return self.pool_of_capture

    def __del__(self) -> None:
        if self._ended:
            self._owner.release(self.pool())


@dataclass
class FakeStream:
    name: str
    log: list[str]

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"synchronize {self.name}")


def test_work_runs_first_in_the_pool_that_it_is_captured_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take as much memory again."""
    cuda = FakeAllocator(monkeypatch)
    graph = Graphs(torch.device("cuda:0")).capture(cuda.work, "work")
    assert cuda.log == [
        "side waits for current",
        *("empty the cache", "clear workspaces", "cuBLAS in (0, 1)", "work in (0, 1)", "synchronize side"),
        *("capture", "work in (0, 1)"),
        "current waits for side",
    ]
    assert cuda.holders == {(0, 1): 1}
    del graph
    assert cuda.holders == {(0, 1): 0}


def test_cudnn_tries_its_algorithms_outside_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they take would stay there; then what it chose is known, and the work runs in the pool as ever."""
    cuda = FakeAllocator(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    Graphs(torch.device("cuda:0")).capture(cuda.work, "work")
    assert cuda.log[1:] == [
        *("work in None", "synchronize side", "empty the cache"),
        *("clear workspaces", "cuBLAS in (0, 1)", "work in (0, 1)", "synchronize side"),
        *("capture", "work in (0, 1)"),
        "current waits for side",
    ]


def test_cudnn_tries_in_the_pool_where_there_is_no_room_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeAllocator(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def work() -> None:
        cuda.work()
        if cuda.into is None:
            raise torch.OutOfMemoryError

    Graphs(torch.device("cuda:0")).capture(work, "work")
    ran = [line for line in cuda.log if line.startswith("work")]
    assert ran == [
        "work in None",
        "work in (0, 1)",
        "work in (0, 1)",
    ]


def test_a_pool_begins_with_the_room_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made in it, and what outlives the work lies elsewhere; once for all that share it."""
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))
    graphs.first_block = 8
    monkeypatch.setattr(torch, "empty", lambda size, **_: cuda.log.append(f"{size} bytes in {cuda.into}"))
    kept = [graphs.capture(cuda.work, "work") for _ in range(2)]
    ran = [line.removesuffix(" in (0, 1)") for line in cuda.log if " in " in line]
    assert ran == ["cuBLAS", "8 bytes", "work", "work", "cuBLAS", "work", "work"]
    kept.clear()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "garbage_collection_threshold:0.8,max_split_size_mb:512")
    cuda.log.clear()  # such an allocator would not part it
    graphs.capture(cuda.work, "work")
    assert not [line for line in cuda.log if "bytes" in line]


def test_graphs_share_a_pool_while_one_of_them_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses one that all have left."""
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))
    made = [graphs.capture(cuda.work, "work") for _ in range(2)]
    assert cuda.holders == {(0, 1): 2}
    made.pop(0)
    made.append(graphs.capture(cuda.work, "work"))
    assert cuda.holders == {(0, 1): 2}
    made.clear()
    made.append(graphs.capture(cuda.work, "work"))
    assert cuda.holders == {(0, 1): 0, (0, 2): 1}


def test_a_pool_knows_the_room_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = FakeAllocator(monkeypatch), Graphs(torch.device("cuda:0"))
    monkeypatch.setattr(torch, "empty", lambda size, **_: None)
    begun_with = [graphs.pool_began_with]
    kept = []
    for graphs.first_block in (8, 16):
        kept.append(graphs.capture(cuda.work, "work"))
        begun_with.append(graphs.pool_began_with)
    kept.clear()
    begun_with.append(graphs.pool_began_with)
    kept.append(graphs.capture(cuda.work, "work"))
    begun_with.append(graphs.pool_began_with)
    assert begun_with == [None, 8, 8, None, 16]


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


def _loop(x: Tensor, y: Tensor) -> Graph:
    """Each run should find in `made` what the run before left there."""
    made: list[Tensor] = []

    def work() -> None:
        made.append(torch.empty(2))
        y.copy_(made[0])
        made[0].copy_(x)

    return Graphs(CPU).capture(work, "a loop")


def test_sizes_and_numbers_are_as_recorded() -> None:
    x, y, scale = torch.ones(2), torch.zeros(2), [3.0]
    graph = Graphs(CPU).capture(lambda: y.copy_(x * scale[0]), "work")
    scale[0] = 100.0
    graph.replay()
    assert y.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("work", "operation"),
    [
        (lambda x: float(x[0]), "aten::_local_scalar_dense"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: bool((x > 0).all()), "aten::_local_scalar_dense|aten::is_nonzero"),
    ],
)
def test_reading_a_value_back_is_an_error_that_names_the_operation(work: object, operation: str) -> None:
    x = torch.ones(2)
    with pytest.raises(CaptureError, match=rf"the step cannot be captured.*({operation}).*--no-graphs"):
        Graphs(CPU).capture(lambda: work(x), "the step")  # type: ignore[operator]
