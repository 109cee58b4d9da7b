"""ONNX Runtime: each component exported once, checked against PyTorch, then run without PyTorch's exporter.

On the CPU an image's bits do not depend on the batch it is computed in: weights are packed once, and packed
matmuls use the same blocks whatever the number of rows. tests/runtime/test_engines_onnxruntime.py holds that.

On a GPU a session computes on a stream of its own, which waits for PyTorch's and which PyTorch's waits for: the host
waits for neither. `LATENTRT_ONNXRUNTIME` names options, `graph` and `tensorrt`, with commas between; never run yet,
written without a GPU:

    graph      the CUDA provider captures a bound session in a CUDA graph and replays it, if all of its nodes run there.
               For programs that use their GPUs from one thread: a capture begins by waiting for the device, which
               breaks one of another thread, and is broken by any memory that another takes of a GPU meanwhile
    tensorrt   its TensorRT provider comes first. It builds its engines at each load; the back end tensorrt keeps them.
               float32 models are refused unless NVIDIA_TF32_OVERRIDE=0, since it would round them to TF32
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError, BackendUnavailableError
from ..prepare import find_or_export_onnx
from ..streams import ordered_with_current
from .base import (
    Availability,
    Component,
    Engine,
    Program,
    Timesteps,
    check_bound,
    ordered_inputs,
    output_shapes,
    still_open,
)

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeEngine", "open_session", "run_session"]

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.bool: np.bool_}
_INSTALL = {"cpu": 'pip install "latentrt[cpu]"', "cuda": 'pip install "latentrt[gpu]"'}
_OPTIONS = ("graph", "tensorrt")
_graph_ids = itertools.count(1)  # of captured programs; ONNX Runtime calls them graph annotations


class OnnxRuntimeEngine:
    """One session. Inputs and outputs that are on its device are not copied."""

    def __init__(
        self, component: Component, model: Path, device: torch.device, options: Sequence[str] = ()
    ) -> None:
        self.entry: Path | None = model.parent
        self._component = component
        self._device = device
        self._captures = "graph" in options
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with _current(device):
            self._session: onnxruntime.InferenceSession | None = open_session(
                model,
                device,
                stream=self._stream,
                options=options,
                tf32=component.tf32,
            )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = still_open(self._component, self._session)
        tensors = ordered_inputs(self._component, inputs)
        try:
            outputs = run_session(self._component, session, tensors, self._device, self._stream)
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise BackendError(f"ONNX Runtime failed on {self._component.name}: {error}") from error
        return {spec.name: x for spec, x in zip(self._component.outputs, outputs, strict=True)}

    def bind(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        timesteps: Timesteps | None = None,
    ) -> Program:
        """Tensors must have the component's dtypes and be contiguous: the session gets their addresses, once."""
        session = still_open(self._component, self._session)
        check_bound(self._component, inputs, outputs)
        return _Program(
            self._component, session, inputs, outputs, self._device, self._stream, captures=self._captures
        )

    def close(self) -> None:
        self._session = None


class _Program:
    """A session over static tensors, bound once: a run copies nothing."""

    capturable = False  # by us; ONNX Runtime may capture it
    nbytes = 0

    def __init__(
        self,
        component: Component,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        *,
        captures: bool,
    ) -> None:
        self._component, self._session, self._device, self._stream = component, session, device, stream
        self._held = (dict(inputs), dict(outputs))  # the binding has only their addresses
        self._binding = session.io_binding()
        for spec in component.inputs:
            _bind(self._binding.bind_input, spec.name, inputs[spec.name], device)
        for spec in component.outputs:
            _bind(self._binding.bind_output, spec.name, outputs[spec.name], device)
        self._options = _run_options(stream, next(_graph_ids) if captures else None)

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        try:
            with _current(self._device), ordered_with_current(self._stream):
                self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise BackendError(f"ONNX Runtime failed on {self._component.name}: {error}") from error


