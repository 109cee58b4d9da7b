"""Work recorded once and replayed: CUDA graphs, and the same thing on the CPU.

What is recorded reads and writes tensors that were there before, the static ones; everything else it makes is its own
and means nothing between two replays. Host values (sizes, scales, loop counts) are as they were when it was recorded.

Without CUDA a recording is the list of PyTorch operations that the work ran, over the very tensors it ran them on.
Replaying it overwrites its own tensors with NaN first, so that what a CUDA graph would get wrong by reading a buffer
left from the replay before is wrong on the CPU as well; operations that read a value back to the host are refused. It
cannot see what passes PyTorch's dispatcher by (`tolist`, `numpy`), nor a static tensor that was given other memory.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import CaptureError, LatentRTError
from .place import memory_ran_out

__all__ = ["Graph", "Graphs", "expect_modes"]

_HOST_READS = (
    *("_local_scalar_dense", "equal", "is_nonzero", "allclose"),
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
)
"""Operations that wait for the device to tell the host a value or a size."""

_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Operations whose result holds nothing yet."""


_CAPTURING = threading.RLock()


def expect_modes() -> None:
    """To be called before a dispatch mode is entered, once where it is certain that one will be: by them work is
    recorded here, and followed in `footprint`.

    The first that is makes PyTorch import its compiler, which leaves a cycle of all frames that led there: a pipeline
    would be held by its own call until garbage is collected, and a GPU's memory with it.
    """
    if "torch._dynamo" not in sys.modules:
        import_module("torch._dynamo")
        gc.collect()


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again, over what its static tensors hold now; on a GPU, put it on the current stream."""
        ...


class Graphs:
    """Recordings on one device, which share their memory, one at a time.

    Recordings that share memory must not run at once: `exclusive` is held while something is recorded or replayed.

    Attributes:
        room: bytes that the shared memory begins with in one piece, where somebody knows what is to be recorded (a
            plan does). Asked for tensor by tensor, it would be in pieces that a larger tensor does not fit into.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.room = 0
        self._lock = threading.RLock()
        self._pool: Any = None
        self._in_pool: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: Any = None
        self._last: Any = None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nothing else is recorded or replayed meanwhile, in any thread or stream."""
        with self._lock:
            if self._last is not None:
                torch.cuda.current_stream(self.device).wait_event(self._last)
            try:
                yield
            finally:
                if self.device.type == "cuda":
                    self._last = torch.cuda.current_stream(self.device).record_event()

    def capture(self, work: Callable[[], object], what: str) -> Graph:
        """Record `work`, which runs up to three times meanwhile: write the static tensors afterwards.

        Args:
            what: its name, for messages.

        Raises:
            CaptureError: it does something that cannot be recorded; the operation is named.
        """
        if self.device.type == "cuda":
            return self._capture_cuda(work, what)
        recording = _Recording(what)
        with recording:
            work()
        return _RecordedGraph(recording)

    def _capture_cuda(self, work: Callable[[], object], what: str) -> Graph:
        # One at a time on all devices: capturing begins by waiting for the device, which another capture does not bear.
        with _CAPTURING, torch.cuda.device(self.device):
            others = list(self._in_pool)  # of which none goes meanwhile
            if not others:  # a pool that no graph has any more cannot be used again
                self._pool = torch.cuda.graph_pool_handle()
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
            stream, current = self._stream, torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            graph, watch = torch.cuda.CUDAGraph(), _LastOperation()
            with _run_in_pool(self._pool, stream, work, 0 if others else self.room):
                try:
                    # Other threads may use the device meanwhile, so only what this one does counts.
                    captured: AbstractContextManager[None] = torch.cuda.graph(
                        graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                    )
                    with torch.cuda.stream(current), _uncollected(), captured, watch:
                        work()
                except BaseException as error:
                    # What a capture that failed leaves behind in its pool cannot be told: the next one gets another.
                    _abandon(self._pool, graph)
                    self._in_pool, self._stream = WeakSet(), None
                    torch.cuda.set_stream(current)
                    _reset_generator(self.device)
                    first = error.__context__ or error  # ending the capture fails too, for no other reason
                    if not isinstance(first, RuntimeError) or isinstance(first, LatentRTError):
                        raise
                    raise _failed(what, watch.name, " ".join(str(first).split())[:300]) from error
            self._in_pool.add(graph)
            current.wait_stream(stream)
            return graph


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which may come upon graphs and events of others, and wait for these: what a capture
    does not bear."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _run_in_pool(
    pool: Any, stream: torch.cuda.Stream, work: Callable[[], object], room: int
) -> Iterator[None]:
    """Run `work` before it is captured, so that kernels are compiled and libraries choose their algorithms outside of
    the graph; and hold the pool until that is done. `room`: bytes of one piece that the pool is to have.

    It runs in the memory that the graphs share. Elsewhere it would take as much again, which no plan counts; and what
    cuBLAS keeps as its workspace for the stream would be outside of the pool, where PyTorch frees it with the first
    graph that goes, while others still write there. One that is there already, since PyTorch's streams are 32 that come
    round again, is let go before; graphs that have it keep it with their pool.

    cuDNN, where PyTorch was told to let it try its algorithms (`torch.backends.cudnn.benchmark`), takes the largest
    workspace that any of them wants and gives it back to the allocator. To a pool that would be for as long as there
    are graphs, so it tries them before, elsewhere; PyTorch remembers what it chose. Where there is no room for that
    beside the graphs, it tries them in the pool after all.
    """
    device = torch.cuda.current_device()
    if torch.backends.cudnn.benchmark:
        try:
            with torch.cuda.stream(stream):
                work()
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
        stream.synchronize()
    torch.cuda.empty_cache()  # an allocation does not do so by itself, for want of memory, while one goes into a pool
    torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    try:
        try:
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.stream(stream):
                torch.cuda.current_blas_handle()  # makes its workspace, or it would lie in the piece, and keep that
                if room and not _parts_no_large_piece():
                    torch.empty(room, dtype=torch.uint8, device="cuda")  # let go: what follows finds it
                work()
        finally:
            torch._C._cuda_endAllocateToPool(device, pool)
            stream.synchronize()
        yield
    finally:
        torch._C._cuda_releasePool(device, pool)


def _parts_no_large_piece() -> bool:
    """Whether PyTorch's allocator was told not to serve small tensors from large pieces of memory."""
    told = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return any("max_split_size_mb" in text for text in told)


