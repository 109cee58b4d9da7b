"""TensorRT and TensorRT for RTX: compiled engines, run in the order of torch's current stream. Never run yet: written
without a GPU.

An engine executes on a stream of its own, since TensorRT adds synchronisations on the default one; during a capture, on
the stream that is captured.

An execution context has its shapes set and its addresses bound once, over static tensors. A caller that has such
tensors binds the engine to them. Otherwise there is one context for each size of a call, over tensors of the engine's:
inputs are copied in and outputs copied out, so that the caller owns the results. All engines of a back end share one
scratch buffer, and execute one after the other in the order of their calls, whatever the streams.

**In a CUDA graph.** A call or a program can be captured once it has run at these sizes. What it was captured over lives
as long as the program or, for a call, the engine. A graph must not be replayed while another engine of the back end
runs: both would use the scratch buffer. An engine that streams weights cannot be captured, and the host waits for its
executions.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import BackendError, BackendUnavailableError, RequestError
from ..engine_store import EngineTarget, StoredEngine
from ..graph import empty_cache
from ..memory import RESERVE, format_bytes
from ..prepare import Rebuild, find_or_build_engine
from . import plugins, products
from .base import (
    Availability,
    Component,
    Engine,
    Program,
    Timesteps,
    check_bound,
    ordered_inputs,
    sizes_of,
    still_open,
)
from .scratch import Scratch
from .sizes import profile_index
from .split import SplitUNet, in_parts
from .trt_context import BoundContext

__all__ = ["TensorRTBackend", "TensorRTEngine", "TensorRTRTXBackend"]

_log = logging.getLogger(__name__)

_CONTEXTS = 8
"""Sizes an engine keeps ready. Each costs its inputs and outputs and some memory of TensorRT's own."""


class _Program:
    """A context over the caller's tensors."""

    nbytes = 0

    def __init__(self, engine: TensorRTEngine, context: BoundContext, *, capturable: bool) -> None:
        self.capturable = capturable
        self._engine, self._context = engine, context

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self._engine.execute(self._context)


def _error(product: products.Product, trt: Any, log: Any, name: str, what: str) -> BackendError:
    """An error of a component's engine, with the reasons in TensorRT's log, which is cleared."""
    why = "; ".join([*plugins.failures(trt), log.why()])
    log.clear()
    return BackendError(f"{product.title} {trt.__version__}, {name}: {what} ({why})")


