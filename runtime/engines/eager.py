"""The PyTorch modules as they are, on any device and in any dtype of PyTorch: the reference back end.

On a GPU, too, their operators are plain PyTorch, so that no back end is compared with its own kernels. The sampler's
step belongs to the loop, whatever the back end, and has tests of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels import by_reference
from ..offload import OffloadableWeights
from .base import Availability, CallProgram, Component, Engine, Program, Timesteps, ordered_inputs, still_open

__all__ = ["EagerBackend", "EagerEngine"]


class EagerEngine:
    """One module on one device. Its outputs are inference tensors: not to be written in place elsewhere.

    Attributes:
        weight_bytes: of its weights as they are packed.
    """

    def __init__(self, component: Component, device: torch.device) -> None:
        self.entry: Path | None = None
        self._component = component
        self._device = device
        module = component.build().eval().requires_grad_(False)
        packed = self._lay_out(module)
        self._module: nn.Module | None = module
        weights = [*module.parameters(), *module.buffers()]
        self.weight_bytes = sum(x.nbytes for x in weights)
        self._weights: OffloadableWeights | None = OffloadableWeights([*weights, *packed], device)

    def _operators(self) -> AbstractContextManager[None]:
        """The context in which operators are run: here, as plain PyTorch."""
        return by_reference()

    def _lay_out(self, module: nn.Module) -> Sequence[Tensor]:
        """Repack the weights, while they are on the host.

        Returns:
            the tensors over them that are not parameters.
        """
        return ()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        module = still_open(self._component, self._module)
        with torch.inference_mode(), self._operators():
            result = module(*(x.to(self._device) for x in ordered_inputs(self._component, inputs)))
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        return {spec.name: x for spec, x in zip(self._component.outputs, outputs, strict=True)}

    def bind(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        timesteps: Timesteps | None = None,
    ) -> Program:
        return CallProgram(self, inputs, outputs, capturable=True)

    @property
    def offloaded(self) -> bool:
        weights = self._weights  # another thread may close the engine
        return weights is not None and weights.offloaded

    def offload(self) -> None:
        if self._weights is not None:
            self._weights.offload()

    def onload(self) -> None:
        if self._weights is not None:
            self._weights.onload()

    def close(self) -> None:
        self._module = self._weights = None


class EagerBackend:
    name = "eager"
    upcast = torch.float32

    def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
        if device.type == "cuda" and not torch.cuda.is_available():
            return Availability(
                False,
                f"PyTorch {torch.__version__} sees no CUDA device",
                "install a CUDA build of PyTorch and the driver, or use device 'cpu'",
            )
        return Availability(True, f"PyTorch {torch.__version__}")

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        return EagerEngine(component, device)
