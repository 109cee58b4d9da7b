"""Engines made when first used, all on one back end and device, and their calls recorded as graphs.

A pipeline that never starts from an image never exports the VAE's encoder.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..graph import Graphs, expect_modes
from ..graph_cache import GraphCache
from ..memory import Policy
from ..residency import Residency
from ..streams import queue_of
from .base import Component, Engine, Movable, check_inputs, output_shapes
from .registry import choose

__all__ = ["EngineLoader", "LazyEngine"]


class EngineLoader:
    """Where and how components run; chosen once for a pipeline and changed only by `Pipeline.to`.

    Attributes:
        graphs: records the work of engines that bear it; None to run everything as it comes.
        kept: what was recorded, and waits to be used again.
        residency: sends weights from the device; None where all may stay.
    """

    def __init__(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        cache_dir: Path | None,
        graphs: bool | None = None,
        memory: Policy = "resident",
        shared: Iterable[LazyEngine] = (),
    ) -> None:
        """
        Args:
            graphs: whether to record work; by default where the device is a GPU.
            memory: the policy by which weights leave the device.
            shared: engines of other pipelines that run beside its own; by one policy they make room for each other.
        """
        self._name = backend
        self._graphs = graphs
        self.dtype = dtype
        self.cache_dir = cache_dir
        self.graph_cache = GraphCache()
        self.residency: Residency | None = None
        if memory != "resident":
            found = [x.residency for x in shared if x.residency is not None and x.residency.policy == memory]
            self.residency = found[0] if found else Residency(memory)
        self._engines: weakref.WeakSet[LazyEngine] = weakref.WeakSet()  # they belong to the networks' owners
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Run on another device from now on.

        Raises:
            BackendUnavailableError: the back end cannot run there; nothing has changed then.
        """
        # A VAE that float16 would overflow has another, which was chosen for the device it was loaded for.
        dtypes = dict.fromkeys([self.dtype, *(engine.component.dtype for engine in self._engines)])
        self.backend = choose(self._name, device, *dtypes)
        self.device = device
        wanted = device.type == "cuda" if self._graphs is None else self._graphs
        if wanted:
            expect_modes()
        self.graphs = Graphs(device) if wanted else None
        for engine in self._engines:
            engine.close()

    def engine(self, component: Component) -> LazyEngine:
        """An engine of a component, not loaded yet."""
        lazy = LazyEngine(component, self)
        self._engines.add(lazy)
        return lazy


class _Call:
    """An engine over static tensors of one set of shapes, its run recorded where the engine bears it."""

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
        # A CUDA graph has addresses only: what they are of lives as long as the program.
        self._program = engine.bind(self._inputs, self._outputs)
        self._run: Callable[[], None] = self._program.run
        if self._program.capturable:
            self._run = graphs.capture(self._program.run, component.name).replay

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, x in self._inputs.items():
            x.copy_(inputs[name])
        self._run()
        return {name: y.clone() for name, y in self._outputs.items()}


