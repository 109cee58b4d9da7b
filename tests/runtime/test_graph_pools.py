"""The memory pool that captured graphs share: how large it begins, and when another one is begun."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import latentrt
import pytest
from helpers.tiny_requests import SEEDED_CALL
from latentrt.runtime.graph import Graph, Graphs
from latentrt.runtime.stages import stages_of_request

Load = Callable[..., latentrt.Pipeline]

LARGE = {**SEEDED_CALL, "height": 256, "width": 256}


@pytest.mark.parametrize("plenty", [False, True])
def test_a_pool_that_a_small_request_began_does_not_grow_beyond_the_plan(
    plenty: bool, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger request begins a new pool, once, and only where what the old one would grow to might not fit."""
    captured: list[str] = []
    capture = Graphs.capture

    def pooled(self: Graphs, work: Callable[[], object], what: str) -> Graph:
        if not self._in_pool:
            self._pool_began_with = self.first_block  # as on a GPU
        made = capture(self, work, what)
        self._in_pool.add(made)
        captured.append(what)
        return made

    monkeypatch.setattr(Graphs, "capture", pooled)
    small, large = SEEDED_CALL, LARGE
    free = load(memory_limit="1GB", graphs=True)
    for call in (small, large):
        free(**call)
    request, _ = free.check(**large)
    plan = free._budget.plan(request, stages_of_request(free._parts.experts, request))
    kept = free._loader.graph_cache.nbytes
    pipe = load(
        memory_limit="1GB" if plenty else plan.peak("resident") + plan.buffer_bytes + kept, graphs=True
    )
    begun_with, counts = [], []
    for call in (small, large, small, large, small):
        captured.clear()
        pipe(**call)
        begun_with.append(pipe._loader.graphs.pool_began_with)
        counts.append(len(captured))
    assert begun_with[0] < plan.graph_bytes("resident", kept)
    if plenty:
        assert begun_with == [begun_with[0]] * 5
        assert counts[2:] == [0, 0, 0]
    else:
        assert begun_with[1:] == [plan.graph_bytes("resident", kept)] * 4
        assert counts[2] > 0  # the small ones again, in the new pool
        assert counts[3:] == [0, 0]


def test_a_pool_is_left_alone_while_another_call_runs(load: Load) -> None:
    """It would stay for the graphs that are in use."""
    pipe = load(memory_limit="1GB", graphs=True)
    pipe(**SEEDED_CALL)
    request, _ = pipe.check(**LARGE)
    stages = stages_of_request(pipe._parts.experts, request)
    pipe._budget._limit = pipe._budget.plan(request, stages).peak("resident") + (1 << 20)
    graphs, cache = pipe._loader.graphs, pipe._loader.graph_cache
    graph = graphs.capture(lambda: None, "one of the pool")
    graphs._in_pool, graphs._pool_began_with = WeakSet([graph]), 1
    count = len(cache)
    pipe._budget.admit(request, stages, idle=False)
    assert len(cache) == count > 0
    pipe._budget.admit(request, stages, idle=True)
    assert len(cache) == 0
