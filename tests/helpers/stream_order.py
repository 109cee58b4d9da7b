"""Whether what a program gives a GPU's streams is ordered: every read after its write, and no write beside either.

A race is found by what orders the work (events, waits of the host), not by what came out, so it is seen on any
device, also on `bench/null_cuda`, which computes nothing. Seen are PyTorch's operators, custom ones, graphs and
memory; accesses are those that an operator's schema tells, of whole blocks of memory.

A thread's wait counts for what this thread launches afterwards, and for others once they take a lock that it gave
back, or are started or joined by it. Followed are the locks that are made meanwhile: those of a pipeline that is loaded
there. Not followed are those of modules, which only keep calls of a library apart (Triton's launches, captures): an
order that rests on one of them alone is reported.

Not seen are: what passes PyTorch's dispatcher by, as engines do that run in place of it; and memory in a graphs' pool
other than what replays access.

PyTorch's own sanitizer (`torch.cuda._sanitizer`) knows neither threads, nor graphs, nor the host's memory, nor memory
that is freed while a stream uses it.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from torch.cuda import _gpu_trace as trace
from torch.cuda._sanitizer import zip_arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.vector_clocks import Clock, Clocks, FollowedLock, merge

__all__ = ["StreamOrder", "following"]

_NO_ACCESS = re.compile(r"aten::(empty|new_empty|set_$|is_pinned|detach|record_stream)|profiler::")
"""Operators that make tensors of no content, or look at nothing but a tensor's kind."""

_WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
"""Operators for whose result the host waits."""

_COPIES = ("aten::copy_", "aten::_to_copy")


@dataclass(frozen=True)
class _Access:
    stream: int
    number: int
    what: str
    where: str


@dataclass
class _Block:
    """Memory of a device: the stream whose allocations come from it, and who accessed it last."""

    owner: int | None = None
    write: _Access | None = None
    reads: dict[int, _Access] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)

    def accesses(self) -> Iterator[_Access]:
        if self.write is not None:
            yield self.write
        yield from self.reads.values()


class StreamOrder:
    """Follows one process's work, in the threads that are in its `mode`.

    Attributes:
        races: one line for each kind that was found.
    """

    def __init__(self) -> None:
        self.races: dict[str, None] = {}
        self._lock = threading.RLock()
        self.clocks = Clocks()
        self._number = 0
        self._blocks: dict[int, _Block] = {}
        self._host: dict[
            int, list[tuple[_Access, bool]]
        ] = {}  # memory under a copy, and whether that writes to it
        self._graphs: dict[int, tuple[set[int], set[int]]] = {}
        self._captured = threading.local()
        for name, follow in {
            "event_record": self.clocks.record,
            "event_wait": self.clocks.wait,
            "event_synchronization": self.clocks.synchronize_event,
            "stream_synchronization": self.clocks.synchronize_stream,
            "device_synchronization": self.clocks.synchronize_device,
            "memory_allocation": self._allocated,
            "memory_deallocation": self._freed,
        }.items():
            register: Callable[[Callable[..., None]], None] = getattr(trace, f"register_callback_for_{name}")
            register(self._locked(follow))
        torch._C._activate_gpu_trace()

    def _locked(self, follow: Callable[..., None]) -> Callable[..., None]:
        def call(*args: int) -> None:
            with self._lock:
                follow(*args)

        return call

    # Memory. What a capture allocates belongs to its pool, whose graphs are followed as a whole.

    def _allocated(self, address: int) -> None:
        if not torch.cuda.is_current_stream_capturing():
            self._block(address).owner = _stream()  # of a pool, replays may have accessed it before

    def _freed(self, address: int) -> None:
        block = None if torch.cuda.is_current_stream_capturing() else self._blocks.pop(address, None)
        if block is None or block.owner is None:
            return
        for access in block.accesses():
            if access.stream not in block.recorded and not self._is_after(block.owner, access):
                self._found("memory is freed for its stream's next allocation", _where(), access)

    def recorded(self, x: Tensor, stream: int) -> None:
        with self._lock:
            self._block(_address(x)).recorded.add(stream)

    def _block(self, address: int) -> _Block:
        return self._blocks.setdefault(address, _Block())

    # Work of the device.

    def launched(self, what: str, reads: set[int], writes: set[int]) -> _Access | None:
        """An operator was put on the current stream; None where it was captured."""
        if torch.cuda.is_current_stream_capturing():
            captured_reads, captured_writes = self._captured.now
            captured_reads |= reads
            captured_writes |= writes
            return None
        with self._lock:
            self._number += 1
            now = _Access(_stream(), self._number, what, _where())
            self.clocks.stream(now.stream)[now.stream] = now.number
            for address in reads - writes:
                block = self._block(address)
                self._check("reads what is written", now, block.write)
                block.reads[now.stream] = now
            for address in writes:
                block = self._block(address)
                for access in block.accesses():
                    self._check("writes what is in use", now, access)
                block.write, block.reads = now, {}
            return now

    def begin_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        self._captured.now = self._graphs[id(graph)] = set(), set()

    def replayed(self, graph: torch.cuda.CUDAGraph) -> None:
        reads, writes = self._graphs[id(graph)]
        self.launched("a graph", reads, writes)

    def _is_after(self, stream: int, access: _Access) -> bool:
        return access.stream == stream or self.clocks.stream(stream).get(access.stream, 0) >= access.number

    def _check(self, how: str, now: _Access, before: _Access | None) -> None:
        if before is not None and not self._is_after(now.stream, before):
            self._found(f"{now.what} {how}", now.where, before)

    def _found(self, how: str, where: str, before: _Access) -> None:
        self.races.setdefault(f"{how} ({where}), while {before.what} may run ({before.where})")

    # The host.

    def copied(self, copy: _Access, sources: set[int], targets: set[int], *, waited: bool) -> None:
        """A copy between host and device was put on a stream; addresses are of pinned memory: with any other the host
        waits until it is free."""
        with self._lock:
            if waited:
                self.clocks.synchronize_stream(copy.stream)
                return
            for address in sources | targets:
                copies = self._host.setdefault(address, [])
                for before, to_host in copies:
                    if to_host or address in targets:
                        self._check("uses memory that is copied", copy, before)
                if address in targets:
                    copies.clear()
                copies.append((copy, address in targets))

    def waited(self, stream: int) -> None:
        with self._lock:
            self.clocks.synchronize_stream(stream)

    def waited_for(self, event: torch.cuda.Event) -> None:
        with self._lock:
            self.clocks.synchronize_event(event.cuda_event)

    def host_accessed(self, what: str, reads: set[int], writes: set[int]) -> None:
        with self._lock:
            done = self.clocks.host
            for address in reads | writes:
                for copy, to_host in self._host.get(address, []):
                    if copy.number > done.get(copy.stream, 0) and (to_host or address in writes):
                        self._found(f"the host's {what} uses memory", _where(), copy)

    @property
    def mode(self) -> TorchDispatchMode:
        return _Mode(self)


