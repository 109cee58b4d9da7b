"""libcuda as far as plugins call it: kernels run in Triton's interpreter (compiled where there is a GPU)."""
# ruff: noqa: N802 the names are libcuda's

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentrt.kernels._triton import Launch
from latentrt.kernels.aot import signature
from latentrt.kernels.binaries import Kernels, parameters
from latentrt.runtime.engines.plugin_code import Code, Cubin
from torch import Tensor

_READ = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def code_of(kernels: Kernels, *, shared: int = 0) -> tuple[Code, dict[bytes, Launch]]:
    """What would be compiled for `kernels`, with names for machine code; and the launches by those."""
    launches, constants = kernels.launches()
    named = {f"{role}\0of sm_{kernels.arch}".encode(): launch for role, launch in launches.items()}
    images = {
        role: Cubin(launch.kernel.name, tuple(parameters(launch)), shared, launch.num_warps, cubin)
        for (role, launch), cubin in zip(launches.items(), named, strict=True)
    }
    return Code({kernels.arch: constants}, {kernels.arch: images}), named


@dataclass
class FakeCuda:
    """The driver's library: launches run in Triton over tensors that it finds by their addresses.

    Attributes:
        launches: by machine code.
        memory: tensors by their address.
        calls: (function, arguments worth remembering) in order.
        fail: the name of a function that fails from now on.
    """

    launches: Mapping[bytes, Launch]
    memory: dict[int, Tensor] = field(default_factory=dict)
    arch: int = 80
    context: int = 1000
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    fail: str = ""
    _loaded: dict[int, bytes] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if name == self.fail:
                return 700
            getattr(self, f"_{name}")(*arguments)
            return 0

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def holds(self, *tensors: Tensor) -> list[int]:
        """Their addresses, at which kernels find them."""
        self.memory |= {x.data_ptr(): x for x in tensors}
        return [x.data_ptr() for x in tensors]

    def _cuGetErrorString(self, code: int, out: Any) -> None:
        out._obj.value = b"an illegal memory access was encountered"

    def _cuCtxGetDevice(self, out: Any) -> None:
        out._obj.value = 3

    def _cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> None:
        assert device.value == 3
        out._obj.value = {75: self.arch // 10, 76: self.arch % 10}[attribute]

    def _cuCtxGetCurrent(self, out: Any) -> None:
        out._obj.value = self.context

    def _cuModuleLoadData(self, out: Any, image: Any) -> None:
        at = ctypes.cast(image, ctypes.c_void_p).value
        cubin = next(c for c in self.launches if ctypes.string_at(at, len(c)) == c)
        out._obj.value = len(self._loaded) + 1
        self._loaded[out._obj.value] = cubin
        self.calls.append(("cuModuleLoadData", cubin))

    def _cuModuleGetFunction(self, out: Any, module: Any, entry: bytes) -> None:
        assert entry.decode() == self.launches[self._loaded[module.value]].kernel.name
        out._obj.value = module.value

    def _cuFuncSetAttribute(self, function: Any, attribute: int, value: Any) -> None:
        self.calls.append(("cuFuncSetAttribute", attribute, value.value))

    def _cuLaunchKernel(self, function: Any, *rest: Any) -> None:
        *sizes, shared, stream, arguments, extra = rest
        assert extra is None
        launch = self.launches[self._loaded[function.value]]
        self.calls.append(("cuLaunchKernel", tuple(sizes), shared, stream.value))
        # In the order that Triton compiles the kernel for, whatever the plugin thinks; at the end, scratch.
        order = [(name, kind) for name, kind in signature(launch)[0].items() if kind != "constexpr"]
        assert len(arguments) == len(order) + 2
        assert [ctypes.c_void_p.from_address(at).value for at in arguments[-2:]] == [None, None]
        values: dict[str, Any] = {}
        for (name, kind), at in zip(order, arguments, strict=False):
            if kind.startswith("*"):
                values[name] = self.memory[ctypes.c_void_p.from_address(at).value or 0]
            else:
                values[name] = _READ[kind].from_address(at).value
        compiled_in = {name: value for name, value in launch.args.items() if name not in values}
        launch.kernel.jitted[tuple(sizes[:3])](
            **values,
            **compiled_in,
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
