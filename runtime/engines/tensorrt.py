"""TensorRT and TensorRT for RTX: compiled engines, between what torch's current stream has been given and what it is
given next. Never run yet: written without a GPU.

An execution runs on a stream of its engine, as on the default one TensorRT adds synchronisations of its own; in a
capture on the one that is captured.

A context is over static tensors: shapes set, addresses bound, once. A caller that has such tensors binds the engine to
them; for each size a call comes in there is a context over the engine's own, inputs are copied in and outputs copied
out, so that a caller owns what it gets. All engines of a back end compute in one scratch buffer, one after the other in
the order of their calls, whatever the streams.

**In a CUDA graph.** A call or a program may be captured once it has run at these sizes. What it was captured over
lives as long as the program, or of a call as long as the engine; a graph must not be replayed while another engine of
the back end runs, or scratch is shared by two at once. An engine that streams weights cannot be captured, and its
executions are waited for.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import BackendError, BackendUnavailableError, RequestError
from ..engine_store import EngineTarget, StoredEngine
from ..memory import RESERVE, format_bytes
from ..prepare import Rebuild, engine
from ..streams import ordered_with_current
from . import plugins
from . import trt as products
from .base import (
    Availability,
    Component,
    Engine,
    Program,
    Timesteps,
    arguments,
    check_bound,
    sizes_of,
    still_open,
)
from .scratch import Scratch
from .sizes import profile_index
from .split import SplitUNet, in_parts

__all__ = ["TensorRTBackend", "TensorRTEngine", "TensorRTRTXBackend"]

_log = logging.getLogger(__name__)

_CONTEXTS = (
    8  # sizes an engine keeps ready; each costs its inputs and outputs and some of TensorRT's own memory
)


class _Context:
    """An execution context for one set of sizes, its shapes set and its addresses bound."""

    def __init__(
        self,
        owner: TensorRTEngine,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor] | None,
        profile: int,
    ) -> None:
        """`outputs` None: new ones."""
        component = owner.component
        self.captured: list[Tensor] = []  # the scratch of graphs, which know its address only
        # What it needs of its owner, and not the owner, which has it: what has each other waits for the collector.
        self._stream, self._error = owner.stream, owner.error
        self._memory: tuple[int, int] | None = None
        self._context = owner.new_context()
        try:
            taken = self._context.set_optimization_profile_async(profile, owner.stream.cuda_stream)
        except RuntimeError:  # the binding's way to say no
            taken = False
        if not taken:
            raise owner.error(f"cannot take profile {profile}")
        self.inputs = {spec.name: inputs[spec.name] for spec in component.inputs}
        for name, x in self.inputs.items():
            self._bind(name, x)
            if not self._context.set_input_shape(name, tuple(x.shape)):
                raise owner.error(f"refuses {name} of shape {list(x.shape)}")
        unknown = self._context.infer_shapes()
        if unknown:
            raise owner.error(f"cannot tell the shape of {', '.join(unknown)}")
        self.outputs: dict[str, Tensor] = {}
        for spec in component.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            y = (
                torch.empty(shape, dtype=spec.dtype, device=owner.device)
                if outputs is None
                else outputs[spec.name]
            )
            if tuple(y.shape) != shape:
                raise BackendError(
                    f"{component.name}: {spec.name} is {list(y.shape)}, should be {list(shape)}"
                )
            self.outputs[spec.name] = y
            self._bind(spec.name, y)
        self.scratch_bytes = int(self._context.update_device_memory_size_for_shapes())

    def run(self, scratch: Tensor) -> None:
        """Put one execution between what the current stream has and what it is given next."""
        self._compute_in(scratch)
        if torch.cuda.is_current_stream_capturing():
            if not any(kept is scratch for kept in self.captured):
                self.captured.append(scratch)
            self._execute(torch.cuda.current_stream(self._stream.device))
        else:
            with ordered_with_current(self._stream):
                self._execute(self._stream)

    def _execute(self, stream: torch.cuda.Stream) -> None:
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise self._error("failed")

    def capturable(self, stream: torch.cuda.Stream, scratch: Tensor) -> bool:
        """Whether TensorRT for RTX says that an execution on `stream` can be captured."""
        self._compute_in(scratch)
        return bool(self._context.is_stream_capturable(stream.cuda_stream))

    def _compute_in(self, scratch: Tensor) -> None:
        """Told to TensorRT where it changed: not in a capture, then, of what has run."""
        memory = (scratch.data_ptr(), scratch.numel())
        if memory != self._memory:
            self._context.set_device_memory(*memory)
            self._memory = memory

    def _bind(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise self._error(f"has no tensor {name}")


class _Program:
    """A context over a caller's tensors."""

    nbytes = 0

    def __init__(self, engine: TensorRTEngine, context: _Context, *, capturable: bool) -> None:
        self.capturable = capturable
        self._engine, self._context = engine, context

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self._engine.execute(self._context)


