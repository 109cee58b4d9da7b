"""The Triton kernels of the gated linear unit, and how they are launched: see `geglu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tuning
from ._check import fail
from ._triton import Descriptor, Launch, Library, cdiv, kernel, specializes_wide_sums, tl

__all__ = ["plan", "plan_linear"]


@kernel
def _gated(value, gate, HALF: tl.constexpr):
    """value * gelu(gate), float32, to be rounded to a HALF type or not: gelu(g) = g P(g), P the normal distribution.

    For half types by Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.2.17, which is 7.1.26 in
    other words: of x >= 0, with t = 1 / (1 + 0.2316419 x), P(-x) = exp(-x^2 / 2) (c1 t + ... + c5 t^5), to 7.5e-8. The
    c are the book's b / sqrt(2 pi), and 1 / (1 + y) is the square of an inverse root, as a division takes more
    instructions. gelu, computed so in float32, is off by up to 4.3e-7 (2.2e-7 for g < 0, where it is 0.17 at most): far
    below a half type's rounding, but several units in the last place of float32, which keeps erf.
    """
    if not HALF:
        return value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    t = tl.rsqrt(1.0 + 0.2316418882663604 * tl.abs(gate))
    t *= t
    tail = (((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
    tail *= t * tl.exp2(gate * gate * -0.7213475204444817)
    return value * (gate * tl.where(gate < 0.0, tail, 1.0 - tail))


@kernel
def _geglu_kernel(
    x_ptr,  # [M, 2N]
    y_ptr,  # [M, N]
    M,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    rows = (pid // BLOCKS_N).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    p_x = x_ptr + rows[:, None] * (2 * N) + cols[None, :]
    value = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_x + N, mask=mask, other=0.0).to(tl.float32)
    y = _gated(value, gate, y_ptr.dtype.element_ty != tl.float32)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def _tile(M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile this program computes, down and across.

    Programs that run together share rows of x and of the weight in L2: GROUP_M tiles down, then across.
    """
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * BLOCKS_N) * GROUP_M
    group = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    in_group = pid % (GROUP_M * BLOCKS_N)
    return first_m + in_group % group, in_group // group


