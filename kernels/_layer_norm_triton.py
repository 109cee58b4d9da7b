"""The Triton kernel of layer normalisation, and how it is launched: see `layer_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tuning
from ._triton import Launch, cdiv, kernel, tl

__all__ = ["plan", "plan_add"]


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
    grid = (cdiv(M, sizes["BLOCK_M"]),)
    launch = Launch(_layer_norm_kernel, grid, args, constants, sizes["num_warps"], sizes["num_stages"])
    return y, total, [launch]


def plan(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, arch: int) -> tuple[Tensor, list[Launch]]:
    """A fresh output, and the launch that fills it."""
    y, _, launches = _plan(x, None, weight, bias, eps, arch)
    return y, launches


def plan_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, arch: int
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Fresh outputs, the norm and the sum, and the launch that fills both."""
    y, total, launches = _plan(x, residual, weight, bias, eps, arch)
    assert total is not None
    return (y, total), launches
