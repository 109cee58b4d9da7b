"""How large a piece of memory has to be for PyTorch's allocator to serve a forward out of it.

More than is live at once: what is free lies in several places, and a tensor needs one. Asked for piece by piece the
allocator would take half as much again and more from the device, since what was asked for separately never grows
together. It takes the smallest free place that is large enough, and parts it where over 1 MiB is left.
Source: PyTorch, c10/cuda/CUDACachingAllocator.cpp (get_free_block, should_split).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Event", "room_for"]

Event = tuple[int, int]
"""A tensor's number and its bytes, where it is made; its number and 0, where it ends."""

_ALIGNMENT = 512
_SMALL = 1 << 20
"""Bytes up to which tensors share segments of `_SEGMENT`, apart from the others."""
_SEGMENT = 2 << 20
_TRIES = 6


def room_for(events: Sequence[Event]) -> int:
    """Bytes of one piece that serves all of this, and of the segments of small tensors; multiples of 2 MiB.

    Args:
        events: in their order. What never ends counts to the last.
    """
    small, large = _parted(events)
    least, most = _live_peak(large), _filled(large)
    # Rare: a piece with an end may be filled in another order than one without.
    while not _serves(large, most):
        most = _whole(most + most // 64 + 1)
    for _ in range(_TRIES):
        middle = _whole((least + most) // 2)
        if middle >= most:
            break
        if _serves(large, middle):
            most = middle
        else:
            least = middle
    return most + _whole(_live_peak(small))


def _parted(events: Sequence[Event]) -> tuple[list[Event], list[Event]]:
    """Those of small tensors and those of others, their bytes as they are allocated."""
    small: list[Event] = []
    large: list[Event] = []
    sizes: dict[int, list[Event]] = {}
    for number, nbytes in events:
        if nbytes:
            sizes[number] = small if nbytes <= _SMALL else large
        if number in sizes:
            sizes[number].append((number, -(-nbytes // _ALIGNMENT) * _ALIGNMENT))
    return small, large


def _live_peak(events: Sequence[Event]) -> int:
    live: dict[int, int] = {}
    total = most = 0
    for number, nbytes in events:
        total += nbytes - live.pop(number, 0)
        if nbytes:
            live[number] = nbytes
        most = max(most, total)
    return most


def _whole(nbytes: int) -> int:
    return -(-nbytes // _SEGMENT) * _SEGMENT


class _Piece:
    """Memory in places, in the order of their addresses: [bytes, the number of the tensor there, or None]."""

    def __init__(self, nbytes: int) -> None:
        self.places: list[tuple[int, int | None]] = [(nbytes, None)] if nbytes else []

    def take(self, number: int, nbytes: int) -> bool:
        """Whether there was a place for it."""
        fitting = [
            (size, k) for k, (size, there) in enumerate(self.places) if there is None and size >= nbytes
        ]
        if not fitting:
            return False
        size, k = min(fitting)
        left = size - nbytes
        self.places[k : k + 1] = [(nbytes, number), (left, None)] if left > _SMALL else [(size, number)]
        return True

    def append(self, number: int, nbytes: int) -> None:
        """Grow by as much as it needs."""
        if self.places and self.places[-1][1] is None:
            self.places.pop()
        self.places.append((nbytes, number))

    def free(self, number: int) -> None:
        """It ends, and its place becomes one with those beside it that are free."""
        k = next(k for k, (_, there) in enumerate(self.places) if there == number)
        begin = k - (k > 0 and self.places[k - 1][1] is None)
        end = k + 1 + (k + 1 < len(self.places) and self.places[k + 1][1] is None)
        self.places[begin:end] = [(sum(size for size, _ in self.places[begin:end]), None)]

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.places)


def _serves(events: Sequence[Event], nbytes: int) -> bool:
    piece = _Piece(nbytes)
    for number, size in events:
        if not size:
            piece.free(number)
        elif not piece.take(number, size):
            return False
    return True


def _filled(events: Sequence[Event]) -> int:
    """Bytes that a piece without an end is filled to."""
    piece = _Piece(0)
    most = 0
    for number, size in events:
        if not size:
            piece.free(number)
        elif not piece.take(number, size):
            piece.append(number, size)
            most = max(most, piece.nbytes)
    return _whole(most)