@kernel
def _store_gated(
    both, bias_ptr, y_ptr, tile_m, tile_n, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What follows the matmul, values beside gates: biases, the gate, one rounding."""
    value, gate = tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        m_n = cols < N
        value += tl.load(bias_ptr + cols, mask=m_n, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + N + cols, mask=m_n, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    p_y = y_ptr + rows[:, None] * N + cols[None, :]
    y = _gated(value, gate, y_ptr.dtype.element_ty != tl.float32)
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def _linear_geglu_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [2, N, K]: the values' rows, then the gates'
    bias_ptr,  # [2N] or None
    y_ptr,  # [M, N]
    M,
    K,
    N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile's values and their gates are one matmul: its instructions are twice as wide as those of two would be.

    A thread holds values with their own gates, so that they part without an exchange.
    """
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    both = tl.arange(0, 2 * BLOCK_N)
    cols = tile_n * BLOCK_N + both % BLOCK_N
    k = tl.arange(0, BLOCK_K)
    # Beyond the edge the last row again: loads need no mask, and the store drops what comes of it.
    p_x = x_ptr + tl.minimum(rows, M - 1)[:, None] * K + k[None, :]
    weight_rows = tl.minimum(cols, N - 1).to(tl.int64) + both // BLOCK_N * N
    p_weight = weight_ptr + weight_rows[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_x + k0)
            b_weight = tl.load(p_weight + k0)
        else:
            m_k = k0 + k < K
            b_x = tl.load(p_x + k0, mask=m_k[None, :], other=0.0)
            b_weight = tl.load(p_weight + k0, mask=m_k[:, None], other=0.0)
        acc = tl.dot(b_x, b_weight, acc, input_precision="ieee")
    _store_gated(acc, bias_ptr, y_ptr, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)


@kernel
def _linear_geglu_tma_kernel(
    x,  # descriptor of [M, K]; the tensor's pointer where SPECIALIZE
    weight_desc,  # descriptor of [2, N, K]: the values' rows, then the gates'
    bias_ptr,  # [2N] or None
    y_ptr,  # [M, N]
    M,
    K,
    N: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As the one above, with blocks brought by the copy engine: see `_attention_tma` for what that asks and why."""
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if SPECIALIZE:
        x = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
        b_x = x.load([tile_m * BLOCK_M, k0])
        b_weight = weight_desc.load([0, tile_n * BLOCK_N, k0]).reshape(2 * BLOCK_N, BLOCK_K)
        acc = tl.dot(b_x, b_weight.T, acc)
    _store_gated(acc, bias_ptr, y_ptr, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)


def plan(x: Tensor, *, arch: int) -> tuple[Tensor, list[Launch]]:
    """A fresh output, and the launch that fills it."""
    x = x.contiguous()
    N = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, []
    M = y.numel() // N
    sizes = tuning.constants("geglu", arch, x.dtype, "any")
    blocks = {name: sizes[name] for name in ("BLOCK_M", "BLOCK_N")}
    grid = (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]),)
    args = {"x_ptr": x, "y_ptr": y, "M": M}
    return y, [Launch(_geglu_kernel, grid, args, {"N": N, **blocks}, sizes["num_warps"], sizes["num_stages"])]


def plan_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, arch: int
) -> tuple[Tensor, Sequence[Launch | Library]]:
    """A fresh output, and the steps that fill it."""
    x = x.contiguous()
    N, K = weight.shape[0] // 2, weight.shape[1]
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, []
    if N * K >= 2**31:
        raise fail("linear_geglu", "weight", "have fewer than 2^32 elements", f"shape {tuple(weight.shape)}")
    M = y.numel() // N
    unaligned = K % 16 != 0
    shape_class = "few" if M <= 512 or unaligned else "many"
    half = x.dtype in (torch.float16, torch.bfloat16)
    # A descriptor's rows and its beginning lie at multiples of 16 bytes. So does the beginning of a copy.
    aligned = all(t.data_ptr() % 16 == 0 or not t.is_contiguous() for t in (x, weight))
    describable = half and K > 0 and K % 8 == 0 and aligned
    row = tuning.choice("linear_geglu", arch, x.dtype, shape_class, descriptors=describable)
    if row is None:
        del y
        projected = torch.empty(*x.shape[:-1], 2 * N, dtype=x.dtype, device=x.device)
        out, launches = plan(projected, arch=arch)
        given = {"x": x.view(M, K), "weight": weight, "bias": bias, "out": projected.view(M, 2 * N)}
        return out, [Library("linear_geglu, projection", _project, given), *launches]
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    blocks, warps, stages = dict(row.blocks), row.warps, row.stages
    if unaligned:  # loaded by single elements, through registers: larger tiles spill
        blocks["BLOCK_K"] = min(blocks["BLOCK_K"], 32)
    grid = (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]),)
    args: dict[str, Any] = {"bias_ptr": bias, "y_ptr": y, "M": M, "K": K}
    if row.tma:
        specialize = row.specialize and specializes_wide_sums(arch)
        x = x.view(M, K)
        rows = Descriptor(x, (blocks["BLOCK_M"], blocks["BLOCK_K"]))
        weights = Descriptor(weight.view(2, N, K), (2, blocks["BLOCK_N"], blocks["BLOCK_K"]))
        args |= {"x": x if specialize else rows, "weight_desc": weights}
        constants = {"N": N, "SPECIALIZE": specialize, **blocks}
        return y, [Launch(_linear_geglu_tma_kernel, grid, args, constants, warps, stages, scratch=specialize)]
    args |= {"x_ptr": x, "weight_ptr": weight}
    constants = {"N": N, "EVEN_K": K % blocks["BLOCK_K"] == 0, **blocks}
    return y, [Launch(_linear_geglu_kernel, grid, args, constants, warps, stages)]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, of two dimensions each but the bias."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)
