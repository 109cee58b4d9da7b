"""How large an arena has to be for PyTorch's allocator to serve a forward out of it.

More than what is live at once: free memory is in several places, and a tensor needs one block. If the arena grew tensor
by tensor, the allocator would ask the device for half as much again and more, since segments never merge.

The allocator is simulated. Best fit: the smallest free block that is large enough; it is split if more than 1 MiB would
be left; freed neighbours coalesce.
Source: PyTorch, c10/cuda/CUDACachingAllocator.cpp (get_free_block, should_split).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["AllocatorEvent", "arena_bytes"]

AllocatorEvent = tuple[int, int]
"""A tensor's number and its bytes, when it is allocated; its number and 0, when it is freed."""

_ALIGNMENT = 512
_SMALL = 1 << 20
"""Bytes up to which tensors share segments of `_SEGMENT`, apart from the others."""
_SEGMENT = 2 << 20
_BISECTIONS = 6
"""They leave 1/64 of the gap between the bounds."""


def arena_bytes(events: Sequence[AllocatorEvent]) -> int:
    """Bytes of one arena that serves all of this, and of the segments of small tensors; multiples of 2 MiB.

    Args:
        events: in order. What is never freed counts to the end.
    """
    small, large = _by_size_class(events)
    least, most = _live_peak(large), _grown(large)
    # Rare: a bounded arena may be filled in another order than one that grows.
    while not _fits(large, most):
        most = _round_up(most + most // 64 + 1)
    for _ in range(_BISECTIONS):
        middle = _round_up((least + most) // 2)
        if middle >= most:
            break
        if _fits(large, middle):
            most = middle
        else:
            least = middle
    return most + _round_up(_live_peak(small))


def _by_size_class(events: Sequence[AllocatorEvent]) -> tuple[list[AllocatorEvent], list[AllocatorEvent]]:
    """Those of small tensors and those of others, with their bytes aligned."""
    small: list[AllocatorEvent] = []
    large: list[AllocatorEvent] = []
    size_class: dict[int, list[AllocatorEvent]] = {}
    for number, nbytes in events:
        if nbytes:
            size_class[number] = small if nbytes <= _SMALL else large
        if number in size_class:
            size_class[number].append((number, -(-nbytes // _ALIGNMENT) * _ALIGNMENT))
    return small, large


def _live_peak(events: Sequence[AllocatorEvent]) -> int:
    live: dict[int, int] = {}
    total = most = 0
    for number, nbytes in events:
        total += nbytes - live.pop(number, 0)
        if nbytes:
            live[number] = nbytes
        most = max(most, total)
    return most


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _SEGMENT) * _SEGMENT


class _Arena:
    """Attributes:
    blocks: in the order of their addresses: (bytes, the number of the tensor there, or None if free).
    """

    def __init__(self, nbytes: int) -> None:
        self.blocks: list[tuple[int, int | None]] = [(nbytes, None)] if nbytes else []

    def allocate(self, number: int, nbytes: int) -> bool:
        """Whether there was a block for it."""
        fitting = [
            (size, k) for k, (size, tensor) in enumerate(self.blocks) if tensor is None and size >= nbytes
        ]
        if not fitting:
            return False
        size, k = min(fitting)
        rest = size - nbytes
        self.blocks[k : k + 1] = [(nbytes, number), (rest, None)] if rest > _SMALL else [(size, number)]
        return True

    def grow(self, number: int, nbytes: int) -> None:
        """Add a block for it at the end, over what is free there."""
        if self.blocks and self.blocks[-1][1] is None:
            self.blocks.pop()
        self.blocks.append((nbytes, number))

    def free(self, number: int) -> None:
        """Free its block, which coalesces with free neighbours."""
        k = next(k for k, (_, tensor) in enumerate(self.blocks) if tensor == number)
        begin = k - (k > 0 and self.blocks[k - 1][1] is None)
        end = k + 1 + (k + 1 < len(self.blocks) and self.blocks[k + 1][1] is None)
        self.blocks[begin:end] = [(sum(size for size, _ in self.blocks[begin:end]), None)]

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self.blocks)


def _fits(events: Sequence[AllocatorEvent], nbytes: int) -> bool:
    """Whether an arena of so many bytes serves all of this."""
    arena = _Arena(nbytes)
    for number, size in events:
        if not size:
            arena.free(number)
        elif not arena.allocate(number, size):
            return False
    return True


def _grown(events: Sequence[AllocatorEvent]) -> int:
    """Bytes to which an arena without a bound grows."""
    arena = _Arena(0)
    most = 0
    for number, size in events:
        if not size:
            arena.free(number)
        elif not arena.allocate(number, size):
            arena.grow(number, size)
            most = max(most, arena.nbytes)
    return _round_up(most)
