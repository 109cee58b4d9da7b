"""Engines made when first used, all on one back end and device.

A pipeline that never starts from an image never exports the VAE's encoder.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .base import Component, Engine
from .registry import choose

__all__ = ["EngineLoader", "LazyEngine"]


class EngineLoader:
    """Where and how components run; chosen once for a pipeline and changed only by `Pipeline.to`."""

    def __init__(
        self, backend: str, device: torch.device, dtype: torch.dtype, cache_dir: Path | None
    ) -> None:
        self._name = backend
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
        for engine in self._engines:
            engine.close()

    def engine(self, component: Component) -> LazyEngine:
        """An engine of a component, not loaded yet."""
        lazy = LazyEngine(component, self)
        self._engines.append(lazy)
        return lazy


class LazyEngine:
    """An engine that is loaded when first called, once however many threads call it."""

    def __init__(self, component: Component, loader: EngineLoader) -> None:
        self.component = component
        self._loader = loader
        self._lock = threading.Lock()
        self._engine: Engine | None = None

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
        return self.load()(inputs)

    def close(self) -> None:
        """Free the engine; the next call loads it again."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
                self._engine = None
