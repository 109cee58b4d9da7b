"""Which path an operator takes, and whether Triton can run there.

| tensors | custom op (`uses_custom_op`) | runs (`launches_triton`) |
| --- | --- | --- |
| on CUDA | yes | the Triton kernel; the reference for float64, or where Triton cannot run |
| elsewhere | no | the reference |
| elsewhere, `forced` | yes | the Triton kernel, in the interpreter; the reference for float64 |
| elsewhere, `as_nodes` | yes, so that tracing sees one node | the reference |
| anywhere, `by_reference` | no | the reference |
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from ..errors import BackendUnavailableError

__all__ = [
    "arch_of",
    "as_nodes",
    "by_reference",
    "forced",
    "launches_triton",
    "unavailable",
    "uses_custom_op",
    "version_of",
]

_log = logging.getLogger(__name__)

OLDEST_ARCH = 80
"""Older GPUs lack bfloat16 tensor cores and asynchronous copies, and the kernels were never compiled for them."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels are written for."""

_forced = ContextVar("forced", default=False)
_as_nodes = ContextVar("as_nodes", default=False)
_by_reference = ContextVar("by_reference", default=False)


@contextmanager
def _switched_on(switch: ContextVar[bool]) -> Iterator[None]:
    token = switch.set(True)
    try:
        yield
    finally:
        switch.reset(token)


def forced() -> AbstractContextManager[None]:
    """In this thread, operators on CPU tensors launch their Triton kernels too, in Triton's interpreter."""
    return _switched_on(_forced)


def as_nodes() -> AbstractContextManager[None]:
    """In this thread, operators are their custom ops on every device: tracing sees one node for each."""
    return _switched_on(_as_nodes)


def by_reference() -> AbstractContextManager[None]:
    """In this thread, operators are their PyTorch references on every device: none of the project's kernels runs."""
    return _switched_on(_by_reference)


def uses_custom_op(x: Tensor) -> bool:
    """Whether an operator on `x` goes through its custom op. On the CPU calling the reference directly is quicker; that
    is logged once."""
    if _by_reference.get():
        return False
    if x.is_cuda or _forced.get() or _as_nodes.get():
        return True
    if not torch.compiler.is_compiling():
        _say_once(f"operators on the {x.device.type} run their PyTorch references", logging.INFO)
    return False


def launches_triton(x: Tensor) -> bool:
    """Whether a custom op on `x` launches Triton rather than its reference. Logged once if Triton cannot run on CUDA.

    Raises:
        BackendUnavailableError: Triton cannot run, and `forced` asks for it.
    """
    if x.dtype not in _DTYPES or not (x.is_cuda or _forced.get()):
        return False
    reason = unavailable(x.device)
    if reason:
        if _forced.get():
            raise BackendUnavailableError(
                f"Triton kernels were asked for on the {x.device.type}, but {reason}"
            )
        _say_once(f"operators on the GPU run their PyTorch references: {reason}")
    return not reason


@cache
def _say_once(message: str, level: int = logging.WARNING) -> None:
    _log.log(level, message)


def unavailable(device: torch.device) -> str:
    """Why Triton cannot run on `device`; empty where it can."""
    reason = _triton_missing()
    if reason:
        return reason
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels are written for NVIDIA GPUs"
        arch = arch_of(device)
        return f"sm_{arch} is older than sm_{OLDEST_ARCH}" if arch < OLDEST_ARCH else ""
    if device.type == "cpu":
        from triton import knobs

        return "" if knobs.runtime.interpret else "TRITON_INTERPRET was not set when Triton was imported"
    return f"Triton does not run on the {device.type}"


@cache
def _triton_missing() -> str:
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'latentrt[triton]'"
    if version_of(triton.__version__) < (3, 6):
        return f"Triton {triton.__version__} is older than 3.6; pip install 'latentrt[triton]'"
    return ""


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch_of(device: torch.device) -> int:
    """90 for sm_90; the oldest supported for the CPU (the interpreter) and for meta tensors."""
    if device.type != "cuda":
        return OLDEST_ARCH
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def version_of(text: str) -> tuple[int, ...]:
    """(3, 9) of `3.9.0`."""
    return tuple(int(part) for part in text.split(".")[:2])
