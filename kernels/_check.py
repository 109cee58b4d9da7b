"""Argument checks shared by the operators' public wrappers.

Symbolic sizes (while a graph is exported with dynamic dimensions) are left alone: comparing would pin them
to the example's values. Ranks, dtypes, devices and fixed sizes are always checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..errors import KernelArgumentError

__all__ = [
    "FLOATS",
    "fail",
    "require_dtypes",
    "require_eps",
    "require_equal",
    "require_multiple",
    "require_own_memory",
    "require_rank",
    "require_tensors",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(op: str, argument: str, need: str, got: object) -> KernelArgumentError:
    """The error to raise: which operator, which argument, what it needs and what it got."""
    return KernelArgumentError(f"{op}: {argument} must {need}, got {got}")


def require_tensors(
    op: str, tensors: Mapping[str, object], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """All must be dense tensors; only those that are `optional` may be None. Returns those that are given."""
    given = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            if tensor.layout != torch.strided or tensor.is_nested:
                kind = "a nested tensor" if tensor.is_nested else tensor.layout
                raise fail(op, name, "be dense, with strides", kind)
            given[name] = tensor
        elif tensor is not None or name not in optional:
            raise fail(op, name, "be a torch.Tensor", type(tensor).__name__)
    return given


def require_dtypes(op: str, tensors: Mapping[str, Tensor | None], optional: Collection[str] = ()) -> None:
    """All tensors that are given must be floating point and have the first one's dtype and device."""
    first = ""
    for name, tensor in require_tensors(op, tensors, optional).items():
        if not first:
            first, dtype, device = name, tensor.dtype, tensor.device
            if dtype not in FLOATS:
                raise fail(op, name, "be float16, bfloat16, float32 or float64", dtype)
        elif tensor.dtype != dtype:
            raise fail(op, name, f"have {first}'s dtype {dtype}", tensor.dtype)
        elif tensor.device != device:
            raise fail(op, name, f"be on {first}'s device {device}", tensor.device)


def require_rank(op: str, argument: str, tensor: Tensor, layout: str) -> None:
    """`layout` names the dimensions, such as `[B, S, H, D]`."""
    if tensor.ndim != layout.count(",") + 1:
        raise fail(op, argument, f"be {layout}", f"shape {tuple(tensor.shape)}")


def require_equal(op: str, argument: str, need: str, got: int, want: int) -> None:
    """`got` must be `want`, unless either is symbolic."""
    if isinstance(got, int) and isinstance(want, int) and got != want:
        raise fail(op, argument, f"{need} {want}", got)


def require_multiple(op: str, argument: str, what: str, got: int, of: int) -> None:
    """`got` must be a positive multiple of `of`, unless it is symbolic."""
    if not isinstance(of, int) or isinstance(of, bool):
        raise fail(op, argument, "be an int", repr(of))
    if of < 1:
        raise fail(op, argument, "be at least 1", of)
    if isinstance(got, int) and (got < of or got % of != 0):
        raise fail(op, argument, f"divide {what} {got}", of)


def require_own_memory(op: str, argument: str, tensor: Tensor) -> None:
    """A tensor that is written must not have two elements at one address."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach and tensor.numel():
            need = "have each element in a place of its own"
            raise fail(op, argument, need, f"shape {tuple(tensor.shape)} with strides {tensor.stride()}")
        reach += stride * max(size - 1, 0)


def require_eps(op: str, eps: float) -> None:
    """`eps`, which a norm adds to the variance, must be 0 or more."""
    if not (isinstance(eps, int | float) and eps >= 0):
        raise fail(op, "eps", "be zero or more", repr(eps))
