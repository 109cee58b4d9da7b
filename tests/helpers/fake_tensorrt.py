"""TensorRT as far as an engine calls it: on the CPU, its engines run PyTorch modules over the addresses given them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import tensorrt_rtx_bindings as rtx
import torch
from latentrt.runtime.engines import products
from latentrt.runtime.engines.base import Component, TensorSpec
from latentrt.runtime.engines.sizes import Axis, Profile
from torch import Tensor, nn

__all__ = [
    "ADD_ONE",
    "NARROW",
    "WIDE",
    "FakeContext",
    "FakeCuda",
    "FakeEngine",
    "FakeStream",
    "FakeTensorRT",
    "install",
    "x_of",
]


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


ADD_ONE = Component(
    "unet",
    AddOne,
    torch.float32,
    (TensorSpec("x", ("batch", 4), torch.float32),),
    (TensorSpec("y", ("batch", 4), torch.float32),),
    "0",
    {"batch": 2},
)
NARROW, WIDE = Profile({"batch": Axis(2, 2, 3)}), Profile({"batch": Axis(1, 2, 32)})


class FakeContext:
    """An execution context."""

    def __init__(self, owner: FakeTensorRT, component: Component, module: nn.Module) -> None:
        owner.contexts += 1
        owner.alive.add(self)
        self._owner, self._number = owner, owner.contexts
        self._component, self._module = component, module
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if not self._called("set_optimization_profile_async", profile, stream):
            raise RuntimeError("Error in set optimization profile async.")  # as the real binding does
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return self._called("set_tensor_address", name)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return self._called("set_input_shape", name, shape)

    def infer_shapes(self) -> list[str]:
        self._called("infer_shapes")
        return self._owner.unknown

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        specs = self._component.inputs
        named = {d: n for s in specs for d, n in zip(s.dims, self._shapes[s.name], strict=True)}
        (spec,) = (spec for spec in self._component.outputs if spec.name == name)
        return spec.shape({str(d): n for d, n in named.items()})

    def update_device_memory_size_for_shapes(self) -> int:
        return 100 * self._shapes[self._component.inputs[0].name][0]

    def set_device_memory(self, memory: int, size: int) -> None:
        self._called("set_device_memory", memory, size)

    def is_stream_capturable(self, stream: int) -> bool:
        self._called("is_stream_capturable", stream)
        return self._owner.capturable

    def execute_async_v3(self, stream: int) -> bool:
        inputs = [self._at(spec, self._shapes[spec.name]) for spec in self._component.inputs]
        with torch.inference_mode():
            result = self._module(*inputs)
            results = (result,) if isinstance(result, Tensor) else result
            for spec, y in zip(self._component.outputs, results, strict=True):
                self._at(spec, self.get_tensor_shape(spec.name)).copy_(y)
        return self._called("execute_async_v3", stream)

    def _at(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        """The tensor at the address of an input or output."""
        size = spec.dtype.itemsize * torch.Size(shape).numel()
        memory = (ctypes.c_char * size).from_address(self._addresses[spec.name])
        return torch.frombuffer(memory, dtype=spec.dtype).view(shape)

    def _called(self, name: str, *arguments: Any) -> bool:
        self._owner.calls.append((self._number, name, *arguments))
        if name == self._owner.failing:
            self._owner.log.log(rtx.ILogger.ERROR, "Error Code 3:\n  it broke")
            return False
        return True


class FakeEngine:
    def __init__(self, owner: FakeTensorRT, component: Component) -> None:
        self._owner = owner
        self._component, self._module = component, component.build()
        self.streamable_weights_size = owner.streamable
        self.device_memory_size_v2 = 100 * 32
        self._budget = owner.streamable

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self._owner.failing != "weight_streaming_budget_v2":  # of which the real binding says nothing
            self._budget = budget

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, how: Any) -> FakeContext | None:
        self._owner.strategies.append(how)
        if self._owner.failing == "create_execution_context":
            self._owner.log.log(rtx.ILogger.ERROR, "no memory")
            return None
        return FakeContext(self._owner, self._component, self._module)


class FakeTensorRT:
    """The part of the module `tensorrt` that an engine uses.

    Attributes:
        plans: what engines compute, by the content of their files.
        calls: of contexts, (number of the context, function, arguments) in order.
        contexts, alive: how many were made; those that were not destroyed.
        failing: the name of a function that fails from now on.
        warnings: what it has to say of an engine as it is read.
        engine: the one read last.
    """

    __version__ = "1.0.fake"
    ILogger = rtx.ILogger
    ExecutionContextAllocationStrategy = rtx.ExecutionContextAllocationStrategy
    DynamicShapesKernelSpecializationStrategy = rtx.DynamicShapesKernelSpecializationStrategy

    def __init__(self, plans: Mapping[bytes, Component]) -> None:
        self.plans = dict(plans)
        self.calls: list[tuple[Any, ...]] = []
        self.strategies: list[Any] = []
        self.contexts = 0
        self.alive: WeakSet[FakeContext] = WeakSet()
        self.failing = ""
        self.unknown: list[str] = []
        self.warnings: list[str] = []
        self.streamable = 0
        self.capturable = True
        self.engine: FakeEngine | None = None

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        self.log = log
        if self.failing == "Runtime":
            log.log(rtx.ILogger.ERROR, "CUDA initialization failure with error: 3")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, plan: Any) -> FakeEngine | None:
        component = self.plans.get(bytes(plan))
        if component is None:
            self.log.log(rtx.ILogger.ERROR, "magicTag mismatch")
            return None
        self.engine = FakeEngine(self, component)
        for warning in self.warnings:
            self.log.log(rtx.ILogger.WARNING, warning)
        return self.engine

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[1] == name]


class FakeStream:
    device = torch.device("cpu")

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waited: list[str] = []

    def record_event(self) -> str:
        return f"event of {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.waited.append(event)

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(f"stream {other.cuda_stream}")

    def synchronize(self) -> None:
        self.waited.append("all")


class FakeCuda:
    """torch.cuda's current stream, whether it is being captured, and how much memory is free."""

    def __init__(self) -> None:
        self.stream = FakeStream(1)
        self.capturing = False
        self.free = 1 << 40


def install(
    monkeypatch: pytest.MonkeyPatch, plans: Mapping[bytes, Component]
) -> tuple[FakeTensorRT, FakeCuda]:
    """Put a FakeTensorRT and a FakeCuda in the place of the real ones."""
    fake, cuda = FakeTensorRT(plans), FakeCuda()
    monkeypatch.setattr(products, "load", lambda product: fake)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(99))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cuda.capturing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (cuda.free, 1 << 40))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    return fake, cuda


def x_of(batch: int) -> dict[str, Tensor]:
    """Inputs of `ADD_ONE`."""
    return {"x": torch.arange(batch * 4, dtype=torch.float32).view(batch, 4)}