class LazyEngine:
    """An engine that is loaded when first called, once however many threads call it.

    Whoever owns it owns what it loaded: nothing that it refers to refers to it.

    Attributes:
        token: stands for it where what was recorded of it is kept.
    """

    def __init__(self, component: Component, loader: EngineLoader) -> None:
        self.component = component
        self._loader = loader
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._away = False
        self._loops = 0
        self.token = object()
        # Its loader may outlive it, by an engine that another pipeline shares.
        weakref.finalize(self, loader.graph_cache.forget, self.token).atexit = False

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self._loader.device

    @property
    def graphs(self) -> Graphs | None:
        """What records its work, if anything does."""
        return self._loader.graphs

    @property
    def graph_cache(self) -> GraphCache:
        """Where what was recorded of it waits, by its token and its kind; it goes with the engine."""
        return self._loader.graph_cache

    @property
    def residency(self) -> Residency | None:
        """What may send its weights away between two uses, if anything does."""
        return self._loader.residency

    @property
    def present(self) -> bool:
        """Whether its weights are on the device."""
        return self._engine is not None and not self._away

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights on the device, as its engine lays them out where it says so."""
        if not self.present:
            return 0
        laid_out: int | None = getattr(self._engine, "weight_bytes", None)
        return self.component.weight_bytes if laid_out is None else laid_out

    @property
    def looping(self) -> bool:
        """Whether a loop runs over it, whose weights may not leave before its end."""
        return self._loops > 0

    @contextmanager
    def loop(self) -> Iterator[Engine]:
        """What `load` gives, for a loop: until its end nothing makes it leave."""
        with self._lock:
            self._loops += 1
        try:
            yield self.load()
        finally:
            with self._lock:
                self._loops -= 1

    def load(self) -> Engine:
        """The engine itself, its weights on the device; exports or compiles the component when its cache lacks it.

        Where there is a `residency`, to be called and used with its `lock` held.
        """
        if self.residency is None:
            return self._loaded()
        with self.residency.lock:
            self.residency.enter(self)
            return self._loaded()

    def _loaded(self) -> Engine:
        with self._lock:
            if self._engine is None:
                loader = self._loader
                # A caller's inference mode would mark the weights, and tracing would bake it in.
                with torch.inference_mode(False):
                    self._engine = loader.backend.load(
                        self.component, device=loader.device, cache_dir=loader.cache_dir
                    )
            if self._away and isinstance(self._engine, Movable):
                self._engine.onload()
                self._away = False
            return self._engine

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.residency is not None:  # a recording would not outlive the weights' stay
            with self.residency.lock:
                engine = self.load()
                with self.exclusive():
                    return engine(inputs)
        engine = self.load()
        if self.graphs is None:
            return engine(inputs)
        with self.graphs.exclusive():
            kind, call = self._taken(engine, inputs, self.graphs)
            if call is None:
                return engine(inputs)
            result = call(inputs)
            self.graph_cache.put(self.token, kind, call, call.nbytes, queue_of(self.device).record())
            return result

    def exclusive(self) -> AbstractContextManager[None]:
        """Nothing that was recorded runs meanwhile, on whatever stream: it may share memory with what the engine runs
        in. After its `residency`'s lock, where there is one."""
        return nullcontext() if self.graphs is None else self.graphs.exclusive()

    def record(self, inputs: Mapping[str, Tensor]) -> None:
        """Load the engine and record its call for inputs of these shapes, where work is recorded and can be kept."""
        if self.graphs is None or self.residency is not None:
            return
        engine = self.load()
        with self.graphs.exclusive():
            kind, call = self._taken(engine, inputs, self.graphs)
            if call is not None:
                self.graph_cache.put(self.token, kind, call, call.nbytes, queue_of(self.device).record())

    def _taken(
        self, engine: Engine, inputs: Mapping[str, Tensor], graphs: Graphs
    ) -> tuple[Hashable, _Call | None]:
        """A call for such inputs that nobody else has, and its kind; None where it could not be kept."""
        kind = tuple((name, tuple(x.shape), x.dtype) for name, x in inputs.items())
        call: _Call | None = self.graph_cache.take(self.token, kind, lambda call: call.engine is engine)
        if call is None:
            check_inputs(self.component, inputs)  # told of a wrong shape before anything is made of it
            if _Call.size(self.component, inputs) > self.graph_cache.limit:
                return kind, None
            with torch.inference_mode(False):  # a caller's own would mark the static tensors
                call = _Call(self.component, engine, inputs, graphs)
        return kind, call

    def offload(self) -> None:
        """Give the device's memory back until the next use: the weights move to the host where they can; else the
        engine is closed."""
        with self._idle():
            if isinstance(self._engine, Movable):
                self._engine.offload()
                self._away = True
            else:
                self._end()

    def close(self) -> None:
        """Free the engine; the next call loads it again."""
        with self._idle():
            self._end()

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Nothing of it is put on the device meanwhile, and then nothing is kept that was recorded over its weights."""
        locks: list[AbstractContextManager[object]] = [self.exclusive(), self._lock]
        if self.residency is not None:
            locks.insert(0, self.residency.lock)
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            try:
                yield
            finally:  # last: an engine that must not lose what is running waits for it as it closes
                self.graph_cache.drop(self.token)
            if self.residency is not None:
                self.residency.left(self)

    def _end(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine, self._away = None, False
