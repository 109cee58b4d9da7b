"""Engines made when first used, all on one back end and device, and their calls recorded as graphs.

A pipeline that never starts from an image never exports the VAE's encoder.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ..graph import Graphs
from .base import Component, Engine, arguments
from .registry import choose

__all__ = ["EngineLoader", "LazyEngine"]

_KEPT = 8  # sizes whose recorded call an engine keeps


class EngineLoader:
    """Where and how components run; chosen once for a pipeline and changed only by `Pipeline.to`.

    Attributes:
        graphs: records the work of engines that bear it; None to run everything as it comes.
    """

    def __init__(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        cache_dir: Path | None,
        graphs: bool | None = None,
    ) -> None:
        """`graphs`: whether to record work; by default where the device is a GPU."""
        self._name = backend
        self._graphs = graphs
        self.dtype = dtype
        self.cache_dir = cache_dir
        self._engines: list[LazyEngine] = []
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Run on another device from now on.

        Raises:
            BackendUnavailableError: the back end cannot run there; nothing has changed then.
        """
        choice = choose(self._name, device, self.dtype)
        self.device = device
        self.backend = choice.backend
        wanted = device.type == "cuda" if self._graphs is None else self._graphs
        self.graphs = Graphs(device) if wanted else None
        for engine in self._engines:
            engine.close()

    def engine(self, component: Component) -> LazyEngine:
        """An engine of a component, not loaded yet."""
        lazy = LazyEngine(component, self)
        self._engines.append(lazy)
        return lazy


class _Call:
    """An engine over static tensors of one set of shapes, its run recorded where the engine bears it."""

    def __init__(
        self, component: Component, engine: Engine, inputs: Mapping[str, Tensor], graphs: Graphs
    ) -> None:
        self.engine = engine
        self._inputs = {name: x.to(graphs.device, copy=True) for name, x in inputs.items()}
        self._outputs = {name: x.clone() for name, x in engine(self._inputs).items()}
        program = engine.bind(self._inputs, self._outputs)
        self._run: Callable[[], None] = program.run
        if program.capturable:
            self._run = graphs.capture(program.run, component.name).replay

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, x in self._inputs.items():
            x.copy_(inputs[name])
        self._run()
        return {name: y.clone() for name, y in self._outputs.items()}


class LazyEngine:
    """An engine that is loaded when first called, once however many threads call it."""

    def __init__(self, component: Component, loader: EngineLoader) -> None:
        self.component = component
        self._loader = loader
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._calls: OrderedDict[tuple[object, ...], _Call] = OrderedDict()
        self._on_close: list[Callable[[], object]] = []

    def on_close(self, forget: Callable[[], object]) -> None:
        """Have `forget` called when the engine is closed: what it kept of the engine would keep its weights."""
        self._on_close.append(forget)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._loader.device

    @property
    def graphs(self) -> Graphs | None:
        """What records its work, if anything does."""
        return self._loader.graphs

    def load(self) -> Engine:
        """The engine itself; exports or compiles the component when its cache lacks it."""
        with self._lock:
            if self._engine is None:
                loader = self._loader
                # A caller's inference mode would mark the weights, and tracing would bake it in.
                with torch.inference_mode(False):
                    self._engine = loader.backend.load(
                        self.component, device=loader.device, cache_dir=loader.cache_dir
                    )
            return self._engine

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        engine = self.load()
        if self.graphs is None:
            return engine(inputs)
        with self.graphs.turn():
            return self._recorded(engine, inputs, self.graphs)(inputs)

    def record(self, inputs: Mapping[str, Tensor]) -> None:
        """Load the engine and record its call for inputs of these shapes, where work is recorded."""
        engine = self.load()
        if self.graphs is not None:
            with self.graphs.turn():
                self._recorded(engine, inputs, self.graphs)

    def _recorded(self, engine: Engine, inputs: Mapping[str, Tensor], graphs: Graphs) -> _Call:
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in inputs.items())
        call = self._calls.pop(key, None)
        if call is None or call.engine is not engine:
            arguments(self.component, inputs)  # told of a wrong shape before anything is made of it
            with torch.inference_mode(False):  # a caller's own would mark the static tensors
                call = _Call(self.component, engine, inputs, graphs)
        self._calls[key] = call
        while len(self._calls) > _KEPT:
            self._calls.popitem(last=False)
        return call

    def close(self) -> None:
        """Free the engine; the next call loads it again."""
        with nullcontext() if self.graphs is None else self.graphs.turn(), self._lock:
            self._calls.clear()
            for forget in self._on_close:
                forget()
            if self._engine is not None:
                self._engine.close()
                self._engine = None
