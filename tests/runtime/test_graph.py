"""Recorded work: on the CPU, where a recording is the list of operations that a CUDA graph would hold."""

from __future__ import annotations

import pytest
import torch
from latentrt.errors import CaptureError
from latentrt.runtime.graph import Graph, Graphs, _abandon
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


@pytest.mark.parametrize("ended", [False, True, None])
def test_the_allocator_is_told_of_a_capture_that_failed(
    ended: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless PyTorch has told it, or does not know of such things; releasing a pool twice would free what other graphs
    hold."""
    asked: list[tuple[object, ...]] = []

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
    _abandon((0, 7))
    assert asked == ([] if ended in (True, None) else [("end", 1, (0, 7)), ("release", 1, (0, 7))])


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
    with pytest.raises(CaptureError, match=rf"the step cannot be recorded.*({operation}).*--no-graphs"):
        Graphs(CPU).capture(lambda: work(x), "the step")  # type: ignore[operator]
