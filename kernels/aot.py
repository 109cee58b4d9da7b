"""Compile kernels for an architecture without having one, and read the machine code.

A request is an operator with its arguments on the meta device. What is compiled is the operator's own plan, as it would
launch on that architecture; pointers are taken to be 16-byte aligned, as PyTorch's are. Triton's wheel includes the
assembler and the disassembler. Compiling happens in a child process, because Triton decides between compiling and
interpreting once per process, and because a compiler that crashes should not take the caller with it. Reports are
cached by the content of all inputs. What is compiled here is in Triton's own cache as well, where a launch with the
same arguments finds it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, BackendUnavailableError
from . import tuning
from ._dispatch import version_of
from ._triton import Descriptor, Kernel, Launch, Library
from .registry import specs

__all__ = [
    "ARCHITECTURES",
    "SHARED_LIMIT",
    "Job",
    "Report",
    "Request",
    "Trial",
    "attempts",
    "by_library",
    "cache_folder",
    "compile_jobs",
    "compiled",
    "digest",
    "launches",
    "reports",
    "signature",
]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one block may have: CUDA C++ Programming Guide, technical specifications."""

TIME_LIMIT = 600.0
"""Seconds for all that one call compiles."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"^(?:[A-Z]*GMMA|[HIDQBO]MMA|UTC[A-Z0-9]*MMA)$")
_SPILL = ("LDL", "STL")
_BLOCK_COPY, _HAND_OVER = "UTMALDG", "USETMAXREG"
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


Trial = tuple[str, Mapping[str, int]]

Job = Callable[[], bytes]
"""What a child process runs: it returns the content of the job's file, and is pickled on the way."""


@dataclass(frozen=True)
class Request:
    """Compile `op` called with `args` (tensors on the meta device) for sm_`arch`."""

    op: str
    args: tuple[Any, ...]
    arch: int
    trial: Trial | None = None
    """A tuning table and the constants to take in place of the data's."""


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel shows."""

    op: str
    kernel: str
    arch: int
    registers: int
    """Per thread."""
    spills: int
    """Instructions that load or store spilled registers."""
    stack: int
    """Bytes per thread."""
    shared: int
    """Bytes per block."""
    scratch: int
    """Bytes of global scratch, which a TensorRT plugin cannot provide."""
    tensor_core: Mapping[str, int]
    """Tensor-core instructions by name: HMMA up to sm_89 and on sm_120, HGMMA on sm_90, UTCHMMA on sm_100."""
    block_copies: int
    """Instructions that copy whole blocks by the copy engine (UTMALDG)."""
    specialized: bool
    """Whether warps are specialised, which shows in their handing registers to each other (USETMAXREG)."""
    instructions: int
    num_warps: int
    num_stages: int
    constants: Mapping[str, Any]


def reports(requests: Sequence[Request], cache: Path | None = None) -> list[list[Report]]:
    """One report for each kernel of each request, in order.

    Raises:
        BackendUnavailableError: Triton is not installed.
        BackendError: a kernel does not compile; the message has the compiler's.
    """
    built = []
    for r, found in zip(requests, attempts(requests, cache), strict=True):
        if isinstance(found, str):
            raise BackendError(f"compiling {r.op} for sm_{r.arch} failed: {found}")
        built.append(found)
    return built


def attempts(
    requests: Sequence[Request], cache: Path | None = None, processes: int = 1, seconds: float = TIME_LIMIT
) -> list[list[Report] | str]:
    """As `reports`, in `processes` for at most `seconds`; in place of what fails, the compiler's message.

    Raises:
        BackendUnavailableError: Triton is not installed.
    """
    folder = cache or cache_folder()
    paths = [folder / f"{_digest(r)}.json" for r in requests]
    wanted = {path: partial(_content, r) for path, r in zip(paths, requests, strict=True)}
    failed = compile_jobs(wanted, processes, seconds)
    return [
        failed[path]
        if path in failed
        else [Report(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        for path in paths
    ]


def compile_jobs(
    wanted: Mapping[Path, Job], processes: int = 1, seconds: float = TIME_LIMIT
) -> dict[Path, str]:
    """Write the files that do not exist yet, each atomically; returns the compiler's messages for those that fail.

    Whatever ends this call, Ctrl-C included, also ends its child processes.
    """
    missing = [(path, job) for path, job in wanted.items() if not path.exists()]
    for folder in {path.parent for path, _ in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    processes = min(processes, len(missing))
    failed: dict[Path, str] = {}
    if missing:
        shares, until = [missing[i::processes] for i in range(processes)], time.monotonic() + seconds
        stop = threading.Event()
        with ThreadPoolExecutor(processes) as pool:
            try:
                for errors in pool.map(lambda share: _compile_in_children(share, until, stop), shares):
                    failed |= errors
            finally:
                stop.set()
    return failed


def cache_folder() -> Path:
    """The folder of reports: in LATENTRT_CACHE, or ~/.cache/latentrt."""
    return Path(os.environ.get("LATENTRT_CACHE") or "~/.cache/latentrt").expanduser() / "aot"


def by_library(r: Request) -> bool:
    """Whether PyTorch's libraries run steps of what is requested, which are in no report."""
    return any(isinstance(step, Library) for step in _steps(r))


def _steps(r: Request) -> Sequence[Launch | Library]:
    (spec,) = specs([r.op])
    with nullcontext() if r.trial is None else tuning.trying(*r.trial):
        return spec.plan(*r.args, arch=r.arch)[1]


