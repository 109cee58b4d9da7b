"""A plugin's compiled kernels as data, and their launch through the CUDA driver.

Imports neither torch nor triton: an engine with plugins runs without them.
"""

from __future__ import annotations

import base64
import ctypes
import json
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from hashlib import sha256
from typing import Any

from ...errors import BackendError
from .plugin_launch import Buffer, PluginLaunch

__all__ = ["Code", "Cubin", "Driver", "Prepared", "driver"]

_ALIGNMENT = 16  # bytes; the kernels were compiled for pointers aligned to it
_SCRATCH = 2  # pointers at the end of every Triton kernel's parameters: to global and to profiling scratch

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_LIMIT = 48 * 1024  # bytes of shared memory above which a kernel has to opt in

_NUMBERS: Mapping[str, Callable[[Any], Any]] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}


@dataclass(frozen=True)
class Cubin:
    """One kernel's machine code.

    Attributes:
        entry: name of the kernel in the cubin.
        parameters: (name, Triton's type), in order; types of pointers begin with `*`.
        shared: bytes of shared memory per block.
        warps: per block.
        code: the cubin file.
    """

    entry: str
    parameters: tuple[tuple[str, str], ...]
    shared: int
    warps: int
    code: bytes

    @cached_property
    def digest(self) -> str:
        return sha256(self.code).hexdigest()


@dataclass(frozen=True)
class Code:
    """The kernels of one node: for each architecture the constants of its grids, and a cubin for each role."""

    constants: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    cubins: Mapping[int, Mapping[str, Cubin]] = field(default_factory=dict)

    @staticmethod
    def of(files: Mapping[int, bytes]) -> Code:
        """From the files that `kernels.binaries` wrote, by architecture."""
        sets = {arch: json.loads(text) for arch, text in files.items()}
        return Code(
            {arch: found["constants"] for arch, found in sets.items()},
            {
                arch: {role: _cubin(row) for role, row in found["images"].items()}
                for arch, found in sets.items()
            },
        )

    @cached_property
    def packed(self) -> bytes:
        """The bytes that are stored in an engine."""
        rows = {
            arch: {
                "constants": self.constants[arch],
                "images": {
                    role: {
                        "entry": cubin.entry,
                        "parameters": cubin.parameters,
                        "shared": cubin.shared,
                        "warps": cubin.warps,
                        "cubin": base64.b64encode(cubin.code).decode(),
                    }
                    for role, cubin in cubins.items()
                },
            }
            for arch, cubins in self.cubins.items()
        }
        return zlib.compress(json.dumps(rows).encode())

    @staticmethod
    def from_bytes(data: bytes) -> Code:
        """The inverse of `packed`.

        Raises:
            BackendError: the data are damaged.
        """
        try:
            rows = json.loads(zlib.decompress(data))
            return Code.of({int(arch): json.dumps(row).encode() for arch, row in rows.items()})
        except (zlib.error, ValueError, KeyError, TypeError) as error:
            raise BackendError(
                f"the kernels of a plugin are damaged ({error}); build the engine again with `latentrt build`"
            ) from error

    def of_arch(self, arch: int) -> tuple[Mapping[str, int], Mapping[str, Cubin]]:
        """Constants, and cubins by role.

        Raises:
            BackendError: there are none for `arch`.
        """
        if arch not in self.cubins:
            known = ", ".join(f"sm_{a}" for a in sorted(self.cubins))
            raise BackendError(
                f"the engine's kernels are for {known}, and this GPU is sm_{arch}; build it for this one with "
                f"`latentrt build --arch sm_{arch}`"
            )
        return self.constants[arch], self.cubins[arch]


def _cubin(row: Mapping[str, Any]) -> Cubin:
    parameters = tuple((str(name), str(triton_type)) for name, triton_type in row["parameters"])
    return Cubin(
        row["entry"], parameters, row["shared"], row["warps"], base64.b64decode(row["cubin"], validate=True)
    )


class Prepared:
    """A launch whose scalar arguments are set; its pointers are set when it is launched."""

    def __init__(self, launch: PluginLaunch, cubin: Cubin, function: ctypes.c_void_p) -> None:
        self._grid, self._block, self._shared = launch.grid, 32 * cubin.warps, cubin.shared
        self._function = function
        self._pointers: list[tuple[ctypes.c_void_p, Buffer]] = []
        self._kept: list[Any] = []
        for name, triton_type in cubin.parameters:
            value = launch.values[name]
            if isinstance(value, Buffer):
                held: Any = ctypes.c_void_p()
                self._pointers.append((held, value))
            else:
                held = _NUMBERS[triton_type](value)
            self._kept.append(held)
        self._kept += [ctypes.c_void_p() for _ in range(_SCRATCH)]
        addresses = [ctypes.cast(ctypes.byref(held), ctypes.c_void_p) for held in self._kept]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)

    def __call__(
        self, cuda: Driver, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Launch on the stream.

        Raises:
            BackendError: a pointer is not aligned, or the driver refuses.
        """
        memory = {"input": inputs, "output": outputs, "workspace": (workspace,)}
        for held, buffer in self._pointers:
            address = int(memory[buffer.of][buffer.index])
            if address % _ALIGNMENT or not address:
                raise BackendError(
                    f"a plugin's {buffer.of} {buffer.index} is at {address:#x}, which is not aligned"
                )
            held.value = address
        cuda.launch(self._function, self._grid, self._block, self._shared, stream, self._arguments)


class Driver:
    """The few functions of libcuda that a launch needs, in the thread's current context."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._lock = threading.Lock()
        self._functions: dict[tuple[int, str, str], ctypes.c_void_p] = {}

    def arch(self) -> int:
        """The compute capability of the current context's GPU, such as 89.

        Raises:
            BackendError: there is no current context.
        """
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cuCtxGetDevice", ctypes.byref(device))
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        return 10 * major.value + minor.value

    def function(self, cubin: Cubin) -> ctypes.c_void_p:
        """A kernel in the current context, loaded once and kept for the life of the process."""
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        key = (context.value or 0, cubin.digest, cubin.entry)
        with self._lock:
            if key not in self._functions:
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(cubin.code))
                self._call("cuModuleGetFunction", ctypes.byref(function), module, cubin.entry.encode())
                if cubin.shared > _STATIC_LIMIT:
                    self._call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, ctypes.c_int(cubin.shared))
                self._functions[key] = function
            return self._functions[key]

    def load(self, code: Code) -> None:
        """Load all kernels for the current context's GPU; there may be none, as when building for other GPUs."""
        for cubin in code.cubins.get(self.arch(), {}).values():
            self.function(cubin)

    def launch(
        self, function: ctypes.c_void_p, grid: int, block: int, shared: int, stream: int, arguments: Any
    ) -> None:
        """Launch a kernel on a stream; `arguments` is an array of addresses."""
        blocks, threads = (grid, 1, 1), (block, 1, 1)
        at = ctypes.c_void_p(stream)
        self._call("cuLaunchKernel", function, *blocks, *threads, shared, at, arguments, None)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            what = (text.value or b"unknown").decode()
            raise BackendError(f"a plugin's kernel: {name} failed with {code} ({what})")


@cache
def driver() -> Driver:
    """The driver of this machine.

    Raises:
        BackendError: there is none.
    """
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise BackendError(f"plugins run on NVIDIA GPUs, and there is no driver here ({error})") from error
