"""Events and streams, for work that a device does asynchronously.

On the CPU work is done when the call that submitted it returns, and the same interface has nothing to wait for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch

__all__ = ["CurrentStream", "Event", "Pace", "current_stream", "ordered_with_current"]


class Event(Protocol):
    """A point in a device's work, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the device has reached it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds between two events that were recorded with `timed` and have been reached."""
        ...


class CurrentStream(Protocol):
    """PyTorch's current stream of a device, whichever it is at a call."""

    def record_event(self, *, timed: bool = False) -> Event:
        """The point after everything submitted so far."""
        ...

    def wait_event(self, event: Event) -> None:
        """Let what is submitted from now on run after an event of this device. The host does not wait."""
        ...

    def on_side_stream(self, work: Callable[[], None]) -> Event:
        """Submit `work` to another stream than the current one, to begin after everything submitted so far. Returns the
        point where it ends."""
        ...


class Pace:
    """Keeps the host at most two steps ahead of the device: enough that the device never waits, and few enough to
    interrupt."""

    def __init__(self, stream: CurrentStream) -> None:
        self._stream = stream
        self._submitted: deque[Event] = deque()

    def wait(self) -> None:
        """Before a step is submitted: wait until the one before the last is done."""
        while len(self._submitted) > 1:
            self._submitted.popleft().synchronize()

    def submitted(self) -> None:
        """A step has been submitted."""
        self._submitted.append(self._stream.record_event())

    def drain(self) -> None:
        """Wait for everything that was submitted."""
        self._submitted.clear()
        self._stream.record_event().synchronize()


class _HostEvent:
    """An event on the CPU, which is reached as soon as it is recorded."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: Any) -> float:
        assert isinstance(end_event, _HostEvent)
        return 1000 * (end_event._at - self._at)


class _HostStream:
    def record_event(self, *, timed: bool = False) -> Event:
        return _HostEvent()

    def wait_event(self, event: Event) -> None:
        pass

    def on_side_stream(self, work: Callable[[], None]) -> Event:
        work()
        return _HostEvent()


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record_event(self, *, timed: bool = False) -> Event:
        # blocking: a thread that waits for it sleeps, and leaves its core to others.
        event = torch.cuda.Event(enable_timing=timed, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(event)

    def on_side_stream(self, work: Callable[[], None]) -> Event:
        side = _side(self._device)
        side.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(side):
            work()
            return self.record_event()


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The one side stream of a device: libraries and PyTorch's allocator keep memory for each stream for good."""
    return torch.cuda.Stream(device)


@contextmanager
def ordered_with_current(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Order work that is put on `stream` meanwhile with PyTorch's current stream: after what was put there before, and
    before what is put there next, also if putting it there fails midway. Does nothing for None: a device without
    streams."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        yield
    finally:
        current.wait_stream(stream)


def current_stream(device: torch.device) -> CurrentStream:
    """The current stream of a device. A CPU has none: its work is done once it is submitted."""
    return _CudaStream(device) if device.type == "cuda" else _HostStream()