def _abandon(pool: Any, graph: torch.cuda.CUDAGraph) -> None:
    """A capture of the graph into the pool failed, on the current device.

    Before PyTorch 2.12 (pytorch/pytorch#180395) one whose end fails leaves the allocator believing that it goes on:
    cached memory is never given back again, not even where there is no other. Later ones have ended it by then, and
    refuse to do so again; but a graph that was not captured never gives up its share of the pool (#190308).
    """
    end, release = (getattr(torch._C, f"_cuda_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is None or release is None:
        return
    device = torch.cuda.current_device()
    try:
        end(device, pool)
    except RuntimeError:
        with suppress(RuntimeError):
            graph.pool()  # of one that was captured
            return
    with suppress(RuntimeError):
        release(device, pool)


def _reset_generator(device: torch.device) -> None:
    """After a capture that failed: PyTorch then leaves the device's own random generator as in one, and refuses all
    random numbers outside of it (seen in 2.11). The end of one that does not fail sets it back."""
    with suppress(RuntimeError):  # of a device that is lost, which whoever uses it next is told
        x, graph = torch.empty(1, device=device), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        captured: AbstractContextManager[None] = torch.cuda.graph(
            graph, stream=stream, capture_error_mode="thread_local"
        )
        with _uncollected(), captured:
            x.zero_()  # PyTorch warns of an empty one


def _failed(what: str, operation: str, why: str) -> CaptureError:
    return CaptureError(
        f"{what} cannot be recorded as a CUDA graph: {operation or 'its first operation'} failed ({why}); "
        "run without graphs (graphs=False, or --no-graphs)"
    )


class _LastOperation(TorchDispatchMode):
    """Remembers the name of the operation that ran last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.name = func.name()
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    """The operations of a piece of work, with the tensors they took and made."""

    def __init__(self, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self._what = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _HOST_READS:
            raise _failed(self._what, func.name(), "it reads a value back to the host")
        out = func(*args, **kwargs)
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [
            (k, x)
            for k, x in enumerate(tree_leaves(out))
            if isinstance(x, Tensor) and x.numel() and _memory(x) not in given
        ]
        self.operations.append((func, args, kwargs, made))
        return out


class _RecordedGraph:
    def __init__(self, recording: _Recording) -> None:
        self._operations = recording.operations

    @torch.inference_mode()
    def replay(self) -> None:
        for _, _, _, made in self._operations:
            for _, x in made:
                _poison(x)
        for func, args, kwargs, made in self._operations:
            if func.overloadpacket.__name__ in _UNWRITTEN:
                continue
            out = tree_leaves(func(*args, **kwargs))
            for k, x in made:
                x.copy_(out[k])


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _poison(x: Tensor) -> None:
    """NaN, or what is as far from sense."""
    if x.dtype.is_floating_point:
        x.fill_(float("nan"))
    elif x.dtype == torch.bool:
        x.logical_not_()
    else:
        x.fill_(torch.iinfo(x.dtype).min)
