"""Recorded work: on the CPU, where a recording is the list of operations that a CUDA graph would hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_captures import FakeAllocator
from latentrt.errors import CaptureError
from latentrt.runtime import offload
from latentrt.runtime.budget import Budget
from latentrt.runtime.engines import lazy
from latentrt.runtime.graph import Graph, Graphs, synchronize
from latentrt.runtime.graph_cache import GraphCache
from torch import Tensor

CPU = torch.device("cpu")


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


GPU = torch.device("cuda:0")
IDLE: Any = SimpleNamespace(_loader=SimpleNamespace(device=GPU, graph_cache=GraphCache()))


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda: lazy._wait(GPU, None), id="wait for the device"),
        pytest.param(lambda: Budget.free_unused(IDLE), id="free what is kept of earlier requests"),
        pytest.param(lambda: offload._empty_cache(GPU), id="give back what weights took"),
    ],
)
def test_what_cannot_be_done_during_a_capture_waits_for_its_end(
    ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread, which may be another pipeline's."""
    cuda = FakeAllocator(monkeypatch)
    captured_then: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: captured_then.append(cuda.capturing))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    other = threading.Thread(target=ask)

    def work() -> None:
        if cuda.capturing:
            monkeypatch.setattr(torch.cuda, "empty_cache", lambda: captured_then.append(cuda.capturing))
            other.start()
            other.join(0.2)

    Graphs(GPU).capture(work, "work")
    other.join(60)
    assert captured_then == [False]


def test_nothing_waits_for_a_capture_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeAllocator(monkeypatch)
    captured_then: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: captured_then.append(cuda.capturing))
    other = threading.Thread(target=lambda: synchronize(torch.device("cuda:1")))

    def work() -> None:
        if cuda.capturing:
            other.start()
            other.join(60)

    Graphs(GPU).capture(work, "work")
    assert captured_then == [True]


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
