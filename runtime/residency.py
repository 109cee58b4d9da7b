"""Whose weights are on the device when, by a policy of `memory`, and how they come and go.

A PyTorch network's weights are one piece of memory each (`Weights`), so that a device's allocator keeps no holes where
they were, and stream in through pinned memory. They come back to another address: what was recorded over them
(`graph.py`) is dropped when they leave, and recorded anew. Engines that cannot be moved are closed, and loaded again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from .engines.base import Component
from .graph_cache import GraphCache
from .memory import STAGING, Kind, Policy, kind_of, stays

__all__ = ["Residency", "Resident", "Staging", "Weights", "exclusive"]

_ALIGNMENT = 512
"""Bytes; that of PyTorch's own allocations on a GPU."""
_HOST_ALIGNMENT = 64
"""The same for the host."""
_SEGMENT = 2 << 20
"""Bytes of which PyTorch's allocator asks a GPU for a multiple. A piece that is one too has its memory for itself: in
what is left beside another kind of piece, small tensors would settle, and keep all of it from being given back."""


class Staging:
    """Copies host memory to a device through two pinned buffers that take turns: one is filled while the other's
    content is on its way."""

    def __init__(self, device: torch.device, nbytes: int = STAGING) -> None:
        """`nbytes`: of both buffers together."""
        pinned = device.type == "cuda"
        self._device = device
        self._buffers = [
            torch.empty(nbytes // 2, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """uint8 [N] on the host -> uint8 [N] on the device; work put on its current stream afterwards sees it."""
        size = len(self._buffers[0])
        for begin in range(0, len(source), size):
            part = source[begin : begin + size]
            buffer, sent = self._buffers[self._turn][: len(part)], self._sent[self._turn]
            if sent is not None:
                sent.synchronize()
            buffer.copy_(part)
            target[begin : begin + size].copy_(buffer, non_blocking=True)
            if self._device.type == "cuda":
                self._sent[self._turn] = torch.cuda.current_stream(self._device).record_event()
            self._turn = 1 - self._turn

    def wait(self) -> None:
        """Until everything copied so far is on the device."""
        for sent in self._sent:
            if sent is not None:
                sent.synchronize()


class Weights:
    """The weights of a network, which move between the host and a device as one piece of memory.

    Weights never change, so once there is a copy on the host it stays there: what leaves is only let go.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, staging_bytes: int = STAGING) -> None:
        """
        Args:
            tensors: every tensor that holds or views the weights (packed ones too), on the host. They stay the
                objects they are, and views of each other.
            device: where they are to be; on the CPU they stay as they lie until they leave for the first time.
        """
        self._tensors = list(tensors)
        self._device = device
        self._staging_bytes = staging_bytes
        self._places: list[tuple[Tensor, int]] = []
        self._there: Tensor | None = None  # uint8 [N], the piece on the device
        self._home: Tensor | None = None  # and on the host
        if device.type == "cuda":
            self.onload()

    @torch.inference_mode(False)
    def onload(self) -> None:
        """Move to the device. Broken off midway, they are where they were."""
        if self._home is not None and self._there is not None:  # nobody heard of its end: not there twice
            self._point_into(self._home)
            self._there = None
        _give_back(self._device)  # or what activations left would lie beside the piece
        sources, nbytes = self._sources()
        there = _room(nbytes, self._device)
        staging = Staging(self._device, min(self._staging_bytes, 2 * max(nbytes, 1)))
        for source, begin in sources:
            staging.copy(source, there[begin : begin + len(source)])
        staging.wait()  # streams are not ordered with each other, and any of them may use the weights next
        self._there = there
        self._point_into(there)

    @torch.inference_mode(False)
    def offload(self) -> None:
        """Move to the host, and give the device's memory back. Broken off midway, they can be told to leave again."""
        if self._home is None:
            self._home = self._copy()  # only once it is whole: weights come back from it
        self._point_into(self._home)
        self._there = None
        _give_back(self._device)

    def _copy(self) -> Tensor:
        """All weights in one piece on the host."""
        sources, nbytes = self._sources()
        home = _room(nbytes, torch.device("cpu"))
        for source, begin in sources:
            home[begin : begin + len(source)].copy_(source)
        return home

    def _sources(self) -> tuple[list[tuple[Tensor, int]], int]:
        """The bytes of all weights and where in the piece each part of them begins; and the bytes of the piece."""
        whole = self._home if self._home is not None else self._there
        if whole is not None:
            return [(whole, 0)], len(whole)
        self._places, parts, nbytes = _places(self._tensors, as_they_lie=self._device.type == "cpu")
        return parts, nbytes

    def _point_into(self, piece: Tensor) -> None:
        storage = piece.untyped_storage()
        for tensor, begin in self._places:
            there = torch.empty(0, dtype=tensor.dtype, device=piece.device)
            there.set_(storage, begin // tensor.itemsize, tensor.shape, tensor.stride())
            tensor.data = there


def _room(nbytes: int, device: torch.device) -> Tensor:
    """Memory for a piece: uint8 [nbytes]."""
    whole = -(-nbytes // _SEGMENT) * _SEGMENT if device.type == "cuda" else nbytes
    return torch.empty(whole, dtype=torch.uint8, device=device)[:nbytes]


def _give_back(device: torch.device) -> None:
    """Memory that nothing refers to any more, to the device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def _places(
    tensors: Sequence[Tensor], *, as_they_lie: bool
) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]], int]:
    """Where in one piece each tensor begins, in bytes; the parts of memory that go there, and where; the bytes of all.

    A part is what the tensors over one storage span of it: they stay views of each other.

    Args:
        as_they_lie: a part that did not begin at a multiple of `_HOST_ALIGNMENT`, as in a mapped file, does not in the
            piece either. By that some processors' matrix products are rounded, so that the same bits come out.
    """
    shared: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            shared.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    places: list[tuple[Tensor, int]] = []
    parts: list[tuple[Tensor, int]] = []
    end = 0
    for group in shared.values():
        spans = [_span(tensor) for tensor in group]
        low, high = min(first for first, _ in spans), max(last for _, last in spans)
        storage = group[0].untyped_storage()
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        past = (storage.data_ptr() + low) % _HOST_ALIGNMENT
        # But where an item begins at an odd address, at which no tensor can be made.
        if as_they_lie and not any(past % tensor.itemsize for tensor in group):
            begin += past
        memory = torch.empty(0, dtype=torch.uint8, device=group[0].device).set_(storage)
        parts.append((memory[low:high], begin))
        places += [(tensor, begin + first - low) for tensor, (first, _) in zip(group, spans, strict=True)]
        end = begin + high - low
    return places, parts, end


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor lies in."""
    begin = int(tensor.storage_offset()) * tensor.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize


class Resident(Protocol):
    """What may have to leave the device for another to run there."""

    @property
    def component(self) -> Component:
        """What it is of."""
        ...

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        ...

    @property
    def present(self) -> bool:
        """Whether its weights are on the device."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights on the device."""
        ...

    @property
    def graph_cache(self) -> GraphCache:
        """What is recorded of it, among others, and goes when it leaves."""
        ...

    @property
    def looping(self) -> bool:
        """Whether a loop runs over it, whose weights may not leave before its end."""
        ...

    @property
    def residency(self) -> Residency | None:
        """What may make it leave, if anything does."""
        ...

    def offload(self) -> None:
        """Give back the device's memory until it is used again."""
        ...


class Residency:
    """Keeps on each device what a policy allows there: of one pipeline's engines, or of several that share parts.

    Attributes:
        policy: by which they leave.
        lock: held by who uses any of the engines, from the first to the last: two at once would send each other's away.
    """

    def __init__(self, policy: Policy) -> None:
        self.lock = threading.RLock()
        self.policy = policy
        self._present: list[weakref.ref[Resident]] = []  # it is their owners that let go of them

    @property
    def present(self) -> list[Resident]:
        """Those on a device, in the order in which they came."""
        return [engine for there in self._present if (engine := there()) is not None]

    def together(self, kind: Kind) -> bool:
        """Whether networks of this kind may be on the device at the same time."""
        return stays(self.policy, kind, kind)

    def enter(self, engine: Resident) -> None:
        """Before it is loaded or brought back: what may not stay with it leaves.

        Raises:
            RequestError: that is in the midst of a loop, one of whose callbacks asks for this one.
        """
        running = kind_of(engine.component.name)
        leaving = [
            other
            for other in self.present
            if other is not engine
            and other.device == engine.device
            and not stays(self.policy, kind_of(other.component.name), running)
        ]
        for other in leaving:
            if other.looping:  # it goes on over the weights that it has
                raise RequestError(
                    f"a callback asks for {engine.component.name} while the {other.component.name} takes its steps, "
                    f"and by memory={self.policy!r} they are not on the device together: load the pipeline with "
                    "memory='balanced', or do it after the call; for pictures of steps call fit_previewer before it"
                )
        for other in leaving:
            other.offload()
        self._present = [weakref.ref(other) for other in self.present if other is not engine]
        self._present.append(weakref.ref(engine))

    def left(self, engine: Resident) -> None:
        """It is not on the device any more, whatever the reason."""
        self._present = [weakref.ref(other) for other in self.present if other is not engine]


@contextmanager
def exclusive(engines: Iterable[Resident]) -> Iterator[None]:
    """None of these leaves for another thread meanwhile."""
    found = {id(x.residency): x.residency for x in engines if x.residency is not None}
    with ExitStack() as stack:
        for _, residency in sorted(found.items()):  # in one order, whoever asks
            stack.enter_context(residency.lock)
        yield
