"""A TensorRT execution context over static tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ..streams import ordered_with_current
from .base import Component

__all__ = ["BoundContext"]


class BoundContext:
    """An execution context for one set of sizes, with its shapes set and its addresses bound.

    Attributes:
        inputs, outputs: the static tensors, by name.
        scratch_bytes: scratch memory that an execution needs.
        captured: the scratch buffers that CUDA graphs refer to, by address only.
    """

    def __init__(
        self,
        context: Any,
        component: Component,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor] | None,
        profile: int,
        *,
        stream: torch.cuda.Stream,
        error: Callable[[str], BackendError],
    ) -> None:
        """
        Args:
            context: TensorRT's IExecutionContext, new, without scratch memory of its own.
            outputs: None to allocate them on the stream's device.
            profile: index of the engine's optimisation profile for these sizes.
            stream: where it executes outside of a capture.
            error: makes the error to raise from what TensorRT refused.

        Raises:
            BackendError: TensorRT refuses the profile or a shape, or an output has another shape than it says.
        """
        self.captured: list[Tensor] = []
        self._context, self._stream, self._error = context, stream, error
        self._memory: tuple[int, int] | None = None
        try:
            taken = context.set_optimization_profile_async(profile, stream.cuda_stream)
        except RuntimeError:  # how the binding reports a refusal
            taken = False
        if not taken:
            raise error(f"cannot take profile {profile}")
        self.inputs = {spec.name: inputs[spec.name] for spec in component.inputs}
        for name, x in self.inputs.items():
            self._bind(name, x)
            if not context.set_input_shape(name, tuple(x.shape)):
                raise error(f"refuses {name} of shape {list(x.shape)}")
        unknown = context.infer_shapes()
        if unknown:
            raise error(f"cannot tell the shape of {', '.join(unknown)}")
        self.outputs: dict[str, Tensor] = {}
        for spec in component.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            y = (
                torch.empty(shape, dtype=spec.dtype, device=stream.device)
                if outputs is None
                else outputs[spec.name]
            )
            if tuple(y.shape) != shape:
                raise BackendError(
                    f"{component.name}: {spec.name} is {list(y.shape)}, should be {list(shape)}"
                )
            self.outputs[spec.name] = y
            self._bind(spec.name, y)
        self.scratch_bytes = int(context.update_device_memory_size_for_shapes())

    def run(self, scratch: Tensor) -> None:
        """Enqueue one execution, in the order of the current stream."""
        self._compute_in(scratch)
        if torch.cuda.is_current_stream_capturing():
            if not any(x is scratch for x in self.captured):
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
        """Set only when it changed, so that nothing is set while a context that has already run is being captured."""
        memory = (scratch.data_ptr(), scratch.numel())
        if memory != self._memory:
            self._context.set_device_memory(*memory)
            self._memory = memory

    def _bind(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise self._error(f"has no tensor {name}")
