"""Engines loaded when first used, all on one back end and device, and their calls captured as graphs.

A pipeline that never starts from an image never exports the VAE's encoder.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..graph import Graphs, expect_modes, synchronize
from ..graph_cache import GraphCache
from ..memory import Policy
from ..residency import Residency, shared_residency
from ..streams import current_stream
from .base import Component, Engine, Movable, check_inputs, output_shapes
from .registry import choose

__all__ = ["EngineLoader", "LazyEngine"]


class EngineLoader:
    """Where and how components run; chosen once for a pipeline and changed only by `Pipeline.to`.

    Attributes:
        graphs: captures engines whose work can be captured; None to run everything eagerly.
        graph_cache: captured graphs that are not in use.
        residency: offloads weights by policy.
    """

    def __init__(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        cache_dir: Path | None,
        graphs: bool | None = None,
        policy: Policy = "resident",
        shared: Iterable[LazyEngine] = (),
    ) -> None:
        """
        Args:
            graphs: whether to capture graphs; by default where the device is a GPU.
            policy: by which weights are offloaded.
            shared: engines of other pipelines that run beside its own; under the same policy, they are offloaded for
                each other.
        """
        self._name = backend
        self._graphs = graphs
        self.dtype = dtype
        self.cache_dir = cache_dir
        self.graph_cache = GraphCache()
        self.residency = shared_residency(policy, shared) or Residency(policy)
        self._engines: weakref.WeakSet[LazyEngine] = weakref.WeakSet()  # they belong to the networks' owners
        self._one_at_a_time = threading.RLock()
        self.device = device
        self.graphs: Graphs | None = None
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Run on another device from now on.

        Raises:
            BackendUnavailableError: the back end cannot run there; nothing has changed then.
        """
        # A VAE that would overflow in float16 has another dtype, chosen for the device it was loaded for.
        dtypes = dict.fromkeys([self.dtype, *(engine.component.dtype for engine in self._engines)])
        backend = choose(self._name, device, *dtypes)
        wanted = device.type == "cuda" if self._graphs is None else self._graphs
        if wanted:
            expect_modes()
        with self.residency.held(), self.exclusive(), ExitStack() as held:
            graphs = Graphs(device) if wanted else None
            if self._engines:
                # Those that another pipeline shares do not run there before they are closed, and may still be running
                # on the device they leave.
                held.enter_context(self._exclusive(device, graphs))
                _wait(self.device, self.graphs)
            self.backend, self.device, self.graphs = backend, device, graphs
            for engine in self._engines:
                engine.close()

    def exclusive(self) -> AbstractContextManager[object]:
        """While a thread runs an engine on a GPU, no other thread runs one of this loader: graphs share memory, and
        without graphs the activations of several would add up, of which plans count one."""
        return self._exclusive(self.device, self.graphs)

    def _exclusive(self, device: torch.device, graphs: Graphs | None) -> AbstractContextManager[object]:
        if graphs is not None:
            return graphs.exclusive()
        return self._one_at_a_time if device.type == "cuda" else nullcontext()

    def engine(self, component: Component) -> LazyEngine:
        """A component's engine, not loaded yet."""
        lazy = LazyEngine(component, self)
        self._engines.add(lazy)
        return lazy

    def owns(self, engine: LazyEngine) -> bool:
        """Whether it is one of its own, and not lent by another pipeline."""
        return engine in self._engines


class _CapturedCall:
    """An engine over static tensors of one set of shapes, its run captured where it can be."""

    @staticmethod
    def size(component: Component, inputs: Mapping[str, Tensor]) -> int:
        """Bytes of the static tensors."""
        shapes = output_shapes(component, inputs)
        written = sum(prod(shapes[spec.name]) * spec.dtype.itemsize for spec in component.outputs)
        return written + sum(x.nbytes for x in inputs.values())

    def __init__(
        self, component: Component, engine: Engine, inputs: Mapping[str, Tensor], graphs: Graphs
    ) -> None:
        self.engine = engine
        self._inputs = {
            name: x.to(graphs.device, copy=True, memory_format=torch.contiguous_format)
            for name, x in inputs.items()
        }
        shapes = output_shapes(component, inputs)
        self._outputs = {
            spec.name: torch.empty(shapes[spec.name], dtype=spec.dtype, device=graphs.device)
            for spec in component.outputs
        }
        self.nbytes = self.size(component, inputs)
        # A CUDA graph only has addresses: the program keeps alive what is there.
        self._program = engine.bind(self._inputs, self._outputs)
        self._run: Callable[[], None] = self._program.run
        if self._program.capturable:
            self._run = graphs.capture(self._program.run, component.name).replay

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, x in self._inputs.items():
            x.copy_(inputs[name])
        self._run()
        return {name: y.clone() for name, y in self._outputs.items()}


class _OverEngine(Protocol):
    """What is bound to an engine, and of how many bytes."""

    engine: Engine
    nbytes: int


_Kept = TypeVar("_Kept", bound=_OverEngine)