class _Mode(TorchDispatchMode):
    def __init__(self, order: StreamOrder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._order = order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name
        if name == "aten::record_stream":
            self._order.recorded(args[0], _of(args[1]))
        aliases = [argument.alias_info for argument in schema.arguments]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if is_view or _NO_ACCESS.match(name):
            return out
        reads, writes, host_reads, host_writes = set[int](), set[int](), set[int](), set[int]()
        for argument, value in zip_arguments(schema, args, kwargs):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for x in () if name.endswith("_like") else _tensors(value):
                on_device = writes if is_written else reads
                on_host = host_writes if is_written else host_reads
                (on_device if x.is_cuda else on_host).add(_address(x))
        for x in _tensors(out):
            (writes if x.is_cuda else host_writes).add(_address(x))
        if not reads and not writes:
            self._order.host_accessed(name, host_reads, host_writes)
            return out
        access = self._order.launched(name, reads, writes)
        if access is not None and name in _WAITS:
            self._order.waited(access.stream)
        elif access is not None and name in _COPIES and (host_reads or host_writes):
            waited = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            pinned = {_address(x) for x in _tensors((args, out)) if not x.is_cuda and x.is_pinned()}
            self._order.copied(access, host_reads & pinned, host_writes & pinned, waited=waited)
        return out


@contextmanager
def following(order: StreamOrder) -> Iterator[StreamOrder]:
    """This thread's work and that of threads begun meanwhile is followed.

    Raises:
        AssertionError: at the end, where a race was found.
    """
    begin, replay = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.replay
    query = torch.cuda.Event.query
    make_lock, make_rlock = threading.Lock, threading.RLock
    start, run, join = threading.Thread.start, threading.Thread.run, threading.Thread.join
    clocks = order.clocks
    parents, ended = (
        WeakKeyDictionary[threading.Thread, Clock](),
        WeakKeyDictionary[threading.Thread, Clock](),
    )

    def noted_begin(self: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
        order.begin_capture(self)
        begin(self, *args, **kwargs)

    def noted_replay(self: torch.cuda.CUDAGraph) -> None:
        replay(self)
        order.replayed(self)

    def noted_query(self: torch.cuda.Event) -> bool:
        done = query(self)
        if done:
            order.waited_for(self)
        return done

    def followed_start(self: threading.Thread) -> None:
        parents[self] = dict(clocks.host)
        start(self)

    def followed_run(self: threading.Thread) -> None:
        merge(clocks.host, parents[self])
        try:
            with order.mode:
                run(self)
        finally:
            ended[self] = dict(clocks.host)

    def followed_join(self: threading.Thread, timeout: float | None = None) -> None:
        join(self, timeout)
        if not self.is_alive():
            merge(clocks.host, ended.get(self, {}))

    order.races.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "capture_begin", noted_begin)
        patch.setattr(torch.cuda.CUDAGraph, "replay", noted_replay)
        patch.setattr(torch.cuda.Event, "query", noted_query)
        patch.setattr(threading, "Lock", lambda: FollowedLock(make_lock(), clocks))
        patch.setattr(threading, "RLock", lambda: FollowedLock(make_rlock(), clocks))
        patch.setattr(threading.Thread, "start", followed_start)
        patch.setattr(threading.Thread, "run", followed_run)
        patch.setattr(threading.Thread, "join", followed_join)
        with order.mode:
            yield order
    assert not order.races, "\n".join(order.races)


def _tensors(value: Any) -> Iterator[Tensor]:
    for x in tree_leaves(value):
        if isinstance(x, Tensor) and x.numel() and x.device.type in ("cuda", "cpu"):
            yield x


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _of(stream: torch.Stream) -> int:
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    ).cuda_stream


def _where() -> str:
    """The project's innermost lines."""
    frame, found = sys._getframe(1), list[str]()
    while frame is not None and len(found) < 2:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("latentrt") or "test_" in module:
            found.append(f"{module}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)
