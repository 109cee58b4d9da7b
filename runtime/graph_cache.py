"""Recorded work kept ready for the next request of its kind, in bounded memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from .memory import format_bytes
from .streams import Event

__all__ = ["DEFAULT_LIMIT", "GraphCache"]

_log = logging.getLogger(__name__)

DEFAULT_LIMIT = 1 << 30
"""Bytes of what is kept where no plan says how much there is room for. Chosen, not measured."""


@dataclass(frozen=True, eq=False)
class _Item:
    owner: Hashable
    kind: Hashable
    value: Any
    nbytes: int
    used: Event


class GraphCache:
    """A bounded store; what was used longest ago goes first. For several threads, so it may hold several of one kind.

    The device may still be at work on what is put here, so whatever is let go is waited for: its memory would be given
    to others too early, and TensorRT forbids to destroy a context that is running.

    Attributes:
        limit: bytes that all of it may take.
        evicted: how many went for want of room so far.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self.evicted = 0
        self._items: list[_Item] = []  # the one used last at the end
        self._lock = threading.Lock()
        self._told = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return self._nbytes()

    def take(
        self, owner: Hashable, kind: Hashable, good: Callable[[Any], bool] = lambda _: True
    ) -> Any | None:
        """What its owner put here last of this kind, which nobody else gets then; None where there is none.

        Args:
            good: whether it can still be used; what cannot is let go.
        """
        with self._lock:
            alike = [item for item in self._items if (item.owner, item.kind) == (owner, kind)]
            gone = [item for item in alike if not good(item.value)]
            found = next((item for item in reversed(alike) if item not in gone), None)
            self._items = [item for item in self._items if item is not found and item not in gone]
        _wait_for(gone)
        return None if found is None else found.value

    def put(self, owner: Hashable, kind: Hashable, value: Any, nbytes: int, used: Event) -> None:
        """Keep it as the one used last; where there is no room others go, or, where it is too large by itself, it does.

        Args:
            used: the place in the device's work after its last use.
        """
        with self._lock:
            last = len(self._items) if nbytes <= self.limit else 0
            self._items.insert(last, _Item(owner, kind, value, nbytes, used))
        self.shrink(self.limit)

    def shrink(self, limit: int) -> None:
        """Let go what is over so many bytes, which is logged the first time."""
        with self._lock:
            gone: list[_Item] = []
            while self._items and self._nbytes() > limit:
                gone.append(self._items.pop(0))
            self.evicted += len(gone)
            tell, self._told = bool(gone) and not self._told, self._told or bool(gone)
            left = self._nbytes()
        if tell:
            _log.warning(
                "recorded work of %s was let go, there is room for %s of it (%s are kept): a request of its kind is "
                "recorded anew; loop_memory= says how much may be kept. This is said once",
                format_bytes(sum(item.nbytes for item in gone)),
                format_bytes(limit),
                format_bytes(left),
            )
        _wait_for(gone)

    def drop(self, owner: Hashable = None) -> int:
        """Let go all there is of an owner, or of all; returns how many bytes that were."""
        with self._lock:
            gone = [item for item in self._items if owner is None or item.owner == owner]
            self._items = [item for item in self._items if item not in gone]
        _wait_for(gone)
        return sum(item.nbytes for item in gone)

    def forget(self, owner: Hashable) -> None:
        """`drop` of an owner that is no more. A garbage collector tells of it anywhere, in the midst of this class too;
        then its things stay until there is no room for them."""
        if self._lock.acquire(timeout=1):
            self._lock.release()
            self.drop(owner)

    def _nbytes(self) -> int:
        return sum(item.nbytes for item in self._items)


def _wait_for(items: Iterable[_Item]) -> None:
    """Until the device has done what uses them."""
    for item in items:
        item.used.synchronize()