class LazyEngine:
    """An engine that is loaded when first called, once however many threads call it.

    Locks are taken in this order: its residency's, its loader's (`exclusive`), its own.

    No reference cycles: what it loaded is freed as soon as its last owner is.
    """

    def __init__(self, component: Component, loader: EngineLoader) -> None:
        self.component = component
        self._loader = loader
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._moved = False  # whether its weights may be elsewhere than on the device
        self._loops = 0
        self._token = object()
        # Its loader may outlive it, held by an engine that another pipeline shares.
        weakref.finalize(self, loader.graph_cache.forget, self._token).atexit = False

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self._loader.device

    @property
    def graphs(self) -> Graphs | None:
        """Captures its work; None where nothing is captured."""
        return self._loader.graphs

    @property
    def graph_cache(self) -> GraphCache:
        """Where its captured graphs are kept between uses."""
        return self._loader.graph_cache

    @property
    def residency(self) -> Residency:
        """Offloads its weights between two uses, unless they stay."""
        return self._loader.residency

    @property
    def present(self) -> bool:
        """Whether its weights are on the device."""
        engine = self._engine
        return engine is not None and not (isinstance(engine, Movable) and engine.offloaded)

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights on the device: the engine's own figure, for it may repack them, or the checkpoint's."""
        if not self.present:
            return 0
        repacked: int | None = getattr(self._engine, "weight_bytes", None)
        return self.component.weight_bytes if repacked is None else repacked

    @property
    def looping(self) -> bool:
        """Whether a loop runs over it, until whose end its weights may not be offloaded."""
        return self._loops > 0

    @contextmanager
    def loop(self) -> Iterator[Engine]:
        """As `load`, for a loop: until the context ends, it is not offloaded for another engine."""
        with self._lock:
            self._loops += 1
        try:
            yield self.load()
        finally:
            with self._lock:
                self._loops -= 1

    def load(self) -> Engine:
        """The engine itself, its weights on the device; exports or compiles the component when its cache lacks it.

        Have its `residency` held for this call and while the engine is used.
        """
        with self.residency.held():
            self.residency.enter(self)
            with self._lock:
                if self._engine is None:
                    loader = self._loader
                    # A caller's inference mode would mark the weights, and tracing would bake it in.
                    with torch.inference_mode(False):
                        self._engine = loader.backend.load(
                            self.component, device=loader.device, cache_dir=loader.cache_dir
                        )
                if self._moved and isinstance(self._engine, Movable):
                    self._engine.onload()
                    self._moved = False
                return self._engine

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._loaded() as engine, self._captured(engine, inputs) as call:
            return engine(inputs) if call is None else call(inputs)

    @contextmanager
    def _loaded(self) -> Iterator[Engine]:
        """The engine, for a call: exclusively, and neither offloaded nor closed inside the block."""
        with self.residency.held():
            while True:
                engine = self.load()  # without `exclusive`: it may take minutes
                with self.exclusive():
                    if self._engine is engine:  # its loader has not moved since
                        yield engine
                        return

    def exclusive(self) -> AbstractContextManager[object]:
        """As its loader's: nothing else that may share its memory runs inside the block, on any stream."""
        return self._loader.exclusive()

    def capture(self, inputs: Mapping[str, Tensor]) -> None:
        """Load the engine and capture its call for inputs of these shapes, where calls are captured and kept."""
        if self.graphs is not None and not self.residency.offloads:
            with self._loaded() as engine, self._captured(engine, inputs):
                pass

    def _captured(
        self, engine: Engine, inputs: Mapping[str, Tensor]
    ) -> AbstractContextManager[_CapturedCall | None]:
        """A call for inputs of these shapes. None where calls are not captured, as of weights that may be offloaded:
        the graph would be dropped with them; and if it would be too large to keep."""
        graphs = self.graphs
        if graphs is None or self.residency.offloads:
            return nullcontext()
        check_inputs(self.component, inputs)  # refuses wrong shapes before anything is made of them
        if _CapturedCall.size(self.component, inputs) > self.graph_cache.limit:
            return nullcontext()
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in inputs.items())
        return self.kept(key, engine, lambda: _CapturedCall(self.component, engine, inputs, graphs))

    @contextmanager
    def kept(self, key: Hashable, engine: Engine, make: Callable[[], _Kept]) -> Iterator[_Kept]:
        """What was kept by this key over this engine, taken from the graph cache, or made now. It is put back at the
        end; if the block fails it is freed, once the device has done what it was given."""
        stream = current_stream(self.device)
        # Not over an engine that was closed since, or that runs on another device.
        found: _Kept | None = self.graph_cache.take(self._token, key, stream, lambda x: x.engine is engine)
        try:
            if found is None:
                with torch.inference_mode(False):  # a caller's own would mark the static tensors
                    found = make()
            yield found
        except BaseException:
            stream.record_event().synchronize()
            raise
        self.graph_cache.put(self._token, key, found, found.nbytes, stream.record_event())

    def offload(self) -> None:
        """Free the device's memory until the next use: weights move to the host if the engine can do that; else it is
        closed."""
        with self._idle():
            if isinstance(self._engine, Movable):
                # In this order, since it may be interrupted anywhere: no graph may outlive the memory it was captured
                # over, and weights that have left in part are onloaded.
                self.graph_cache.drop(self._token)
                self._moved = True
                self._engine.offload()
            else:
                self._close()

    def close(self) -> None:
        """Free the engine; the next call loads it again."""
        with self._idle():
            self._close()

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Nothing else uses it meanwhile, and afterwards it is off the device."""
        with self.residency.held(), self.exclusive(), self._lock:
            if self._engine is not None:
                _wait(self.device, self.graphs)
            yield
            self.residency.forget(self)

    def _close(self) -> None:
        engine, self._engine, self._moved = self._engine, None, False
        try:
            if engine is not None:
                engine.close()
        finally:  # last: an engine that must not lose what is running waits for it as it closes
            self.graph_cache.drop(self._token)


def _wait(device: torch.device, graphs: Graphs | None) -> None:
    """Until the device has done what was submitted to it, on whatever stream; hold the graphs' `exclusive`."""
    if graphs is None and device.type == "cuda":
        synchronize(device)  # nothing orders other streams before this one
    else:
        current_stream(device).record_event().synchronize()