class TensorRTEngine:
    """One deserialised engine on one device."""

    def __init__(
        self,
        component: Component,
        stored: StoredEngine,
        product: products.Product,
        device: torch.device,
        scratch: Scratch,
    ) -> None:
        self.component = component
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self.entry: Path | None = stored.plan.parent
        self._product = product
        self._profiles = stored.profiles
        self._scratch = scratch
        self._trt = products.load(product)
        self._log = products.logger(self._trt)
        self._log.clear()
        self._error = partial(_error, product, self._trt, self._log, component.name)
        self._contexts: OrderedDict[tuple[tuple[str, int], ...], BoundContext] = OrderedDict()
        try:
            plugins.loading(self._trt, stored.plugins)
        except BackendError as error:
            raise BackendError(f"{component.name}: {error}") from error
        self._runtime = products.make(self._trt.Runtime, self._log)
        if self._runtime is None:
            raise self._error("cannot start; see that its GPU and driver work")
        try:
            with (
                open(stored.plan, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan,
            ):
                self._engine = self._runtime.deserialize_cuda_engine(plan)
        except FileNotFoundError as error:
            raise BackendError(
                f"{component.name}: {stored.plan} was removed from the cache when it was to be loaded; try again"
            ) from error
        if self._engine is None:
            raise self._error(f"cannot load {stored.plan}")
        for warning in self._log.warnings:
            _log.warning("%s, as it loads the engine of %s: %s", product.title, component.name, warning)
        self._streamed = self._stream_weights()
        # Its contexts are destroyed with it, which TensorRT forbids while one is running.
        weakref.finalize(self, scratch.wait).atexit = False

    def _stream_weights(self) -> int:
        """Set the budget of an engine built with weight streaming; returns the bytes that stay in host memory."""
        title, name = self._product.title, self.component.name
        size = int(self._engine.streamable_weights_size)
        if not size:
            return 0
        # TensorRT would choose the budget itself, but its Python binding truncates it to 32 bits.
        empty_cache(self.device)  # TensorRT cannot use what PyTorch has cached
        free, _ = torch.cuda.mem_get_info(self.device)
        budget = min(size, max(0, free - self._engine.device_memory_size_v2 - RESERVE))
        self._engine.weight_streaming_budget_v2 = budget
        taken = int(self._engine.weight_streaming_budget_v2)
        if taken != budget:  # the binding does not say that it was refused
            asked = format_bytes(budget)
            what = f"keeps {format_bytes(taken)} of {name}'s weights on the GPU in place of the {asked} asked for"
            _log.warning("%s %s", title, what)
        return size - taken

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = ordered_inputs(self.component, inputs)
        with torch.cuda.device(self.device), self._scratch.lock:
            still_open(self.component, self._engine)
            context = self._own_context(sizes_of(self.component, inputs))
            with self._scratch_for(context) as scratch:
                for static, x in zip(context.inputs.values(), tensors, strict=True):
                    static.copy_(x, non_blocking=True)
                context.run(scratch)
                return {name: y.clone() for name, y in context.outputs.items()}

    def bind(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        timesteps: Timesteps | None = None,
    ) -> Program:
        check_bound(self.component, inputs, outputs)
        with torch.cuda.device(self.device), self._scratch.lock:
            still_open(self.component, self._engine)
            profile = profile_index(self.component, self._profiles, sizes_of(self.component, inputs))
            context = self._bound(profile, inputs, outputs)
            return _Program(self, context, capturable=self._capturable(context))

    def _capturable(self, context: BoundContext) -> bool:
        if self._streamed:
            why = f"{format_bytes(self._streamed)} of its weights stay in host memory"
        elif self._product.needs_gpu:
            return True
        else:
            # Asked about a stream on which graphs are captured: the default one is never capturable.
            scratch = self._scratch.begin(self._stream, context.scratch_bytes)
            if context.capturable(self._stream, scratch):
                return True
            why = f"{self._product.title} reports that it cannot be captured"
        _log.warning("the engine of %s runs without a CUDA graph: %s", self.component.name, why)
        return False

    def execute(self, context: BoundContext) -> None:
        """Enqueue one execution on the current stream."""
        with torch.cuda.device(self.device), self._scratch.lock, self._scratch_for(context) as scratch:
            context.run(scratch)

    @contextmanager
    def _scratch_for(self, context: BoundContext) -> Iterator[Tensor]:
        """The scratch buffer, for work that is enqueued within and runs after all that used the buffer before."""
        stream = torch.cuda.current_stream(self.device)
        scratch = self._scratch.begin(stream, context.scratch_bytes)
        try:
            yield scratch
        finally:  # what was enqueued before a failure uses the buffer, too
            self._scratch.end(stream)

    def close(self) -> None:
        with torch.cuda.device(self.device), self._scratch.lock:
            if self._engine is not None:
                self._scratch.wait()
            self._contexts.clear()
            self._engine = None

    def _bound(
        self, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None
    ) -> BoundContext:
        context = self._new_context()
        return BoundContext(
            context, self.component, inputs, outputs, profile, stream=self._stream, error=self._error
        )

    def _new_context(self) -> Any:
        """An execution context without scratch memory of its own."""
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._product.needs_gpu:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # Kernels for the shapes at hand are compiled at once, not in the background of a capture.
            specialisation = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = specialisation
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self._error("cannot make an execution context")
        return context

    def _own_context(self, sizes: Mapping[str, int]) -> BoundContext:
        """The context for calls of these sizes, over tensors of the engine's own."""
        key = tuple(sizes.items())
        if key not in self._contexts:
            profile = profile_index(self.component, self._profiles, sizes)
            if torch.cuda.is_current_stream_capturing():
                raise BackendError(
                    f"{self.component.name} cannot be captured before it has run once at these sizes"
                )
            with torch.inference_mode(False):  # else the static tensors might be inference tensors
                own = {
                    spec.name: torch.empty(spec.shape(sizes), dtype=spec.dtype, device=self.device)
                    for spec in self.component.inputs
                }
                self._contexts[key] = self._bound(profile, own)
            idle = [k for k, context in self._contexts.items() if not context.captured]
            if len(idle) > _CONTEXTS:
                self._scratch.wait()  # it may still be running
                del self._contexts[idle[0]]
        self._contexts.move_to_end(key)
        return self._contexts[key]


class TensorRTBackend:
    """TensorRT.

    With `LATENTRT_BUILD=never` a missing engine is an error instead of being built. `LATENTRT_PLUGINS` names the
    plugins of its engines, as `latentrt build --plugins` does. `LATENTRT_SPLIT=1` runs a UNet as engines of its parts,
    as `latentrt build --split` builds them.

    Args:
        with_plugins: overrides `LATENTRT_PLUGINS`.
        split: overrides `LATENTRT_SPLIT`.
    """

    name = "tensorrt"
    upcast = torch.float32

    def __init__(self, with_plugins: Sequence[str] | None = None, *, split: bool | None = None) -> None:
        self._scratch: dict[torch.device, Scratch] = {}
        self._plugins = with_plugins
        self._split = split

    def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
        product = products.product(self.name)
        found = any(util.find_spec(module) is not None for module in product.modules)
        if device.type != "cuda" or not torch.cuda.is_available():
            remedy = "use device 'cuda' on a machine with an NVIDIA GPU"
            if found and not product.needs_gpu:
                remedy += "; its engines can be built here, by `latentrt build`"
            return Availability(False, f"{product.title} runs on NVIDIA GPUs only", remedy)
        if not found:
            return Availability(False, f"{product.title} is not installed", product.install)
        try:
            trt = products.load(product)
            self._target(device)
            _switch("LATENTRT_SPLIT")
        except (BackendUnavailableError, RequestError) as error:
            reason, _, remedy = str(error).partition("; ")
            return Availability(False, reason, remedy)
        return Availability(True, f"{product.title} {trt.__version__}")

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        found = self.availability(device, component.dtype)
        if not found.ok:
            raise BackendUnavailableError(f"back end {self.name!r}: {found.reason}; {found.remedy}")
        target, rebuild = self._target(device), _rebuild()
        split = _switch("LATENTRT_SPLIT") if self._split is None else self._split
        parts = in_parts(component) if split else (component,)
        stored = [
            find_or_build_engine(part, target, cache_dir=cache_dir, rebuild=rebuild, device=device)
            for part in parts
        ]
        return self.load_stored(component, stored, device)

    def load_stored(
        self, component: Component, stored: Sequence[StoredEngine], device: torch.device
    ) -> Engine:
        """Load these engines: the component's one, or those of its parts in their order."""
        parts = (component,) if len(stored) == 1 else in_parts(component)
        scratch = self._scratch.setdefault(device, Scratch(device))
        product = products.product(self.name)
        with torch.cuda.device(device):
            engines = [
                TensorRTEngine(part, made, product, device, scratch)
                for part, made in zip(parts, stored, strict=True)
            ]
        return engines[0] if len(engines) == 1 else SplitUNet(component, engines)

    def _target(self, device: torch.device) -> EngineTarget:
        major, minor = torch.cuda.get_device_capability(device)
        names = self._plugins
        if names is None:
            names = plugins.parse_plugins(os.environ.get("LATENTRT_PLUGINS", "none"))
        return EngineTarget(self.name, (10 * major + minor,), plugins=plugins.versions(names))


class TensorRTRTXBackend(TensorRTBackend):
    """TensorRT for RTX, which differs in its name only."""

    name = "tensorrt-rtx"


def _switch(name: str) -> bool:
    chosen = os.environ.get(name, "0")
    if chosen not in ("0", "1"):
        raise RequestError(f"{name} is {chosen!r}; it can be 0 or 1")
    return chosen == "1"


def _rebuild() -> Rebuild:
    chosen = os.environ.get("LATENTRT_BUILD", "auto")
    if chosen not in ("auto", "never"):
        raise BackendError(f"LATENTRT_BUILD is {chosen!r}; it can be auto or never")
    return cast(Rebuild, chosen)
