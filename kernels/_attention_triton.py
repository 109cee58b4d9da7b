"""The Triton kernels of attention, and how they are launched: see `attention`.

They keep a running maximum m and sum l of each query's scores and rescale what they have summed when m grows, so
that no [Sq, Sk] buffer exists: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018),
algorithm 3; Dao, "FlashAttention-2" (2023), algorithm 1. Exponentials are base 2, log2(e) being part of the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tuning
from ._attention_library import by_matmul, by_sdpa
from ._attention_softmax import log2_scale, softmax_start, softmax_step
from ._attention_tma import describable, launch
from ._triton import Launch, Library, cdiv, kernel, round_up, tl

__all__ = ["SHORT", "WIDE", "plan", "plan_kernel", "tuning_key"]

WIDE = 256
"""Heads of more columns than this are split."""
_HEADS = (40, 64, 80, 128, 160, WIDE)
SHORT = 128
"""At most this many keys is a shape class of its own: a text's 77."""
LONG = 2048
"""More than this many is one for SDXL's heads of 64, of which 4,096 tokens fill a GPU many times over, and 1,024 hardly
twice."""


@kernel
def _attention(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    o_ptr,  # [B, Sq, H, D], contiguous
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    H,
    Sq,
    Sk,
    scale,  # of the scores, times log2(e); positive
    D: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,  # whether the true scale is negative
    PRECISION: tl.constexpr,
    ALIGNED_TO_8: tl.constexpr,  # whether strides of batches, rows and heads are multiples of eight
    BLOCK_D: tl.constexpr,  # a head is split into BLOCK_D and BLOCK_E columns: 80 is 64 + 16, not a padded 128
    BLOCK_E: tl.constexpr,  # 0 if BLOCK_D covers the head; else BLOCK_D + BLOCK_E == D
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    first = (pid % blocks) * BLOCK_M
    b = (pid // blocks // H).to(tl.int64)
    h = (pid // blocks % H).to(tl.int64)
    # Triton itself detects multiples of 16 only: heads of 40 would be loaded element by element.
    if ALIGNED_TO_8:
        stride_qb, stride_qs, stride_qh = stride_qb // 8 * 8, stride_qs // 8 * 8, stride_qh // 8 * 8
        stride_kb, stride_ks, stride_kh = stride_kb // 8 * 8, stride_ks // 8 * 8, stride_kh // 8 * 8
        stride_vb, stride_vs, stride_vh = stride_vb // 8 * 8, stride_vs // 8 * 8, stride_vh // 8 * 8

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = BLOCK_D + tl.arange(0, BLOCK_E if BLOCK_E > 0 else 16)
    m_m = first + m < Sq
    m_d = d < D

    p_q = q_ptr + b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qs + m[:, None] * stride_qs
    p_k = k_ptr + b * stride_kb + h * stride_kh + n[None, :] * stride_ks
    p_v = v_ptr + b * stride_vb + h * stride_vh + n[:, None] * stride_vs

    b_q = tl.load(p_q + d[None, :] * stride_qd, mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BLOCK_E > 0:
        b_q_e = tl.load(p_q + e[None, :] * stride_qd, mask=m_m[:, None], other=0.0)
        b_acc_e = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    b_max, b_sum = softmax_start(BLOCK_M)

    full = Sk // BLOCK_N * BLOCK_N
    for TAIL in tl.static_range(2):  # whole blocks of keys, then the remainder
        for start in tl.range(full * TAIL, full + (Sk - full) * TAIL, BLOCK_N):
            m_n = start + n < Sk
            if TAIL == 0:
                if BLOCK_D > D:
                    b_k = tl.load(p_k + d[:, None] * stride_kd, mask=m_d[:, None], other=0.0)
                else:
                    b_k = tl.load(p_k + d[:, None] * stride_kd)
            else:
                b_k = tl.load(p_k + d[:, None] * stride_kd, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
            if BLOCK_E > 0:
                if TAIL == 0:
                    b_k_e = tl.load(p_k + e[:, None] * stride_kd)
                else:
                    b_k_e = tl.load(p_k + e[:, None] * stride_kd, mask=m_n[None, :], other=0.0)
                b_s = tl.dot(b_q_e, b_k_e, b_s, input_precision=PRECISION)
            if NEGATIVE_SCALE:
                b_s = -b_s
            if TAIL == 1:
                b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_p, b_alpha, b_max, b_sum = softmax_step(b_s, b_max, b_sum, scale)
            b_p = b_p.to(v_ptr.dtype.element_ty)

            if TAIL == 0:
                if BLOCK_D > D:
                    b_v = tl.load(p_v + d[None, :] * stride_vd, mask=m_d[None, :], other=0.0)
                else:
                    b_v = tl.load(p_v + d[None, :] * stride_vd)
            else:
                b_v = tl.load(p_v + d[None, :] * stride_vd, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_acc = tl.dot(b_p, b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
            if BLOCK_E > 0:
                if TAIL == 0:
                    b_v_e = tl.load(p_v + e[None, :] * stride_vd)
                else:
                    b_v_e = tl.load(p_v + e[None, :] * stride_vd, mask=m_n[:, None], other=0.0)
                b_acc_e = tl.dot(b_p, b_v_e, b_acc_e * b_alpha[:, None], input_precision=PRECISION)

            p_k += BLOCK_N * stride_ks
            p_v += BLOCK_N * stride_vs

    p_o = o_ptr + ((b * Sq + first) * H + h) * D + m[:, None].to(tl.int64) * (H * D)
    b_o = (b_acc / b_sum[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(p_o + d[None, :], b_o, mask=m_m[:, None] & m_d[None, :])
    if BLOCK_E > 0:
        b_o = (b_acc_e / b_sum[:, None]).to(o_ptr.dtype.element_ty)
        tl.store(p_o + e[None, :], b_o, mask=m_m[:, None])


@kernel
def _attention_wide(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    o_ptr,  # [B, Sq, H, D], contiguous
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    H,
    Sq,
    Sk,
    scale,
    D: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of q and k multiplied at a time
    BLOCK_V: tl.constexpr,  # columns of v, and of the output, of one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries and BLOCK_V output columns of one head that is too wide for one tile."""
    slices = tl.cdiv(D, BLOCK_V)
    blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    columns = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    pid = pid // slices
    first = (pid % blocks) * BLOCK_M
    b = (pid // blocks // H).to(tl.int64)
    h = (pid // blocks % H).to(tl.int64)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    m_m = first + m < Sq
    m_v = columns < D

    p_q = q_ptr + b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qs + m[:, None] * stride_qs
    p_k = k_ptr + b * stride_kb + h * stride_kh + n[None, :] * stride_ks
    p_v = v_ptr + b * stride_vb + h * stride_vh + n[:, None] * stride_vs + columns[None, :] * stride_vd

    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    b_max, b_sum = softmax_start(BLOCK_M)
    for start in tl.range(0, Sk, BLOCK_N):
        m_n = start + n < Sk
        b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c in tl.static_range(0, D, BLOCK_D):
            m_d = c + d < D
            b_q = tl.load(p_q + (c + d)[None, :] * stride_qd, mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_k = tl.load(p_k + (c + d)[:, None] * stride_kd, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
        if NEGATIVE_SCALE:
            b_s = -b_s
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_p, b_alpha, b_max, b_sum = softmax_step(b_s, b_max, b_sum, scale)
        b_v = tl.load(p_v, mask=m_n[:, None] & m_v[None, :], other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
        p_k += BLOCK_N * stride_ks
        p_v += BLOCK_N * stride_vs

    p_o = o_ptr + ((b * Sq + first) * H + h) * D + m[:, None].to(tl.int64) * (H * D) + columns[None, :]
    tl.store(p_o, (b_acc / b_sum[:, None]).to(o_ptr.dtype.element_ty), mask=m_m[:, None] & m_v[None, :])


def plan(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, arch: int
) -> tuple[Tensor, Sequence[Launch | Library]]:
    """A fresh output, and the steps that fill it: a kernel's launch, by TMA where the data of `arch` say so and the
    tensors allow, or PyTorch's libraries where the data choose them."""
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), []
    D = q.shape[3]
    row = tuning.choice(*tuning_key(q, k, arch), descriptors=describable(q, k, v))
    if row is None:
        return (by_matmul if D > WIDE else by_sdpa)(q, k, v, scale)
    # Offsets within a block are 32-bit.
    reach = max(row.blocks["BLOCK_M"], row.blocks["BLOCK_N"], 2 * D)
    q, k, v = (t.contiguous() if max(t.stride(1), t.stride(3)) * reach >= 2**31 else t for t in (q, k, v))
    if not row.tma and q.dtype != torch.float32:
        q, k, v = (_aligned(t) for t in (q, k, v))
    return plan_kernel(q, k, v, scale, row)


def plan_kernel(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, row: tuning.Row
) -> tuple[Tensor, list[Launch]]:
    """A fresh output, and the launch that fills it from these very tensors: a plugin can copy none."""
    B, Sq, H, D = q.shape
    Sk = k.shape[1]
    out = torch.empty((B, Sq, H, D), dtype=q.dtype, device=q.device)
    if scale is None:
        scale = D**-0.5
    if row.tma:
        return out, [launch(q, k, v, out, scale, row)]

    args: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "o_ptr": out, "H": H, "Sq": Sq, "Sk": Sk}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        for dim, stride in zip("bshd", tensor.stride(), strict=True):
            args[f"stride_{name}{dim}"] = stride
    args["scale"] = log2_scale(scale)
    # TF32 would drop thirteen of float32's bits.
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    constants = {"D": D, "NEGATIVE_SCALE": scale < 0, "PRECISION": precision, **row.blocks}
    programs = B * H * cdiv(Sq, row.blocks["BLOCK_M"])
    if D > WIDE:
        programs *= cdiv(D, row.blocks["BLOCK_V"])
        return out, [Launch(_attention_wide, (programs,), args, constants, row.warps, row.stages)]
    constants["BLOCK_D"], constants["BLOCK_E"] = _split_head(D)
    constants["ALIGNED_TO_8"] = all(_is_aligned_to_8(t) for t in (q, k, v))
    return out, [Launch(_attention, (programs,), args, constants, row.warps, row.stages)]


def tuning_key(q: Tensor, k: Tensor, arch: int) -> tuple[str, int, torch.dtype, str]:
    """By what such heads are found in the tuned data: table, architecture, dtype and shape class."""
    D = q.shape[3]
    return "attention_wide" if D > WIDE else "attention", arch, q.dtype, _shape_class(D, k.shape[1])


def _is_aligned_to_8(t: Tensor) -> bool:
    """Whether every row of this [B, S, H, D] begins a multiple of eight elements after the first."""
    return all(size == 1 or stride % 8 == 0 for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True))


def _aligned(t: Tensor) -> Tensor:
    """t itself if laid out as by a projection; else a copy whose rows begin at multiples of eight elements. Other rows,
    or columns that are not contiguous, would be loaded element by element through registers, which spill."""
    if _is_aligned_to_8(t) and t.stride(3) == 1:
        return t
    *size, D = t.shape
    return torch.empty((*size, round_up(D, 8)), dtype=t.dtype, device=t.device)[..., :D].copy_(t)


def _shape_class(D: int, Sk: int) -> str:
    width = next((f"d{size}" for size in _HEADS if size >= D), "any")
    if Sk <= SHORT:
        return f"{width}-short"
    return "d64-long" if width == "d64" and Sk > LONG else width


def _split_head(D: int) -> tuple[int, int]:
    """Two powers of two whose sum is D; or the next power of two, which is masked beyond D, and 0."""
    whole = max(16, 1 << (D - 1).bit_length())
    rest = D - whole // 2
    return (whole // 2, rest) if 16 <= rest < whole // 2 and rest & (rest - 1) == 0 else (whole, 0)
