"""A network's weights as one block of memory, which moves between the host and a device.

One block, so that a device's allocator keeps no holes where weights were. It is copied in through pinned host memory,
to another address each time: graphs captured over it (`graph.py`) are dropped when it is offloaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .graph import empty_cache
from .memory import STAGING

__all__ = ["OffloadableWeights", "Staging"]

_ALIGNMENT = 512
"""Bytes; that of PyTorch's own allocations on a GPU."""
_HOST_ALIGNMENT = 64
"""Bytes; the same on the host."""
_SEGMENT = 2 << 20
"""PyTorch's allocator asks a GPU for multiples of so many bytes. A block that is a multiple too has its segment for
itself: in the rest of a larger segment small tensors would settle, and keep all of it from being freed."""


class Staging:
    """Copies host memory to a device through a double buffer in pinned memory: while one half is being copied to the
    device, the other is filled."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        """`nbytes`: of both halves together."""
        pinned = device.type == "cuda"
        self._device = device
        self._buffers = [
            torch.empty(nbytes // 2, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(2)
        ]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """uint8 [N] on the host -> uint8 [N] on the device, asynchronously, on its current stream."""
        size = len(self._buffers[0])
        for begin in range(0, len(source), size):
            part = source[begin : begin + size]
            buffer, copied = self._buffers[self._next][: len(part)], self._copied[self._next]
            if copied is not None:
                copied.synchronize()
            buffer.copy_(part)
            target[begin : begin + size].copy_(buffer, non_blocking=True)
            if self._device.type == "cuda":
                self._copied[self._next] = torch.cuda.current_stream(self._device).record_event()
            self._next = 1 - self._next

    def wait(self) -> None:
        """Until all copies have arrived on the device."""
        for copied in self._copied:
            if copied is not None:
                copied.synchronize()


class OffloadableWeights:
    """The weights of a network, which move between the host and a device as one block.

    Weights never change, so a copy on the host is made once and kept: to offload again only frees the device's.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """
        Args:
            tensors: every tensor that holds or views the weights (packed ones too), on the host. They stay the
                objects they are, and views of each other.
            device: where they are used. On a GPU they are there when this returns; on the CPU they stay where they
                are until they are offloaded for the first time.
        """
        self._tensors = list(tensors)
        self._device = device
        self._offsets: list[tuple[Tensor, int]] = []
        self._device_copy: Tensor | None = None  # uint8 [N]
        self._host_copy: Tensor | None = None  # uint8 [N]
        if device.type == "cuda":
            self.onload()

    @property
    def offloaded(self) -> bool:
        """Whether the device's memory was freed."""
        return self._host_copy is not None and self._device_copy is None

    @torch.inference_mode(False)
    def onload(self) -> None:
        """Move to the device. If this or an `offload` is interrupted, it can be called again."""
        if self._device_copy is None:
            # Set only once it is complete: then nothing is copied again.
            self._device_copy = self._copy_to_device()
        self._point_into(self._device_copy)

    @torch.inference_mode(False)
    def offload(self) -> None:
        """Move to the host, and free the device's memory. If this or an `onload` is interrupted, it can be called
        again."""
        if self._host_copy is None:
            # Set only once it is complete: weights are onloaded from it.
            self._host_copy = self._copy_to_host()
        self._point_into(self._host_copy)
        self._device_copy = None
        _empty_cache(self._device)

    def _copy_to_device(self) -> Tensor:
        """All weights in one block on the device."""
        _empty_cache(self._device)  # or the block would lie among what activations left
        sources, nbytes = self._sources()
        block = _allocate(nbytes, self._device)
        staging = Staging(self._device, min(STAGING, 2 * max(nbytes, 1)))
        for source, begin in sources:
            staging.copy(source, block[begin : begin + len(source)])
        staging.wait()  # streams are not ordered with each other, and any of them may use the weights next
        return block

    def _copy_to_host(self) -> Tensor:
        """All weights in one block on the host."""
        sources, nbytes = self._sources()
        block = _allocate(nbytes, torch.device("cpu"))
        for source, begin in sources:
            block[begin : begin + len(source)].copy_(source)
        return block

    def _sources(self) -> tuple[list[tuple[Tensor, int]], int]:
        """Memory that holds the weights, as uint8 [n] with its offset in the block; and the bytes of the block."""
        whole = self._host_copy if self._host_copy is not None else self._device_copy
        if whole is not None:
            return [(whole, 0)], len(whole)
        self._offsets, parts, nbytes = _layout(self._tensors, keep_alignment=self._device.type == "cpu")
        return parts, nbytes

    def _point_into(self, block: Tensor) -> None:
        """Make the tensors views of the block."""
        storage = block.untyped_storage()
        for tensor, begin in self._offsets:
            view = torch.empty(0, dtype=tensor.dtype, device=block.device)
            view.set_(storage, begin // tensor.itemsize, tensor.shape, tensor.stride())
            tensor.data = view


def _allocate(nbytes: int, device: torch.device) -> Tensor:
    """A block: uint8 [nbytes]."""
    whole = -(-nbytes // _SEGMENT) * _SEGMENT if device.type == "cuda" else nbytes
    return torch.empty(whole, dtype=torch.uint8, device=device)[:nbytes]


def _empty_cache(device: torch.device) -> None:
    """Give the allocator's unused memory back to the device."""
    if device.type == "cuda":
        empty_cache(device)


def _layout(
    tensors: Sequence[Tensor], *, keep_alignment: bool
) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]], int]:
    """Lay tensors out in one block.

    Args:
        keep_alignment: memory that did not begin at a multiple of `_HOST_ALIGNMENT`, as in a mapped file, does not in
            the block either. Some processors' matmuls round by alignment; so the results stay the same to the bit.

    Returns:
        each tensor and its offset in the block, in bytes; the memory to copy there, uint8 [n], and its offset; the
        bytes of the block. The tensors over one storage are copied as the one span that they cover, and so stay views
        of each other.
    """
    shared: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            shared.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    offsets: list[tuple[Tensor, int]] = []
    parts: list[tuple[Tensor, int]] = []
    end = 0
    for group in shared.values():
        spans = [_span(tensor) for tensor in group]
        low, high = min(first for first, _ in spans), max(last for _, last in spans)
        storage = group[0].untyped_storage()
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        past = (storage.data_ptr() + low) % _HOST_ALIGNMENT
        # But not where items begin at odd addresses, at which no tensor can be made.
        if keep_alignment and not any(past % tensor.itemsize for tensor in group):
            begin += past
        memory = torch.empty(0, dtype=torch.uint8, device=group[0].device).set_(storage)
        parts.append((memory[low:high], begin))
        offsets += [(tensor, begin + first - low) for tensor, (first, _) in zip(group, spans, strict=True)]
        end = begin + high - low
    return offsets, parts, end


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor covers: first, and one past the last."""
    begin = int(tensor.storage_offset()) * tensor.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize
