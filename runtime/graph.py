"""Work captured once and replayed: CUDA graphs, and the same thing on the CPU.

Captured work reads and writes static tensors, which exist before; everything else that it makes is its own and means
nothing between two replays. Host values (sizes, scales, loop counts) stay as they were at capture. On the CPU work is
recorded and replayed by the same rules: see `recorded_graph`.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib import import_module
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BackendError, CaptureError
from .place import memory_ran_out
from .recorded_graph import RecordedGraph, Recording, capture_error

__all__ = ["Graph", "Graphs", "empty_cache", "expect_modes", "reset_generator", "synchronize"]

_CAPTURING = threading.RLock()
"""Held while a graph is captured, on whatever device. Taken after all locks of loaders and engines."""
_CAPTURING_ON: dict[torch.device, AbstractContextManager[bool]] = {}
"""The same of one device, by its number; taken after it."""

_BROKEN = "previous error during capture"
"""What CUDA says of whatever is done in a capture that is broken, its end included."""
_MUTE = ("CUBLAS_STATUS_", "CUDNN_STATUS_")
"""What libraries say in its place, whatever failed."""


def expect_modes() -> None:
    """Call this before a dispatch mode is first entered: captures enter one (on a GPU too, to name the operation that
    fails), and `footprint` does.

    Entering the first makes PyTorch import its compiler, which leaves a reference cycle of all frames that led there: a
    pipeline, and its GPU memory, would be held by its own call until garbage is collected.
    """
    if "torch._dynamo" not in sys.modules:
        import_module("torch._dynamo")
        gc.collect()


def _capturing_on(device: torch.device) -> AbstractContextManager[bool]:
    return _CAPTURING_ON.setdefault(device, threading.RLock())


def synchronize(device: torch.device) -> None:
    """Wait for all that was submitted to a GPU, on whatever stream; but first for a capture that another thread is at
    there, which that would break."""
    with _capturing_on(device):
        torch.cuda.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give the allocator's unused memory back to a GPU. It keeps all of it during a capture, so first wait for one that
    another thread is at there."""
    with _capturing_on(device), torch.cuda.device(device):
        torch.cuda.empty_cache()


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Run it over what its static tensors hold now; on a GPU, launch it on the current stream."""
        ...


class Graphs:
    """Captures graphs on one device, all in one memory pool.

    Graphs that share a pool must not run at once: hold `exclusive` while one is captured or replayed.

    Attributes:
        first_block: bytes of the one block that a new pool begins with, if a plan tells what will be captured.
            Grown tensor by tensor, the pool would be many blocks, into which a larger tensor does not fit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_block = 0
        self._lock = threading.RLock()
        self._pool: Any = None
        self._pool_began_with = 0
        self._in_pool: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: Any = None
        self._last: Any = None  # the event after what ran last
        self._holder: Any = None  # the stream of who is exclusive now

    @property
    def pool_began_with(self) -> int | None:
        """The `first_block` of the pool that there is; None while no graph has one."""
        return self._pool_began_with if self._in_pool else None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nothing else is captured or replayed meanwhile, in any thread or stream.

        It may be entered again within, on another stream too, as a callback does that decodes between two steps: that
        runs after what was submitted before it, and before what is submitted after it.
        """
        with self._lock:
            if self.device.type != "cuda":
                yield
                return
            outer, stream = self._holder, torch.cuda.current_stream(self.device)
            if outer is not None:
                stream.wait_stream(outer)
            elif self._last is not None:
                stream.wait_event(self._last)
            self._holder = stream
            try:
                yield
            finally:
                self._holder = outer
                self._last = stream.record_event()
                if outer is not None:
                    outer.wait_event(self._last)

    def capture(self, work: Callable[[], object], what: str) -> Graph:
        """Capture `work`. It is also run eagerly up to twice to warm up, so the static tensors hold garbage afterwards:
        write them after this call. If another thread breaks the capture, all of that is done once more.

        Args:
            what: its name, for messages.

        Raises:
            CaptureError: it does something that cannot be captured; the operation is named.
            BackendError: its back end failed.
        """
        if self.device.type == "cuda":
            try:
                return self._capture_cuda(work, what)
            except BackendError as error:
                if not _broken_by_others(error):
                    raise
            return self._capture_cuda(work, what)
        recording = Recording(what)
        with recording:
            work()
        return RecordedGraph(recording)

    def _capture_cuda(self, work: Callable[[], object], what: str) -> Graph:
        # One at a time: a capture begins by waiting for the device, which breaks another one there, and the workspaces
        # that its warm-up drops are those of all devices.
        with _CAPTURING, _capturing_on(self.device), torch.cuda.device(self.device):
            keep_alive = list(self._in_pool)  # or the pool could go meanwhile
            if not keep_alive:  # a pool that no graph has any more cannot be used again
                self._pool, self._pool_began_with = torch.cuda.graph_pool_handle(), self.first_block
            if self._stream is None:
                # Of high priority: PyTorch hands out 32 streams of each priority in rotation, and the one that is
                # captured must not be a caller's.
                self._stream = torch.cuda.Stream(self.device, priority=-1)
            pool, stream, current = self._pool, self._stream, torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            graph, last_operation, begun = torch.cuda.CUDAGraph(), _LastOperation(), False
            _choose_cudnn_algorithms(stream, work)
            with ExitStack() as held:
                _warm_up(pool, stream, work, 0 if keep_alive else self.first_block, held)
                try:
                    # Other threads may use the device meanwhile, so only what this one does counts.
                    captured: AbstractContextManager[None] = torch.cuda.graph(
                        graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                    )
                    with torch.cuda.stream(current), _uncollected(), captured, last_operation:
                        begun = True
                        work()
                except BaseException as error:
                    # What a failed capture leaves in its pool is unknown: the next one gets another.
                    _abandon(pool, graph, stream, begun=begun)
                    self._in_pool, self._stream = WeakSet(), None
                    torch.cuda.set_stream(current)
                    reset_generator(self.device)
                    # Ending the capture fails too if its work has failed, for no other reason.
                    first = (last_operation.error or error) if isinstance(error, Exception) else error
                    if first is error and not isinstance(error, RuntimeError):
                        raise
                    if not isinstance(first, RuntimeError):
                        raise first from first.__cause__
                    raise capture_error(
                        what, last_operation.name, " ".join(str(first).split())[:300]
                    ) from error
            self._in_pool.add(graph)
            current.wait_stream(stream)
            return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's garbage collector: it may free graphs and events of others, which waits for the device and so
    breaks a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _choose_cudnn_algorithms(stream: torch.cuda.Stream, work: Callable[[], object]) -> None:
    """Run `work` outside of the graphs' pool if cuDNN is to time its algorithms (`torch.backends.cudnn.benchmark`).

    For that it takes the largest workspace that any of them wants and returns it to the allocator; in a pool it would
    stay for as long as there are graphs. PyTorch remembers the choice. If memory does not suffice beside the graphs,
    the warm-up in the pool makes it.
    """
    if torch.backends.cudnn.benchmark:
        try:
            with torch.cuda.stream(stream):
                work()
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
        stream.synchronize()


def _warm_up(
    pool: Any, stream: torch.cuda.Stream, work: Callable[[], object], first_block: int, held: ExitStack
) -> None:
    """Run `work` before it is captured, so that kernels are compiled and libraries set up outside of the graph.

    In the graphs' pool: elsewhere it would take as much memory again, which no plan counts.

    Args:
        first_block: bytes of one block that the pool is to have; 0 for none.
        held: keeps the pool until it is closed, by when a graph may have it.
    """
    device = torch.cuda.current_device()
    torch.cuda.empty_cache()  # an allocation that fails does not do so by itself while others go into a pool
    torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    held.callback(torch._C._cuda_releasePool, device, pool)
    try:
        # cuBLAS's workspace for the stream must be in the pool: PyTorch would free one outside with the first graph
        # that goes, while others still write there. PyTorch hands out 32 streams in rotation, so this one may already
        # have a workspace from earlier use: drop it. Graphs captured with it keep it alive through their pool.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.stream(stream):
            torch.cuda.current_blas_handle()  # allocates the workspace now: it must not lie in the block
            if first_block and not _splits_are_limited():
                # Freed at once, and split among what follows.
                torch.empty(first_block, dtype=torch.uint8, device="cuda")
            work()
    finally:
        torch._C._cuda_endAllocateToPool(device, pool)
        stream.synchronize()


def _splits_are_limited() -> bool:
    """Whether PyTorch's allocator is configured not to serve small tensors from large blocks."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return any("max_split_size_mb" in text for text in settings)


def _abandon(pool: Any, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, *, begun: bool) -> None:
    """Clean up after a capture of the graph into the pool that failed, on the current device.

    Before PyTorch 2.12 (pytorch/pytorch#180395), if ending the capture fails, the allocator believes that it goes on:
    cached memory is never given back again, even if there is no other. Later versions have ended it by then, and
    refuse to do so again; but a graph that was not captured never gives up its share of the pool (#190308).

    Args:
        stream: the one that is captured.
        begun: whether the capture is known to have begun. One that failed before, as PyTorch waited for the device, has
            no share of the pool: to release one would take another graph's.
    """
    with torch.cuda.stream(stream), suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():  # Ctrl-C came just after it began, or before it ended
            begun = True
            graph.capture_end()
    end, release = (getattr(torch._C, f"_cuda_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is None or release is None:
        return
    device = torch.cuda.current_device()
    try:
        end(device, pool)
    except RuntimeError:
        if not begun:
            return
        with suppress(RuntimeError):
            graph.pool()  # of one that was captured
            return
    with suppress(RuntimeError):
        release(device, pool)


def reset_generator(device: torch.device) -> None:
    """Call this after a failed capture. PyTorch leaves the device's default random generator in capture mode, and
    refuses all random numbers outside of a capture (seen in 2.11). The end of a successful capture resets it."""
    with suppress(RuntimeError):  # the device may be lost; whoever uses it next will see that
        x, graph = torch.empty(1, device=device), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device, priority=-1)
        captured: AbstractContextManager[None] = torch.cuda.graph(
            graph, stream=stream, capture_error_mode="thread_local"
        )
        with _uncollected(), captured:
            x.zero_()  # PyTorch warns of an empty one


def _broken_by_others(error: BackendError) -> bool:
    """Whether something else than its own work broke the capture that ended in this.

    An operation that cannot be captured breaks it as well, but says so itself: of the operations that fail in a capture
    that is broken already, only PyTorch's and Triton's name the reason.
    """
    if _BROKEN in str(error):
        return True
    mute = not isinstance(error, CaptureError) or any(status in str(error) for status in _MUTE)
    end_of_capture = error.__context__
    return mute and _BROKEN in str(end_of_capture)


class _LastOperation(TorchDispatchMode):
    """Remembers the name of the operation that ran last, and the error that ended the work, if one did."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = ""
        self.error: BaseException | None = None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.error = error
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.name = func.name()
        return func(*args, **(kwargs or {}))
