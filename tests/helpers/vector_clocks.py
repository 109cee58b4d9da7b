"""What each stream of a GPU and each thread of the host comes after: vector clocks, and locks that hand them on.

`stream_order` follows a program by them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

__all__ = ["Clock", "Clocks", "FollowedLock", "merge"]

Clock = dict[int, int]
"""Of each stream the number of the last work that is known to be done: vector clocks, as race detectors have them."""


def merge(into: Clock, known: Clock) -> None:
    """`into` comes after all that `known` does, too."""
    for stream, number in known.items():
        into[stream] = max(number, into.get(stream, 0))


class Clocks:
    """What each stream and each thread of the host comes after."""

    def __init__(self) -> None:
        self._streams = defaultdict[int, Clock](dict)
        self._events = dict[int, Clock]()
        self._host = threading.local()

    @property
    def host(self) -> Clock:
        """The current thread's."""
        if not hasattr(self._host, "clock"):
            self._host.clock = Clock()
        return self._host.clock

    def stream(self, stream: int) -> Clock:
        """What comes after all that the current thread puts on a stream now."""
        clock = self._streams[stream]
        merge(clock, self.host)
        return clock

    def record(self, event: int, stream: int) -> None:
        self._events[event] = dict(self.stream(stream))

    def wait(self, event: int, stream: int) -> None:
        merge(self.stream(stream), self._events.get(event, {}))

    def synchronize_event(self, event: int) -> None:
        merge(self.host, self._events.get(event, {}))

    def synchronize_stream(self, stream: int) -> None:
        merge(self.host, self._streams[stream])

    def synchronize_device(self) -> None:
        for clock in self._streams.values():
            merge(self.host, clock)


class FollowedLock:
    """A lock whose holder comes after those who held it before."""

    def __init__(self, lock: Any, clocks: Clocks) -> None:
        self._lock, self._clocks, self._clock = lock, clocks, Clock()

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        taken: bool = self._lock.acquire(*args, **kwargs)
        if taken:
            merge(self._clocks.host, self._clock)
        return taken

    def release(self) -> None:
        merge(self._clock, self._clocks.host)
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def locked(self) -> bool:
        return self._lock.locked()  # type: ignore[no-any-return]

    # What `threading.Condition` asks of a lock that may be taken again by who has it.

    def _is_owned(self) -> bool:
        if hasattr(self._lock, "_is_owned"):
            return self._lock._is_owned()  # type: ignore[no-any-return]
        return self.locked()

    def _release_save(self) -> Any:
        merge(self._clock, self._clocks.host)
        return self._lock._release_save() if hasattr(self._lock, "_release_save") else self._lock.release()

    def _acquire_restore(self, state: Any) -> None:
        if hasattr(self._lock, "_acquire_restore"):
            self._lock._acquire_restore(state)
        else:
            self._lock.acquire()
        merge(self._clocks.host, self._clock)