def _error(product: products.Product, trt: Any, log: Any, name: str, what: str) -> BackendError:
    """An error of a component's engine, with what TensorRT's log has to say."""
    why = "; ".join([*plugins.failures(trt), log.why()])
    log.clear()
    return BackendError(f"{product.title} {trt.__version__}, {name}: {what} ({why})")


class TensorRTEngine:
    """One deserialised engine on one device.

    Attributes:
        stream: where it executes outside of a capture.
        error: makes one, of what went wrong.
    """

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
        self.stream = torch.cuda.Stream(device)
        self.entry: Path | None = stored.plan.parent
        self._product = product
        self._profiles = stored.profiles
        self._scratch = scratch
        self._trt = products.load(product)
        self._log = products.logger(self._trt)
        self._log.clear()
        self.error = partial(_error, product, self._trt, self._log, component.name)
        self._contexts: OrderedDict[tuple[tuple[str, int], ...], _Context] = OrderedDict()
        try:
            plugins.loading(self._trt, stored.plugins)
        except BackendError as error:
            raise BackendError(f"{component.name}: {error}") from error
        self._runtime = products.make(self._trt.Runtime, self._log)
        if self._runtime is None:
            raise self.error("cannot start; see that its GPU and driver work")
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
            raise self.error(f"cannot load {stored.plan}")
        for warning in self._log.warnings:
            _log.warning("%s, as it loads the engine of %s: %s", product.title, component.name, warning)
        self._streamed = self._stream_weights()
        # Contexts go with it, and TensorRT forbids to destroy one that is running.
        weakref.finalize(self, scratch.wait).atexit = False

    def _stream_weights(self) -> int:
        """Bytes of an engine built with weight streaming that stay in host memory: what does not fit on the GPU."""
        title, name = self._product.title, self.component.name
        size = int(self._engine.streamable_weights_size)
        if not size:
            return 0
        # TensorRT would choose as well, but its Python binding cuts what it chose to 32 bits.
        torch.cuda.empty_cache()  # of which TensorRT can have none
        free, _ = torch.cuda.mem_get_info(self.device)
        budget = min(size, max(0, free - self._engine.device_memory_size_v2 - RESERVE))
        self._engine.weight_streaming_budget_v2 = budget
        taken = int(self._engine.weight_streaming_budget_v2)
        if taken != budget:  # the binding does not say that it was refused
            what = f"keeps {format_bytes(taken)} of {name}'s weights on the GPU, and was told {format_bytes(budget)}"
            _log.warning("%s %s", title, what)
        return size - taken

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = arguments(self.component, inputs)
        with torch.cuda.device(self.device), self._scratch.lock:
            still_open(self.component, self._engine)
            context = self._context(sizes_of(self.component, inputs))
            with self._turn(context) as run:
                for static, x in zip(context.inputs.values(), tensors, strict=True):
                    static.copy_(x, non_blocking=True)
                run()
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
            sizes = sizes_of(self.component, inputs)
            profile = profile_index(self.component, self._profiles, sizes)
            context = _Context(self, inputs, outputs, profile)
            return _Program(self, context, capturable=self._capturable(context))

    def _capturable(self, context: _Context) -> bool:
        if self._streamed:
            why = f"{format_bytes(self._streamed)} of its weights stay in host memory"
        elif self._product.needs_gpu:
            return True
        else:
            # Asked of a stream such as graphs are captured on: the default one never is.
            scratch = self._scratch.begin(self.stream, context.scratch_bytes)
            if context.capturable(self.stream, scratch):
                return True
            why = f"{self._product.title} says so"
        _log.warning("the engine of %s runs without a CUDA graph: %s", self.component.name, why)
        return False

    def execute(self, context: _Context) -> None:
        """Put one execution on the current stream."""
        with torch.cuda.device(self.device), self._scratch.lock, self._turn(context) as run:
            run()

    @contextmanager
    def _turn(self, context: _Context) -> Iterator[Callable[[], None]]:
        """After what ran in the scratch buffer before; what is called to run puts the execution on the stream."""
        stream = torch.cuda.current_stream(self.device)
        scratch = self._scratch.begin(stream, context.scratch_bytes)
        yield partial(context.run, scratch)
        self._scratch.end(stream)

    def close(self) -> None:
        with torch.cuda.device(self.device), self._scratch.lock:
            if self._engine is not None:
                self._scratch.wait()
            self._contexts.clear()
            self._engine = None

    def new_context(self) -> Any:
        """An execution context without memory of its own."""
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._product.needs_gpu:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # Kernels for the shapes at hand are compiled at once, not behind the back of a graph being captured.
            specialisation = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = specialisation
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self.error("cannot make an execution context")
        return context

    def _context(self, sizes: Mapping[str, int]) -> _Context:
        """That of a call with such sizes, over tensors of the engine's own."""
        key = tuple(sizes.items())
        capturing = torch.cuda.is_current_stream_capturing()
        if key not in self._contexts:
            profile = profile_index(self.component, self._profiles, sizes)
            if capturing:
                raise BackendError(
                    f"{self.component.name} was captured before it had run; run it once at these sizes"
                )
            with torch.inference_mode(False):  # a caller's own would mark the static tensors
                own = {
                    spec.name: torch.empty(spec.shape(sizes), dtype=spec.dtype, device=self.device)
                    for spec in self.component.inputs
                }
                self._contexts[key] = _Context(self, own, None, profile)
            idle = [k for k, context in self._contexts.items() if not context.captured]
            if len(idle) > _CONTEXTS:
                self._scratch.wait()  # it may still be running
                del self._contexts[idle[0]]
        self._contexts.move_to_end(key)
        return self._contexts[key]


class TensorRTBackend:
    """TensorRT.

    `LATENTRT_BUILD=never` makes a missing engine an error where it would be built. `LATENTRT_PLUGINS` says which
    plugins its engines have, as `latentrt build --plugins` does.

    `LATENTRT_SPLIT=1` runs a UNet as engines of its parts, as `latentrt build --split` builds them.

    Args:
        with_plugins: in place of what `LATENTRT_PLUGINS` says.
        split: in place of what `LATENTRT_SPLIT` says.
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
        stored = [engine(part, target, cache_dir=cache_dir, rebuild=rebuild, device=device) for part in parts]
        return self.load_stored(component, stored, device)

    def load_stored(
        self, component: Component, stored: Sequence[StoredEngine], device: torch.device
    ) -> Engine:
        """These engines, whatever else the cache has: the component's one, or those of its parts in their order."""
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
            names = plugins.chosen(os.environ.get("LATENTRT_PLUGINS", "none"))
        return EngineTarget(self.name, (10 * major + minor,), plugins=plugins.versions(names))


class TensorRTRTXBackend(TensorRTBackend):
    """TensorRT for RTX, the same in all but its name."""

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