class OnnxRuntimeBackend:
    """ONNX Runtime."""

    name = "onnxruntime"
    upcast = torch.float32

    def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
        remedy = _INSTALL.get(device.type)
        if remedy is None:
            return Availability(False, f"it has no provider for {device.type}", "use device 'cpu' or 'cuda'")
        if util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed", remedy)
        if dtype == torch.bfloat16:
            return Availability(False, "ONNX Runtime has no bfloat16 convolution", "use float32 or float16")
        try:
            options = _chosen()
        except BackendError as error:
            reason, _, remedy = str(error).partition("; ")
            return Availability(False, reason, remedy)
        if device.type == "cpu":
            if options:
                return Availability(
                    False, f"{', '.join(options)} in LATENTRT_ONNXRUNTIME is for GPUs", "unset it"
                )
            return Availability(True, f"ONNX Runtime {_version()}")
        providers = _import().get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            return Availability(False, "this onnxruntime is built without CUDA", f"{remedy} in its place")
        if "tensorrt" in options and "TensorrtExecutionProvider" not in providers:
            return Availability(False, "this onnxruntime is built without TensorRT", f"{remedy} in its place")
        return Availability(True, f"ONNX Runtime {_version()}")

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        found = self.availability(device, component.dtype)
        if not found.ok:
            raise BackendUnavailableError(f"back end {self.name!r}: {found.reason}; {found.remedy}")
        options = _chosen()
        if "tensorrt" in options and _tensorrt_would_round(component):
            raise BackendError(
                f"ONNX Runtime's TensorRT provider rounds the float32 of {component.name} to TF32, and has no option "
                "against that; start Python with NVIDIA_TF32_OVERRIDE=0, or leave tensorrt out of LATENTRT_ONNXRUNTIME"
            )
        model = find_or_export_onnx(component, cache_dir=cache_dir)
        return OnnxRuntimeEngine(component, model, device, options)


def _tensorrt_would_round(component: Component) -> bool:
    """Whether TensorRT, left to its default, would use TF32 where float32 has to mean float32."""
    strict = component.dtype == torch.float32 and not component.tf32
    return strict and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"


def _chosen() -> tuple[str, ...]:
    """The options in `LATENTRT_ONNXRUNTIME`."""
    names = os.environ.get("LATENTRT_ONNXRUNTIME", "").split(",")
    chosen = tuple(name.strip() for name in names if name.strip())
    for name in chosen:
        if name not in _OPTIONS:
            raise BackendError(f"LATENTRT_ONNXRUNTIME has {name!r}; it can have {', '.join(_OPTIONS)}")
    return chosen


def open_session(
    model: Path,
    device: torch.device,
    *,
    optimized: bool = True,
    stream: torch.cuda.Stream | None = None,
    options: Sequence[str] = (),
    tf32: bool = False,
) -> onnxruntime.InferenceSession:
    """A session on `device`, with as many threads as PyTorch uses: OMP_NUM_THREADS, else physical cores.

    The graph is optimised at each load. Keeping the optimised one would save a third of a load, 0.1 s for a
    small UNet, and is a file for one kind of processor.

    Args:
        optimized: else the graph runs node by node as it is in the file, from weights that stay there. On the CPU
            float16 weights are otherwise kept in float32 as well: three times their memory.
        stream: on a GPU, the one to compute on. PyTorch's default one has no address that ONNX Runtime would take.
        options: of a GPU, "graph" and "tensorrt"; see above.
        tf32: a GPU may round float32 to TF32; otherwise float32 means float32.

    Raises:
        BackendError: ONNX Runtime cannot read or run the model, or not on that device.
    """
    ort = _import()
    settings = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    # Each session has its own threads, which would keep spinning after a run on cores that the next session needs.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.log_severity_level = 3
    providers = _providers(device, stream, options, tf32=tf32)
    try:
        # With fallback it would print that a provider failed and go on with others.
        session = ort.InferenceSession(model, settings, providers=providers, enable_fallback=0)
    except Exception as error:  # as above
        raise BackendError(f"ONNX Runtime cannot load {model}: {error}") from error
    # A provider whose libraries are missing is left out all the same.
    wanted = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if missing := [name for name in wanted if name not in session.get_providers()]:
        raise BackendError(
            f"ONNX Runtime cannot start {', '.join(missing)} for {model}; see that the CUDA, cuDNN and TensorRT its "
            "release notes name are installed, or use another back end"
        )
    return session


