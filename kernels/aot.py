"""Compile kernels for an architecture without having one, and read the machine code.

A request is an operator with its arguments on the meta device. What is compiled is the operator's own plan, as
it would launch on that architecture; pointers are taken to be 16-byte aligned, as PyTorch's are. Triton's
wheel carries the assembler and the disassembler. Compiling happens in a child process, because Triton decides
between compiling and interpreting once a process, and because an assembler that crashes should not take the
caller along. Reports are cached by the content of everything that goes in.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, BackendUnavailableError
from ._triton import Kernel, Launch
from .registry import specs

__all__ = ["ARCHITECTURES", "SHARED_LIMIT", "Report", "Request", "cache_folder", "reports", "request"]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block may have: CUDA C++ Programming Guide, technical specifications."""

TIME_LIMIT = 600.0
"""Seconds for one batch of compilations."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"^(?:[A-Z]*GMMA|[HIDQBO]MMA|UTC[A-Z0-9]*MMA)$")
_SPILL = ("LDL", "STL")
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Request:
    """Compile `op` called with `args` (tensors on the meta device) for sm_`arch`."""

    op: str
    args: tuple[Any, ...]
    arch: int


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel shows."""

    op: str
    kernel: str
    arch: int
    registers: int
    """A thread's."""
    spills: int
    """Loads and stores of spilled registers, in instructions."""
    stack: int
    """Bytes a thread."""
    shared: int
    """Bytes a block."""
    scratch: int
    """Bytes of global scratch; a TensorRT plugin can have none."""
    tensor_core: Mapping[str, int]
    """Tensor-core instructions by name: HMMA up to sm_89 and on sm_120, HGMMA on sm_90, UTCHMMA on sm_100."""
    instructions: int
    num_warps: int
    num_stages: int
    constants: Mapping[str, Any]


def request(op: str, case: str, dtype: torch.dtype, arch: int) -> Request:
    """A registered case of an operator."""
    (spec,) = specs([op])
    (found,) = (c for c in spec.cases if c.name == case)
    return Request(op, found.inputs(dtype, torch.device("meta")), arch)


def reports(requests: Sequence[Request], cache: Path | None = None) -> list[list[Report]]:
    """One report for each kernel of each request, in order.

    Raises:
        BackendUnavailableError: Triton is not installed.
        BackendError: a kernel does not compile; the message has the compiler's.
    """
    folder = cache or cache_folder()
    paths = [folder / f"{_digest(r)}.json" for r in requests]
    missing = {path: r for path, r in zip(paths, requests, strict=True) if not path.exists()}
    if missing:
        _compile_in_child(missing, folder)
    return [[Report(**row) for row in json.loads(path.read_text(encoding="utf-8"))] for path in paths]


def cache_folder() -> Path:
    """Where reports are kept: in LATENTRT_CACHE, or ~/.cache/latentrt."""
    return Path(os.environ.get("LATENTRT_CACHE") or Path.home() / ".cache" / "latentrt") / "aot"


def _launches(r: Request) -> list[Launch]:
    (spec,) = specs([r.op])
    launches: list[Launch] = spec.plan(*r.args, arch=r.arch)[1]
    return launches


def _digest(r: Request) -> str:
    """Of all that decides the machine code: sources, arguments, options, Triton's version, this file."""
    try:
        parts: list[Any] = [version("triton"), r.arch, inspect.getsource(sys.modules[__name__])]
    except PackageNotFoundError as error:
        raise BackendUnavailableError("Triton is not installed; pip install 'latentrt[triton]'") from error
    for launch in _launches(r):
        parts += [_source(launch.kernel), _signature(launch), launch.num_warps, launch.num_stages]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _source(kernel: Kernel) -> str:
    """Of the kernel and of the functions it calls."""
    names = sorted(set(kernel.function.__code__.co_names))
    called = [kernel.function.__globals__.get(name) for name in names]
    return inspect.getsource(kernel.function) + "".join(_source(k) for k in called if isinstance(k, Kernel))


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, compile-time values and alignments, as Triton's launcher specialises them."""
    types: dict[str, str] = {}
    values: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(inspect.signature(launch.kernel.function).parameters):
        value = launch.constants[name] if name in launch.constants else launch.args[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            types[name], values[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = _POINTERS[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            types[name] = "u1"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            raise TypeError(f"{launch.kernel.name}: no Triton type for {name} = {value!r}")
    return types, values, aligned


def _compile_in_child(missing: Mapping[Path, Request], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps([(str(path), r) for path, r in missing.items()]),
        capture_output=True,
        env=environment,
        timeout=TIME_LIMIT,
        check=False,
    )
    if child.returncode != 0 or not all(path.exists() for path in missing):
        tail = child.stderr.decode(errors="replace").strip()[-2000:]
        raise BackendError(f"compiling kernels failed (status {child.returncode}):\n{tail}")


def _compile(launch: Launch, op: str, arch: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, values, aligned = _signature(launch)
    source = ASTSource(launch.kernel.jitted, types, values, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as temporary:
        cubin = Path(temporary) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", str(cubin))
        code = _output(tools.nvdisasm.path, "-c", str(cubin))
    counts = Counter(_INSTRUCTION.findall(code))
    meta = built.metadata
    (registers,), (stack,) = re.findall(r"REG:(\d+)", usage), re.findall(r"STACK:(\d+)", usage)
    return Report(
        op=op,
        kernel=launch.kernel.name,
        arch=arch,
        registers=int(registers),
        spills=sum(counts[name] for name in _SPILL),
        stack=int(stack),
        shared=meta.shared,
        scratch=getattr(meta, "global_scratch_size", 0) or 0,
        tensor_core={name: count for name, count in sorted(counts.items()) if _TENSOR_CORE.match(name)},
        instructions=sum(counts.values()),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        constants={name: value for name, value in launch.constants.items() if name.startswith("BLOCK")},
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _child(jobs: Iterable[tuple[str, Request]]) -> None:
    for path, r in jobs:
        rows = [asdict(_compile(launch, r.op, r.arch)) for launch in _launches(r)]
        target = Path(path)
        # Whole or not at all: several processes may compile the same.
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(rows), encoding="utf-8")
        partial.replace(target)


if __name__ == "__main__":
    from latentrt.kernels import aot  # the module by its own name, so that pickled requests are of its class

    aot._child(pickle.load(sys.stdin.buffer))
