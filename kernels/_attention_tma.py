"""The attention kernel for GPUs that copy blocks of tensors by themselves (TMA, from sm_90 on): see `attention`.

One thread requests a block and the copy engine brings it, zero beyond the end of the tensor; no thread computes
addresses, and shared memory holds the queries too, which leaves registers for whole heads of 512.

Under SPECIALIZE the copies have warps of their own (on sm_90 one group feeds two that take half of the queries
each; on sm_100 the matmuls get a group as well). To split the queries Triton wants their descriptor made in the
kernel, in global memory: so this variant needs scratch. Neither variant can be a TensorRT plugin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_softmax import log2_scale, softmax_start, softmax_step
from ._triton import Descriptor, Launch, cdiv, kernel, tl
from .tuning import Row

__all__ = ["describable", "launch"]


@kernel
def _attention_tma(
    q,  # descriptor of [B Sq, columns]; a pointer to it where SPECIALIZE
    k_desc,  # descriptor of [B, Sk, H, D]
    v_desc,  # descriptor of [B, Sk, H, D]
    o_ptr,  # [B, Sq, H, D], contiguous
    rows,  # B Sq
    columns,
    stride_qs,
    stride_qh,
    H,
    Sq,
    Sk,
    scale,  # of the scores, times log2(e); positive
    D: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,  # whether the true scale is negative
    EVEN: tl.constexpr,  # whether BLOCK_N divides Sk
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head."""
    blocks = tl.cdiv(Sq, BLOCK_M)
    pid = tl.program_id(0)
    first = (pid % blocks) * BLOCK_M
    b = pid // blocks // H
    h = pid // blocks % H

    if SPECIALIZE:
        q = tl.make_tensor_descriptor(q, [rows, columns], [stride_qs, 1], [BLOCK_M, D])
    b_q = q.load([b * Sq + first, h * stride_qh])  # past Sq another image's queries, which are not stored
    b_acc = tl.zeros([BLOCK_M, D], tl.float32)
    b_max, b_sum = softmax_start(BLOCK_M)
    # One loop and no branch: Triton specialises nothing else.
    for start in tl.range(0, Sk, BLOCK_N, warp_specialize=SPECIALIZE):
        b_k = tl.reshape(k_desc.load([b, start, h, 0]), [BLOCK_N, D])
        b_s = tl.dot(b_q, tl.trans(b_k))
        if NEGATIVE_SCALE:
            b_s = -b_s
        if not EVEN:
            b_s = tl.where((start + tl.arange(0, BLOCK_N) < Sk)[None, :], b_s, float("-inf"))
        b_p, b_alpha, b_max, b_sum = softmax_step(b_s, b_max, b_sum, scale)
        b_v = tl.reshape(v_desc.load([b, start, h, 0]), [BLOCK_N, D])
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])

    m = tl.arange(0, BLOCK_M)
    p_o = o_ptr + ((b.to(tl.int64) * Sq + first) * H + h) * D + m[:, None].to(tl.int64) * (H * D)
    b_o = (b_acc * (1.0 / b_sum)[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(p_o + tl.arange(0, D)[None, :], b_o, mask=(first + m < Sq)[:, None])


def describable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel can take these [B, S, H, D].

    Half types, heads of a power of two columns that lie beside each other, everything else in steps of 16 bytes,
    and the queries of one image right after those of the image before.
    """
    B, Sq, _, D = q.shape
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and D >= 16
        and D & (D - 1) == 0
        and all(
            t.stride(3) == 1
            and t.data_ptr() % 16 == 0
            and all(stride > 0 and stride % 8 == 0 for stride in t.stride()[:3])
            for t in (q, k, v)
        )
        and (B == 1 or q.stride(0) == Sq * q.stride(1))
        and q.stride(1) >= _columns(q)
    )


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, row: Row) -> Launch:
    """Of the kernel that fills `out`, for tensors that are `describable`."""
    B, Sq, H, D = q.shape
    Sk = k.shape[1]
    block_m, block_n = row.blocks["BLOCK_M"], row.blocks["BLOCK_N"]
    queries = q.as_strided((B * Sq, _columns(q)), (q.stride(1), 1))
    args = {
        "q": queries if row.specialize else Descriptor(queries, (block_m, D)),
        "k_desc": Descriptor(k, (1, block_n, 1, D)),
        "v_desc": Descriptor(v, (1, block_n, 1, D)),
        "o_ptr": out,
        "rows": queries.shape[0],
        "columns": queries.shape[1],
        "stride_qs": q.stride(1),
        "stride_qh": q.stride(2),
        "H": H,
        "Sq": Sq,
        "Sk": Sk,
        "scale": log2_scale(scale),
    }
    constants = {
        "D": D,
        "NEGATIVE_SCALE": scale < 0,
        "EVEN": Sk % block_n == 0,
        "SPECIALIZE": row.specialize,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    grid = (B * H * cdiv(Sq, block_m),)
    return Launch(_attention_tma, grid, args, constants, row.warps, row.stages, scratch=row.specialize)


def _columns(q: Tensor) -> int:
    """Columns of the matrix whose rows are the queries of all images, each with all heads."""
    _, _, H, D = q.shape
    return (H - 1) * q.stride(2) + D
