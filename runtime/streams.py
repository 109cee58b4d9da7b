"""What the host asks of the work it has given a device: is this done, wait for it, do that beside it.

On the CPU work is done when the call that gave it returns, and the same questions have short answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch

__all__ = ["Event", "Pace", "Queue", "between", "queue_of"]


class Event(Protocol):
    """A place in a device's work, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the device has got there."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to there; both must have been recorded with their times, and be past."""
        ...


class Queue(Protocol):
    """A device's work, in the order of the current stream."""

    def record(self, *, timed: bool = False) -> Event:
        """The place after everything given so far."""
        ...

    def beside(self, work: Callable[[], None]) -> Event:
        """Give `work` to a stream beside the current one, to begin after everything given so far. The place where it
        ends."""
        ...


class Pace:
    """Keeps the host at most two pieces of work ahead of the device: enough that the device never waits, and few
    enough that one can be told to stop."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._given: deque[Event] = deque()

    def wait(self) -> None:
        """Before a piece of work is given: until the one before the last is done."""
        while len(self._given) > 1:
            self._given.popleft().synchronize()

    def gave(self) -> None:
        """A piece of work has been given."""
        self._given.append(self._queue.record())

    def drain(self) -> None:
        """Wait for everything that was given."""
        self._given.clear()
        self._queue.record().synchronize()


class _Past:
    """An event on the CPU."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: Any) -> float:
        assert isinstance(end_event, _Past)
        return 1000 * (end_event._at - self._at)


class _HostQueue:
    def record(self, *, timed: bool = False) -> Event:
        return _Past()

    def beside(self, work: Callable[[], None]) -> Event:
        work()
        return _Past()


class _CudaQueue:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, *, timed: bool = False) -> Event:
        # A thread that waits for a blocking event leaves its core to others.
        event = torch.cuda.Event(enable_timing=timed, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def beside(self, work: Callable[[], None]) -> Event:
        side = _side(self._device)
        side.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(side):
            work()
            return self.record()


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The one stream beside the others: what libraries and PyTorch's allocator keep for a stream is kept for good."""
    return torch.cuda.Stream(device)


@contextmanager
def between(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Order work on `stream` after what PyTorch's current stream has been given and before what it is given next. Does
    nothing for None: a device without streams."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    yield
    current.wait_stream(stream)


def queue_of(device: torch.device) -> Queue:
    """The work given to a device."""
    return _CudaQueue(device) if device.type == "cuda" else _HostQueue()