def _providers(
    device: torch.device, stream: torch.cuda.Stream | None, options: Sequence[str], *, tf32: bool = False
) -> list[str | tuple[str, dict[str, str]]]:
    """The execution providers, best first, with their settings."""
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        where = {"device_id": str(_index(device))}
        if stream is not None:
            where["user_compute_stream"] = str(stream.cuda_stream)
        graph = "1" if "graph" in options else "0"
        cuda = {**where, "use_tf32": "1" if tf32 else "0", "enable_cuda_graph": graph}
        providers.insert(0, ("CUDAExecutionProvider", cuda))
        if "tensorrt" in options:
            # Without `trt_fp16_enable` TensorRT 10 keeps the types of the graph; with it, it may lower float32 ones.
            providers.insert(0, ("TensorrtExecutionProvider", {**where, "trt_cuda_graph_enable": graph}))
    return providers


def _run_options(stream: torch.cuda.Stream | None, graph: int | None) -> onnxruntime.RunOptions:
    """Options of a run: on a stream the host does not wait for its end, and it is captured as `graph` unless None."""
    options: onnxruntime.RunOptions = _import().RunOptions()
    if stream is not None:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(-1 if graph is None else graph))
    return options


def run_session(
    component: Component,
    session: onnxruntime.InferenceSession,
    tensors: list[Tensor],
    device: torch.device,
    stream: torch.cuda.Stream | None = None,
) -> list[Tensor]:
    """Run once over the tensors' own memory; outputs are on `device`, in the component's order.

    Args:
        stream: the session's; on a GPU it has one.
    """
    binding = session.io_binding()
    # Kept until the run is over: the binding has no more than their addresses.
    held = [x.detach().to(device).contiguous() for x in tensors]
    for spec, x in zip(component.inputs, held, strict=True):
        _bind(binding.bind_input, spec.name, x, device)
    if stream is None:
        for spec in component.outputs:
            binding.bind_output(spec.name, device.type, _index(device))
        session.run_with_iobinding(binding, _run_options(stream, None))
        return [torch.utils.dlpack.from_dlpack(value) for value in binding.get_outputs()]
    # In PyTorch's memory: ONNX Runtime would reuse its own for the next run, which another caller's stream may be ahead
    # of this one's with.
    shapes = output_shapes(component, dict(zip((spec.name for spec in component.inputs), held, strict=True)))
    outputs = [torch.empty(shapes[spec.name], dtype=spec.dtype, device=device) for spec in component.outputs]
    for spec, y in zip(component.outputs, outputs, strict=True):
        _bind(binding.bind_output, spec.name, y, device)
    with _current(device), ordered_with_current(stream):
        session.run_with_iobinding(binding, _run_options(stream, None))
    return outputs


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Restores the thread's current GPU, as which ONNX Runtime leaves its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _bind(bind: Callable[..., None], name: str, x: Tensor, device: torch.device) -> None:
    """Bind a tensor on `device` by its address; nothing keeps the tensor alive."""
    bind(name, device.type, _index(device), _NUMPY[x.dtype], list(x.shape), x.data_ptr())


def _index(device: torch.device) -> int:
    """The index of a device; for "cuda" without one, that of the current device."""
    index = cast("int | None", device.index)  # PyTorch's annotation forgets the None
    if index is not None:
        return index
    return torch.cuda.current_device() if device.type == "cuda" else 0


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(
            f"onnxruntime is installed but cannot be imported ({error}); {_INSTALL['cpu']}"
        ) from error
    return onnxruntime


def _version() -> str:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return str(_import().__version__)
