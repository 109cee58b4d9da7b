"""PyTorch's CUDA calls around the capture of a graph, and its allocator's pools."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from latentrt.runtime import graph

__all__ = ["BROKEN", "FakeAllocator"]

BROKEN = "CUDA error: operation failed due to a previous error during capture"


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
        patch.setattr(graph, "reset_generator", lambda device: self.log.append("reset the generator"))

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
