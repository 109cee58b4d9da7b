"""How kernels are built lazily, launched and counted.

Importing `latentrt.kernels` neither needs nor imports Triton; a kernel is built when it is first launched or
compiled. Every operator plans its work as a list of `Launch`: a GPU, Triton's interpreter in the tests and `aot`, which
compiles without a GPU, all run the same plan.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ._dispatch import unavailable, version_of

__all__ = [
    "Descriptor",
    "Kernel",
    "Launch",
    "Library",
    "cdiv",
    "counted",
    "kernel",
    "of_library",
    "round_up",
    "run",
    "specializes_wide_sums",
    "tl",
]

tl: Any = None
"""Stands for `triton.language` in the source of kernels; `Kernel` puts the module in its place."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The least multiple of b that is not below a."""
    return cdiv(a, b) * b


class Kernel:
    """A Triton function, built at first use. It may call `tl` and other kernels that its module names."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.name = function.__name__

    @cached_property
    def jitted(self) -> Any:
        """What `triton.jit` makes of it: compiled, or interpreted where TRITON_INTERPRET is set."""
        import triton
        import triton.language

        if triton.knobs.runtime.interpret:
            _mend_interpreter()
        scope = dict(self.function.__globals__)
        for name, value in scope.items():
            if value is self:
                continue
            if isinstance(value, Kernel) and name in self.function.__code__.co_names:
                scope[name] = value.jitted
        scope["tl"] = triton.language
        copy = FunctionType(self.function.__code__, scope, self.name)
        for attribute in ("__module__", "__qualname__", "__doc__", "__annotations__", "__defaults__"):
            setattr(copy, attribute, getattr(self.function, attribute))
        return triton.jit(copy)

    def __repr__(self) -> str:
        return f"Kernel({self.function.__module__}.{self.name})"


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a Triton kernel, or a function that kernels call. A `Kernel`, but callable to a type checker."""
    if not isinstance(function, FunctionType):
        raise TypeError(f"a kernel is a plain function, not {function!r}")
    return Kernel(function)


@cache
def _mend_interpreter() -> None:
    """Patch what Triton's interpreter lacks: bfloat16 matmuls, and in 3.6 loops with NumPy 2.4."""
    import numpy as np
    import triton
    from triton import language
    from triton.runtime import interpreter

    # bfloat16 is held as its bits, and tl.dot multiplies those (3.9): widen them first.
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != language.bfloat16 or x.data.dtype != np.uint16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot

    # Before 3.7 it takes int() of arrays of one element, which NumPy 2.4 refuses.
    if version_of(triton.__version__) < (3, 7):
        patch_tensor = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched


@dataclass(frozen=True)
class Descriptor:
    """A tensor that a kernel loads in whole blocks: on the GPU a tensor map for the copy engine (TMA)."""

    base: Tensor
    """Its last dimension is contiguous; its other strides and its address are multiples of 16 bytes."""
    block: tuple[int, ...]
    """A block's size in each dimension of `base`."""


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid and everything it is called with."""

    kernel: Kernel
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    """Arguments by parameter: tensors (on the meta device to compile only), descriptors, int, float, None."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """The kernel's `tl.constexpr` parameters."""
    num_warps: int = 4
    num_stages: int = 1
    scratch: bool = False
    """Whether the kernel needs global scratch memory, as one that makes descriptors does."""

    @property
    def label(self) -> str:
        """Its name in `counted`."""
        return self.kernel.name


@dataclass(frozen=True)
class Library:
    """A step run by PyTorch's libraries, where the tuned data choose them."""

    name: str
    call: Callable[..., Tensor | None]
    """Called with `args`: fills tensors among them, or returns the result that the plan left to it."""
    args: Mapping[str, Any]
    """By parameter; scratch is among them, so that it is seen when memory is counted."""

    @property
    def label(self) -> str:
        """Its name in `counted`, which no kernel has."""
        return f"{_OF_LIBRARY}{self.name}"


_OF_LIBRARY = "library: "


def of_library(label: str) -> bool:
    """Whether what was counted as `label` is a library's step."""
    return label.startswith(_OF_LIBRARY)


_counts: list[Counter[str]] = []


def run(steps: Iterable[Launch | Library], out: Any = None) -> Any:
    """Run a plan's steps on the tensors' device. Kernels on CPU tensors need Triton's interpreter.

    Returns:
        `out`, the plan's results; or what a library's step returned in their place.

    Raises:
        BackendUnavailableError: Triton cannot run on the tensors' device.
    """
    for step in steps:
        if isinstance(step, Launch):
            _launch(step)
            continue
        for counts in _counts:
            counts[step.label] += 1
        made = step.call(**step.args)
        out = out if made is None else made
    return out


_LAUNCHING = threading.RLock()
"""Triton compiles and loads kernels as they are launched, for one thread at a time only."""

_loaded: set[Any] = set()
"""Every compiled kernel that was launched. Captured graphs know its machine code by address, and Triton unloads it with
the last reference."""


def _launch(launch: Launch) -> None:
    if 0 in launch.grid:
        return
    device = next(a.device for a in launch.args.values() if isinstance(a, Tensor))
    reason = unavailable(device)
    if reason:
        raise BackendUnavailableError(f"the Triton kernel {launch.kernel.name} cannot run: {reason}")
    for counts in _counts:
        counts[launch.label] += 1
    with _LAUNCHING, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        call = partial(
            launch.kernel.jitted[launch.grid],
            **{name: _described(value) for name, value in launch.args.items()},
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,  # whose default changed between Triton versions
        )
        # The caller's allocator stays the caller's.
        compiled = copy_context().run(_with_scratch, device, call) if launch.scratch else call()
        _loaded.add(compiled)


def _described(value: Any) -> Any:
    if not isinstance(value, Descriptor):
        return value
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(value.base, list(value.block))


def _with_scratch(device: torch.device, call: Callable[[], Any]) -> Any:
    """Triton's scratch comes from PyTorch's allocator, which orders it by stream and keeps it for captured graphs."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    return call()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the steps that run meanwhile, by kernel or by `library: NAME`: a test's proof that nothing fell back."""
    counts: Counter[str] = Counter()
    _counts.append(counts)
    try:
        yield counts
    finally:
        # By identity: counters compare by value.
        _counts[:] = [c for c in _counts if c is not counts]


@cache
def specializes_wide_sums(arch: int) -> bool:
    """Whether Triton specialises warps in a kernel whose one accumulator is split in two: on sm_90 since 3.7."""
    try:
        import triton
    except ImportError:
        return True  # nothing is compiled
    return arch != 90 or version_of(triton.__version__) >= (3, 7)
