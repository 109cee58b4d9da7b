"""An ONNX model compiled to a TensorRT engine, by either product, in this process.

The process is meant to be a child (`build_process.py`): a build cannot be interrupted from within. Nothing here
imports torch, triton or onnx.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import BuildError
from ..runtime.engines import plugins, products
from ..runtime.host_memory import peak_bytes
from . import quick_plugins

__all__ = ["EngineRequest", "build_engine"]

_log = logging.getLogger(__name__)

_COMPATIBILITY = {
    "none": "NONE",
    "same-capability": "SAME_COMPUTE_CAPABILITY",
    "ampere-plus": "AMPERE_PLUS",
}


@dataclass(frozen=True)
class EngineRequest:
    """What to build; all of it can be written as JSON.

    Attributes:
        component: its name, for messages.
        product: "tensorrt" or "tensorrt-rtx".
        model, plan: paths of the ONNX model and of the engine to write.
        profiles: for each optimisation profile, (smallest, best, largest) shape of every input by name.
        archs: compute capabilities such as 89. Of TensorRT one, its GPU's, for which plugins have kernels.
        weight_streaming: weights may stay in host memory at run time.
        hardware_compatibility: "none", "same-capability" or "ampere-plus".
        tf32: float32 may be rounded to TF32; otherwise float32 means float32.
        timing_cache: file to keep the timings of kernels in (TensorRT only).
        plugins: operators that plugins take.
        kernels: theirs: by key and architecture, files of `plugin_kernels`.
        gpu: of several the one to build on, as `CUDA_VISIBLE_DEVICES` names it; the child sees no other.
    """

    component: str
    product: str
    model: str
    plan: str
    profiles: tuple[Mapping[str, list[list[int]]], ...]
    archs: tuple[int, ...] = ()
    weight_streaming: bool = False
    hardware_compatibility: str = "none"
    tf32: bool = False
    timing_cache: str | None = None
    plugins: tuple[str, ...] = ()
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    gpu: str | None = None


def build_engine(request: EngineRequest, on_phase: Callable[[str], None]) -> dict[str, Any]:
    """Parse the model, build the engine and write it to `request.plan`.

    The network is strongly typed: precisions are those of the ONNX graph, and float32 stays float32 unless the request
    allows TF32. An engine uses one stream and memory that its caller gives it, so that it can be captured in a CUDA
    graph.

    Args:
        on_phase: told what the builder is doing, at times from other threads.

    Returns:
        Seconds, layers and bytes, for the manifest; and how often each plugin was created, configured and serialised.

    Raises:
        BackendUnavailableError: the product is not there.
        BuildError: it rejects the model; the message has the node and what to do.
        OSError: the engine cannot be written.
    """
    trt = products.load(products.product(request.product))
    kernels = {
        key: {int(arch): Path(file) for arch, file in files.items()} for key, files in request.kernels.items()
    }
    with plugins.building(trt, request.plugins, kernels) as calls:
        if plugins.AOT_ATTENTION in request.plugins:
            quick_plugins.register(import_module(f"{trt.__name__}.plugin"), calls, request.archs[0])
        return _build(trt, request, calls, on_phase)


def _build(
    trt: Any, request: EngineRequest, calls: plugins.PluginCalls, on_phase: Callable[[str], None]
) -> dict[str, Any]:
    work = _Build(trt, request, calls)
    on_phase("reading the model")
    begun = time.perf_counter()
    network, parser = work.parse()
    parsed = time.perf_counter()
    config = work.configure(network, on_phase)
    plan = work.compile(network, config)
    built = time.perf_counter()
    layers = [network.get_layer(k).type.name for k in range(network.num_layers)]
    del parser, network  # which lives in the parser
    on_phase("writing the engine")
    with open(request.plan, "wb") as file:
        file.write(memoryview(plan))
    if request.timing_cache is not None:
        _keep(config.get_timing_cache().serialize(), Path(request.timing_cache), Path(request.plan))
    return {
        "parse_seconds": round(parsed - begun, 3),
        "build_seconds": round(built - parsed, 3),
        "layers": len(layers),
        "plugin_layers": sum("PLUGIN" in layer for layer in layers),
        "plugins": {name: dict(counts) for name, counts in calls.counts.items()},
        "engine_bytes": plan.nbytes,
        "peak_memory_bytes": peak_bytes(),
    }


class _Build:
    """One build: its builder, which must outlive what it makes."""

    def __init__(self, trt: Any, request: EngineRequest, calls: plugins.PluginCalls) -> None:
        self.trt = trt
        self.request = request
        self.calls = calls
        self.product = products.product(request.product)
        self.log = products.logger(trt)
        self.log.clear()
        self.builder = products.make(trt.Builder, self.log)
        if self.builder is None:
            raise self._error(f"cannot start ({self.log.why()})", "see that its GPU and driver work")

    def parse(self) -> tuple[Any, Any]:
        trt = self.trt
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if plugins.AOT_ATTENTION in self.request.plugins:
            flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
        network = self.builder.create_network(flags)
        parser = trt.OnnxParser(network, self.log)
        if self.request.plugins and not products.has_plugin_library(self.product):
            # Without it the parser would end the process at the first plugin.
            raise self._error(
                "does not find its own library by name, as it must for plugins",
                "build in a child process, as `latentrt build` does, or without plugins",
            )
        if not Path(self.request.model).is_file():
            raise self._error(f"finds no model at {self.request.model}", "export it again")
        if not parser.parse_from_file(self.request.model):
            found = [_describe_parser_error(parser.get_error(k)) for k in range(parser.num_errors)]
            found += self.calls.failures
            raise self._error(
                f"rejects {'; '.join(dict.fromkeys(found)) or self.log.why()}",
                "run this component on another back end (`latentrt backends`), or export it without that operator",
            )
        return network, parser

    def compile(self, network: Any, config: Any) -> Any:
        """The serialised engine."""
        self.log.clear()
        plan = self.builder.build_serialized_network(network, config)
        if self.calls.failures:
            raise self._error(
                f"has no use of plugins: {'; '.join(dict.fromkeys(self.calls.failures))}",
                "build without these",
            )
        if plan is None:
            raise self._error(
                f"cannot build it: {self.log.why()}",
                "run this component on another back end, or build it in another dtype or for other sizes",
            )
        return plan

    def configure(self, network: Any, on_phase: Callable[[str], None]) -> Any:
        trt, request = self.trt, self.request
        config = self.builder.create_builder_config()
        config.progress_monitor = _monitor(trt, on_phase)
        (config.set_flag if request.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
        config.max_aux_streams = 0
        if request.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        elif hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # TensorRT for RTX allocates while it runs, unless told, and cannot be captured then. With weight
            # streaming it has to, so such an engine runs without a CUDA graph.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        level = _COMPATIBILITY[request.hardware_compatibility]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
        if not self.product.needs_gpu:
            config.num_compute_capabilities = len(request.archs)
            for k, arch in enumerate(request.archs):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{arch}"), k)
        for shapes in request.profiles:
            profile = self.builder.create_optimization_profile()
            for k in range(network.num_inputs):
                name = network.get_input(k).name
                profile.set_shape(name, *shapes[name])
            if config.add_optimization_profile(profile) < 0:
                raise self._error(f"refuses the sizes {shapes}: {self.log.why()}", "build it for other sizes")
        if request.timing_cache is not None:
            self._take_timings(config, Path(request.timing_cache))
        return config

    def _take_timings(self, config: Any, file: Path) -> None:
        """The timings of earlier builds, given to this one; TensorRT refuses those of another GPU or version."""
        cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def _error(self, what: str, remedy: str) -> BuildError:
        title = f"{self.product.title} {self.trt.__version__}"
        return BuildError(f"{self.request.component}: {title} {what}; {remedy}")


def _describe_parser_error(error: Any) -> str:
    why = " ".join(error.desc().split())
    if error.node() < 0:
        return f"the file: {why}"
    functions = " in ".join(error.local_function_stack())
    place = f", in the function {functions}" if functions else ""
    return f"node {error.node_name() or error.node()!r} ({error.node_operator()}{place}): {why}"


def _monitor(trt: Any, on_phase: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            on_phase(name)

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def _keep(timings: Any, file: Path, plan: Path) -> None:
    """Write the timings whole or not at all, for the builds to come. They only save time: the engine is there without.

    Written beside the plan first: that folder is this build's own, and swept where the build is killed.
    """
    aside = plan.with_name(f"{plan.name}.timings")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(memoryview(timings))
        aside.replace(file)
    except OSError as error:
        _log.warning("cannot keep timings in %s: %s", file, error)
        aside.unlink(missing_ok=True)
