"""Layer normalisation, alone and after a residual addition.

    y = (x - mean) / sqrt(variance + eps) * weight + bias

with mean and (biased) variance over the last dimension.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._check import fail, require_dtypes, require_eps, require_equal, require_rank
from ._dispatch import arch_of, launches_triton, uses_custom_op
from ._layer_norm_triton import plan, plan_add
from ._triton import run
from .registry import Case, OpSpec, register

__all__ = ["add_layer_norm", "layer_norm"]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: [..., D], any strides.
        weight, bias: [D], of x's dtype and device.
        eps: added to the variance.

    Returns:
        x's shape and dtype. Statistics of half types are taken in float32.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    require_dtypes("layer_norm", {"x": x, "weight": weight, "bias": bias})
    _check("layer_norm", x, weight, bias, eps)
    if uses_custom_op(x):
        out: Tensor = torch.ops.latentrt.layer_norm(x, weight, bias, eps)
        return out
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add, then normalise: what stands between two branches of a transformer block.

    Args:
        x, residual: [..., D], of one shape, dtype and device.
        weight, bias: [D].
        eps: added to the variance.

    Returns:
        (layer_norm(x + residual), x + residual), both of x's shape and dtype. The norm is taken of the sum
        as rounded to that dtype, so the two belong together.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    require_dtypes("add_layer_norm", {"x": x, "residual": residual, "weight": weight, "bias": bias})
    _check("add_layer_norm", x, weight, bias, eps)
    if residual.ndim != x.ndim:
        raise fail("add_layer_norm", "residual", f"have x's rank {x.ndim}", f"shape {tuple(residual.shape)}")
    for dim in range(x.ndim):
        require_equal(
            "add_layer_norm", "residual", f"have x's dimension {dim},", residual.shape[dim], x.shape[dim]
        )
    if uses_custom_op(x):
        normed, total = torch.ops.latentrt.add_layer_norm(x, residual, weight, bias, eps)
        return normed, total
    return reference.add_layer_norm(x, residual, weight, bias, eps)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    if x.ndim < 1:
        raise fail(op, "x", "be [..., D]", f"shape {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_rank(op, name, tensor, "[D]")
        require_equal(op, name, "have x's last dimension", tensor.shape[0], x.shape[-1])
    require_eps(op, eps)


@torch.library.custom_op("latentrt::layer_norm", mutates_args=())
def _norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if not launches_triton(x):
        return reference.layer_norm(x, weight, bias, eps).contiguous()
    y, launches = plan(x, weight, bias, eps, arch=arch_of(x.device))
    run(launches)
    return y


@_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("latentrt::add_layer_norm", mutates_args=())
def _add_op(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not launches_triton(x):
        normed, total = reference.add_layer_norm(x, residual, weight, bias, eps)
        return normed.contiguous(), total.contiguous()
    both, launches = plan_add(x, residual, weight, bias, eps, arch=arch_of(x.device))
    run(launches)
    return both


@_add_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_CANDIDATES = [
    {"MOST_D": 8192, "BLOCK_M": m, "num_warps": w, "num_stages": 1} for m in (1, 2, 4) for w in (1, 2, 4, 8)
]


def _add_then_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total


def _inputs(M: int, D: int, tensors: int) -> Callable[[torch.dtype, torch.device], tuple[Any, ...]]:
    def draw(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        drawn = [torch.randn(2, M, D, dtype=dtype, device=device) for _ in range(tensors)]
        return (*drawn, *(torch.randn(D, dtype=dtype, device=device) for _ in range(2)), 1e-5)

    return draw


# With guidance, at 1024x1024. Of a transformer block's three norms two follow a residual addition.
register(
    OpSpec(
        name="layer_norm",
        op=layer_norm,
        reference=reference.layer_norm,
        plan=plan,
        cases=[
            Case("4096 x 640", _inputs(4096, 640, 1), flops=0, elements=2 * 2 * 4096 * 640, calls=5),
            Case("1024 x 1280", _inputs(1024, 1280, 1), flops=0, elements=2 * 2 * 1024 * 1280, calls=6),
        ],
        limit="copy",
        candidates={"layer_norm": _CANDIDATES},
        baselines={"F.layer_norm": lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps)},
    )
)
register(
    OpSpec(
        name="add_layer_norm",
        op=add_layer_norm,
        reference=reference.add_layer_norm,
        plan=plan_add,
        cases=[
            Case("4096 x 640", _inputs(4096, 640, 2), flops=0, elements=4 * 2 * 4096 * 640, calls=25),
            Case("1024 x 1280", _inputs(1024, 1280, 2), flops=0, elements=4 * 2 * 1024 * 1280, calls=174),
        ],
        limit="copy",
        candidates={"layer_norm": _CANDIDATES},
        baselines={"add + F.layer_norm": _add_then_norm},
    )
)