def launches(r: Request) -> list[Launch]:
    """What a request launches, each kernel once. Launches that differ in data alone, as for chunks of a tensor, compile
    to the same code."""
    found: dict[str, Launch] = {}
    for step in _steps(r):
        if isinstance(step, Launch):
            key = repr((step.label, signature(step), step.num_warps, step.num_stages))
            found.setdefault(key, step)
    return list(found.values())


def _digest(r: Request) -> str:
    """A digest of all that decides a report: what is compiled, and how it is read."""
    reading = [inspect.getsource(_report), inspect.getsource(Report)]
    reading += [_INSTRUCTION.pattern, _TENSOR_CORE.pattern, repr((_SPILL, _BLOCK_COPY, _HAND_OVER))]
    return digest(launches(r), r.arch, *reading)


def digest(launches: Iterable[Launch], arch: int, *more: str) -> str:
    """A digest of all that decides machine code: sources, arguments, options, Triton's version; and of more.

    Raises:
        BackendUnavailableError: Triton is not installed.
    """
    try:
        parts: list[Any] = [version("triton"), arch, inspect.getsource(compiled), *more]
    except PackageNotFoundError as error:
        raise BackendUnavailableError("Triton is not installed; pip install 'latentrt[triton]'") from error
    for launch in launches:
        parts += [_source(launch.kernel), signature(launch), launch.num_warps, launch.num_stages]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _source(kernel: Kernel) -> str:
    """The source of the kernel and of the functions it calls."""
    names = sorted(set(kernel.function.__code__.co_names))
    called = [kernel.function.__globals__.get(name) for name in names]
    return inspect.getsource(kernel.function) + "".join(_source(k) for k in called if isinstance(k, Kernel))


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
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
        elif isinstance(value, Descriptor):
            block = ", ".join(str(n) for n in value.block)
            types[name] = f"tensordesc<{_POINTERS[value.base.dtype].removeprefix('*')}[{block}]>"
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


def _compile_in_children(
    jobs: Sequence[tuple[Path, Job]], until: float, stop: threading.Event
) -> dict[Path, str]:
    """Write the reports, one child after another; returns what went wrong, by path."""
    errors: dict[Path, str] = {}
    while left := [(path, r) for path, r in jobs if not (path in errors or path.exists())]:
        end = _compile_in_child(left, until, stop)
        for path, _ in left:
            message = path.with_suffix(".error")
            if message.exists():
                errors[path] = message.read_text(encoding="utf-8")
                message.unlink()
        undone = [path for path, _ in left if not (path in errors or path.exists())]
        if not end:
            return errors | dict.fromkeys(undone, "there was no time left to compile it")
        # The child died at the first job without a file or message; the rest get another child.
        errors |= dict.fromkeys(undone[:1], end)
    return errors


def _compile_in_child(jobs: Sequence[tuple[Path, Job]], until: float, stop: threading.Event) -> str:
    """The child's exit status and output; empty if it was killed because time ran out or `stop` was set."""
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            start_new_session=True,  # a terminal's Ctrl-C is the caller's to handle
        ) as child,
    ):
        assert child.stdin is not None
        try:
            try:
                child.stdin.write(pickle.dumps(jobs))
                child.stdin.flush()  # and it stays open: its end is the child's
            except BrokenPipeError:  # the child's output says why
                with suppress(BrokenPipeError):
                    child.stdin.close()
            while child.poll() is None:
                if time.monotonic() >= until or stop.wait(0.05):
                    return ""
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)  # the assembler with it
        said.seek(0)
        return f"status {child.returncode}:\n{said.read().decode(errors='replace').strip()[-2000:]}"


def compiled(launch: Launch, arch: int) -> Any:
    """What Triton makes of a launch: its code in `asm`, what to launch it with in `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, values, aligned = signature(launch)
    # As launches have it, so that they find what is compiled here: they also list integers that nothing is known of,
    # and compile-time values, of which Triton 3.6 lists texts only.
    listed = {n for n in types if types[n] in ("i32", "i64") or isinstance(values.get(n), str)}
    if version_of(triton.__version__) >= (3, 7):
        listed |= set(values)
    aligned = {(i,): aligned.get((i,), []) for i, n in enumerate(types) if (i,) in aligned or n in listed}
    source = ASTSource(launch.kernel.jitted, types, values, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _content(r: Request) -> bytes:
    """Its reports, as JSON."""
    return json.dumps([asdict(_report(launch, r.op, r.arch)) for launch in launches(r)]).encode()


def _report(launch: Launch, op: str, arch: int) -> Report:
    import triton

    built = compiled(launch, arch)
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
        block_copies=counts[_BLOCK_COPY],
        specialized=counts[_HAND_OVER] > 0,
        instructions=sum(counts.values()),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        constants={name: value for name, value in launch.constants.items() if name.startswith("BLOCK")},
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _child(jobs: Iterable[tuple[Path, Job]]) -> None:
    for path, job in jobs:
        # Atomically: several processes may compile the same.
        aside = path.with_suffix(f".{os.getpid()}.partial")
        try:
            content = job()
        except Exception as error:  # whatever the compiler raises, the caller reports
            aside.write_text(f"{type(error).__name__}: {error}"[:2000], encoding="utf-8")
            aside.replace(path.with_suffix(".error"))
        else:
            aside.write_bytes(content)
            aside.replace(path)


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent's end of the pipe is closed, however that came about
    os.killpg(0, signal.SIGKILL)  # the assembler with it


if __name__ == "__main__":
    from latentrt.kernels import aot  # the module by its own name, so that pickled jobs are of its making

    wanted = pickle.load(sys.stdin.buffer)
    threading.Thread(target=aot._end_with_parent, daemon=True).start()
    aot._child(wanted)
