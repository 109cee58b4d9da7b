"""ONNX Runtime: each component exported once, checked against PyTorch, then run without PyTorch's exporter.

On the CPU an image's bits do not depend on the batch it is computed in: weights are packed once, and packed
products use the same blocks whatever the number of rows. tests/runtime/test_engines_batch.py holds that.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ...errors import BackendError, BackendUnavailableError
from ..prepare import onnx_model
from .base import Availability, CallProgram, Component, Engine, Program, Timesteps, arguments

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeEngine"]

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.bool: np.bool_}
_INSTALL = {"cpu": 'pip install "latentrt[cpu]"', "cuda": 'pip install "latentrt[gpu]"'}


class OnnxRuntimeEngine:
    """One session. Inputs and outputs that are on its device are handed over without a copy."""

    def __init__(self, component: Component, model: Path, device: torch.device) -> None:
        self.entry: Path | None = model.parent
        self._component = component
        self._device = device
        self._session: onnxruntime.InferenceSession | None = open_session(model, device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self._session  # held here, so that a close() in another thread cannot take it away
        if session is None:
            raise BackendError(f"{self._component.name} was closed; load it again")
        tensors = arguments(self._component, inputs)
        try:
            outputs = run_session(self._component, session, tensors, self._device)
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
        return CallProgram(self, inputs, outputs, capturable=False)

    def close(self) -> None:
        self._session = None


class OnnxRuntimeBackend:
    name = "onnxruntime"

    def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
        remedy = _INSTALL.get(device.type)
        if remedy is None:
            return Availability(False, f"it has no provider for {device.type}", "use device 'cpu' or 'cuda'")
        if util.find_spec("onnxruntime") is None:
            return Availability(False, "onnxruntime is not installed", remedy)
        if dtype == torch.bfloat16:
            return Availability(False, "ONNX Runtime has no bfloat16 convolution", "use float32 or float16")
        if device.type == "cuda" and "CUDAExecutionProvider" not in _import().get_available_providers():
            return Availability(False, "this onnxruntime is built without CUDA", f"{remedy} in its place")
        return Availability(True, f"ONNX Runtime {_version()}")

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        found = self.availability(device, component.dtype)
        if not found.ok:
            raise BackendUnavailableError(f"back end {self.name!r}: {found.reason}; {found.remedy}")
        return OnnxRuntimeEngine(component, onnx_model(component, cache_dir=cache_dir), device)


def open_session(
    model: Path, device: torch.device, *, optimized: bool = True
) -> onnxruntime.InferenceSession:
    """A session on `device`, with as many threads as PyTorch uses: OMP_NUM_THREADS, else physical cores.

    The graph is optimised at each load. Keeping the optimised one would save a third of a load, 0.1 s for a
    small UNet, and is a file for one kind of processor.

    Args:
        optimized: else the graph runs node by node as it is in the file, from weights that stay there. On the CPU
            float16 weights are otherwise kept in float32 as well: three times their memory.

    Raises:
        BackendError: ONNX Runtime cannot read or run the model.
    """
    ort = _import()
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        # TF32 is off so that float32 means float32, as in PyTorch.
        cuda = {"device_id": str(_index(device)), "use_tf32": "0"}
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    try:
        return ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # as above
        raise BackendError(f"ONNX Runtime cannot load {model}: {error}") from error


def run_session(
    component: Component, session: onnxruntime.InferenceSession, tensors: list[Tensor], device: torch.device
) -> list[Tensor]:
    """Run once over the tensors' own memory; outputs are on `device`, in the component's order."""
    index = _index(device)
    binding = session.io_binding()
    # Kept until the run is over: the binding has no more than their addresses.
    held = [x.detach().to(device).contiguous() for x in tensors]
    for spec, x in zip(component.inputs, held, strict=True):
        binding.bind_input(spec.name, device.type, index, _NUMPY[x.dtype], list(x.shape), x.data_ptr())
    for spec in component.outputs:
        binding.bind_output(spec.name, device.type, index)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the session runs in a stream of its own
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return [torch.utils.dlpack.from_dlpack(value) for value in binding.get_outputs()]


def _index(device: torch.device) -> int:
    """Of a device that may not say: on CUDA the current one."""
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
