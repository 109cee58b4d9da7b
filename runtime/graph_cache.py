"""Captured graphs kept for the next request of their kind, in bounded memory."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from .memory import format_bytes
from .streams import CurrentStream, Event

__all__ = ["DEFAULT_LIMIT", "GraphCache"]

_log = logging.getLogger(__name__)

DEFAULT_LIMIT = 1 << 30
"""Bytes of graphs that are kept where no plan says how much room there is. Chosen, not measured."""


@dataclass(frozen=True, eq=False)
class _Item:
    owner: Hashable
    key: Hashable
    value: Any
    nbytes: int
    used: Event


class GraphCache:
    """A bounded cache; what was used longest ago is evicted first. Thread-safe: an item that is in use is not in the
    cache, so there may be several with one key.

    The device may still be at work on what is put here, so the cache waits for it before it frees anything: its memory
    would be reused too early, and TensorRT forbids to destroy a context that is running.

    Attributes:
        limit: bytes that all items together may take.
        evicted: how many were evicted for want of room so far.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self.evicted = 0
        self._items: list[_Item] = []  # the one used last at the end
        self._forgotten: deque[Hashable] = deque()  # owners whose items are yet to be removed
        self._lock = threading.Lock()
        self._warned = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        with self._lock:
            return self._nbytes()

    def take(
        self,
        owner: Hashable,
        key: Hashable,
        stream: CurrentStream,
        good: Callable[[Any], bool] = lambda _: True,
    ) -> Any | None:
        """Remove and return what its owner put here last by this key; None if there is nothing.

        Args:
            stream: where it will be used, after its last use on whatever stream.
            good: whether a value can still be used; those that cannot are freed.
        """
        wanted = owner, key
        with self._lock:
            gone = self._remove(lambda item: (item.owner, item.key) == wanted and not good(item.value))
            found = next((x for x in reversed(self._items) if (x.owner, x.key) == wanted), None)
            self._items = [item for item in self._items if item is not found]
        _wait_for(gone)
        if found is None:
            return None
        stream.wait_event(found.used)
        return found.value

    def put(self, owner: Hashable, key: Hashable, value: Any, nbytes: int, used: Event) -> None:
        """Keep it as the one used last, and evict others to make room; if it alone is over the limit, it is freed.

        Args:
            used: recorded after its last use.
        """
        with self._lock:
            last = len(self._items) if nbytes <= self.limit else 0
            self._items.insert(last, _Item(owner, key, value, nbytes, used))
        self.shrink(self.limit)

    def shrink(self, limit: int) -> None:
        """Evict until the rest is within so many bytes; a warning says so the first time."""
        with self._lock:
            gone = self._remove()
            evicted: list[_Item] = []
            while self._items and self._nbytes() > limit:
                evicted.append(self._items.pop(0))
            self.evicted += len(evicted)
            warn, self._warned = bool(evicted) and not self._warned, self._warned or bool(evicted)
            kept = self._nbytes()
        if warn:
            _log.warning(
                "evicted %s of captured graphs (limit %s, %s stored): requests of their kinds are captured again; "
                "raise loop_memory= to keep more (logged once)",
                format_bytes(sum(item.nbytes for item in evicted)),
                format_bytes(limit),
                format_bytes(kept),
            )
        _wait_for([*gone, *evicted])

    def drop(self, owner: Hashable = None) -> int:
        """Free all items of an owner, or all there are; returns their bytes."""
        with self._lock:
            gone = self._remove(lambda item: owner is None or item.owner == owner)
        _wait_for(gone)
        return sum(item.nbytes for item in gone)

    def forget(self, owner: Hashable) -> None:
        """Free the items of an owner that no longer exists; for a finalizer.

        It may run anywhere, even in a thread that is inside another method and holds the lock. Then, or if another
        thread holds it, the items are freed by the next call that changes the cache.
        """
        self._forgotten.append(owner)
        while self._forgotten and self._lock.acquire(blocking=False):
            try:
                gone = self._remove()
            finally:
                self._lock.release()
            _wait_for(gone)

    def _remove(self, unwanted: Callable[[_Item], bool] = lambda _: False) -> list[_Item]:
        """Remove unwanted items, and those of forgotten owners; the caller holds the lock and waits for them."""
        owners = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        gone = [item for item in self._items if item.owner in owners or unwanted(item)]
        self._items = [item for item in self._items if item not in gone]
        return gone

    def _nbytes(self) -> int:
        return sum(item.nbytes for item in self._items)


def _wait_for(items: Iterable[_Item]) -> None:
    """Until the device has finished every last use."""
    for item in items:
        item.used.synchronize()
