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

from . import reference, tuning
from ._check import fail, require_dtypes, require_eps, require_equal, require_rank
from ._triton import Launch, arch_of, kernel, run, takes, tl, usable
from .registry import Case, OpSpec, register

__all__ = ["add_layer_norm", "layer_norm"]


@kernel
def _load_rows(x_ptr, residual_ptr, at, mask):
    """x in float32, or x + residual as rounded to their dtype."""
    b_x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        b_x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        b_x = b_x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return b_x


@kernel
def _layer_norm_kernel(
    x_ptr,  # [M, D]
    residual_ptr,  # [M, D] or None
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    y_ptr,  # [M, D]
    total_ptr,  # [M, D], or None without residual
    M,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    at = rows[:, None] * D + cols[None, :]
    m_row = (rows < M)[:, None]

    # Two passes. Deviations from the rounded mean sum to what rounding took from it: that corrects both.
    if D <= BLOCK_D:  # a row stays in registers
        mask = m_row & (cols < D)[None, :]
        b_x = _load_rows(x_ptr, residual_ptr, at, mask)
        mean = tl.sum(b_x, 1) / D
        d = tl.where(mask, b_x - mean[:, None], 0.0)
        correction = tl.sum(d, 1) / D
        variance = tl.sum(d * d, 1) / D - correction * correction
    else:
        mean = tl.zeros((BLOCK_M,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            mask = m_row & (d0 + cols < D)[None, :]
            mean += tl.sum(_load_rows(x_ptr, residual_ptr, at + d0, mask), 1)
        mean /= D
        correction = tl.zeros((BLOCK_M,), tl.float32)
        variance = tl.zeros((BLOCK_M,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            mask = m_row & (d0 + cols < D)[None, :]
            d = tl.where(mask, _load_rows(x_ptr, residual_ptr, at + d0, mask) - mean[:, None], 0.0)
            correction += tl.sum(d, 1)
            variance += tl.sum(d * d, 1)
        correction /= D
        variance = variance / D - correction * correction
    rstd = 1.0 / tl.sqrt(variance + eps)

    for d0 in range(0, D, BLOCK_D):
        m_d = d0 + cols < D
        mask = m_row & m_d[None, :]
        if D > BLOCK_D:
            b_x = _load_rows(x_ptr, residual_ptr, at + d0, mask)
        b_weight = tl.load(weight_ptr + d0 + cols, mask=m_d, other=0.0).to(tl.float32)
        b_bias = tl.load(bias_ptr + d0 + cols, mask=m_d, other=0.0).to(tl.float32)
        d = (b_x - mean[:, None]) - correction[:, None]
        y = d * rstd[:, None] * b_weight[None, :] + b_bias[None, :]
        tl.store(y_ptr + at + d0, y.to(y_ptr.dtype.element_ty), mask=mask)
        if total_ptr is not None:
            tl.store(total_ptr + at + d0, b_x.to(total_ptr.dtype.element_ty), mask=mask)


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
    if takes(x):
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
    if takes(x):
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


def _plan(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, arch: int
) -> tuple[Tensor, Tensor | None, list[Launch]]:
    x = x.contiguous()
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, total, []
    D = x.shape[-1]
    M = x.numel() // D
    sizes = tuning.constants("layer_norm", arch, x.dtype, "narrow" if D <= 1024 else "wide")
    block_d = min(1 << (D - 1).bit_length(), sizes["MOST_D"])
    args = {
        "x_ptr": x,
        "residual_ptr": None if residual is None else residual.contiguous(),
        "weight_ptr": weight.contiguous(),
        "bias_ptr": bias.contiguous(),
        "y_ptr": y,
        "total_ptr": total,
        "M": M,
        "eps": eps,
    }
    constants = {"D": D, "BLOCK_M": sizes["BLOCK_M"], "BLOCK_D": block_d}
    grid = (-(-M // sizes["BLOCK_M"]),)
    launch = Launch(_layer_norm_kernel, grid, args, constants, sizes["num_warps"], sizes["num_stages"])
    return y, total, [launch]


def _plan_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, arch: int
) -> tuple[Tensor, list[Launch]]:
    y, _, launches = _plan(x, None, weight, bias, eps, arch)
    return y, launches


def _plan_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, arch: int
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    y, total, launches = _plan(x, residual, weight, bias, eps, arch)
    assert total is not None
    return (y, total), launches


@torch.library.custom_op("latentrt::layer_norm", mutates_args=())
def _norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if not usable(x):
        return reference.layer_norm(x, weight, bias, eps).contiguous()
    y, launches = _plan_norm(x, weight, bias, eps, arch=arch_of(x.device))
    run(launches)
    return y


@_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("latentrt::add_layer_norm", mutates_args=())
def _add_op(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not usable(x):
        normed, total = reference.add_layer_norm(x, residual, weight, bias, eps)
        return normed.contiguous(), total.contiguous()
    both, launches = _plan_add(x, residual, weight, bias, eps, arch=arch_of(x.device))
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
        plan=_plan_norm,
        cases=[
            Case("4096 x 640", _inputs(4096, 640, 1), flops=0, elements=2 * 2 * 4096 * 640, calls=5),
            Case("1024 x 1280", _inputs(1024, 1280, 1), flops=0, elements=2 * 2 * 1024 * 1280, calls=6),
        ],
        limit="copy",
        candidates={"layer_norm": _CANDIDATES},
        rivals={"F.layer_norm": lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps)},
    )
)
register(
    OpSpec(
        name="add_layer_norm",
        op=add_layer_norm,
        reference=reference.add_layer_norm,
        plan=_plan_add,
        cases=[
            Case("4096 x 640", _inputs(4096, 640, 2), flops=0, elements=4 * 2 * 4096 * 640, calls=25),
            Case("1024 x 1280", _inputs(1024, 1280, 2), flops=0, elements=4 * 2 * 1024 * 1280, calls=174),
        ],
        limit="copy",
        candidates={"layer_norm": _CANDIDATES},
        rivals={"add + F.layer_norm": _add_then_norm},
    )
)
