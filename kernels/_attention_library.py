"""Attention by PyTorch's libraries, where the tuned data choose them over the kernels: see `attention`.

Up to WIDE columns a head that is `F.scaled_dot_product_attention`. Wider heads have no good kernel there either: cuBLAS
multiplies a chunk of queries with all keys, scores in float32; a kernel takes their exponentials, in the inputs' dtype,
and each row's sum; and cuBLAS multiplies those with the values, in float32 until the sum has divided them. Nothing is
rounded that the attention kernels do not round; float32 is multiplied as PyTorch is configured to, TF32 included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._attention_softmax import log2_scale, softmax_start
from ._triton import Launch, Library, cdiv, kernel, tl

__all__ = ["CHUNK_BYTES", "by_matmul", "by_sdpa"]

CHUNK_BYTES = 384 << 20
"""Of the scores and exponentials of one chunk, at most: 4,096 of the 16,384 queries that a VAE has at 1024x1024. Fewer
would leave multiprocessors idle in the second matmul; more are no quicker. Reasoned, not measured."""


@kernel
def _exponentials(
    s_ptr,  # float32 [rows, Sk]
    p_ptr,  # [rows, Sk]; may be s_ptr
    sum_ptr,  # float32 [rows]
    Sk,
    scale,  # of the scores, times log2(e)
    BLOCK: tl.constexpr,
):
    """One program: one row."""
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    p_s = s_ptr + row.to(tl.int64) * Sk + n
    p_p = p_ptr + row.to(tl.int64) * Sk + n
    b_max, b_sum = softmax_start(BLOCK)
    for start in range(0, Sk, BLOCK):
        b_s = tl.load(p_s + start, mask=start + n < Sk, other=0.0) * scale
        b_max = tl.maximum(b_max, tl.where(start + n < Sk, b_s, float("-inf")))
    most = tl.max(b_max, 0)
    for start in range(0, Sk, BLOCK):
        b_s = tl.load(p_s + start, mask=start + n < Sk, other=0.0) * scale
        b_p = tl.exp2(b_s - most)
        b_sum += tl.where(start + n < Sk, b_p, 0.0)
        tl.store(p_p + start, b_p.to(p_ptr.dtype.element_ty), mask=start + n < Sk)
    tl.store(sum_ptr + row, tl.sum(b_sum, 0))


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, list[Library]]:
    """A meta tensor in place of the output, which the one step allocates itself."""
    out = torch.empty(q.shape, dtype=q.dtype, device="meta")
    return out, [Library("attention", _sdpa, {"q": q, "k": k, "v": v, "scale": scale})]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return reference.attention(q, k, v, scale).contiguous()


def by_matmul(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, list[Launch | Library]]:
    """A fresh output, and three steps for each chunk of queries, with scratch that all chunks share."""
    B, Sq, H, D = q.shape
    Sk = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if scale is None:
        scale = D**-0.5
    exact = q.dtype == torch.float32  # exponentials take the place of their scores
    most = max(1, CHUNK_BYTES // (H * Sk * (4 if exact else 4 + q.dtype.itemsize)))
    rows = cdiv(Sq, cdiv(Sq, most))  # as few chunks as may be, of about equal size

    def scratch(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(H * rows * columns, dtype=dtype, device=q.device)

    scores, sums, values = scratch(Sk), scratch(1), scratch(D)
    p = scores if exact else scratch(Sk, q.dtype)
    steps: list[Launch | Library] = []
    for b in range(B):
        for first in range(0, Sq, rows):
            chunk = q[b, first : first + rows].transpose(0, 1)  # [H, rows, D]
            size = chunk.shape[1]
            s_c, p_c = (t[: H * size * Sk].view(H, size, Sk) for t in (scores, p))
            sums_c, values_c = sums[: H * size].view(H, size, 1), values[: H * size * D].view(H, size, D)
            exponentials = {
                "s_ptr": s_c,
                "p_ptr": p_c,
                "sum_ptr": sums_c,
                "Sk": Sk,
                "scale": math.copysign(log2_scale(scale), scale),
            }
            block = min(2048, max(16, 1 << (Sk - 1).bit_length()))
            weighed = {"p": p_c, "v": v[b].transpose(0, 1), "sums": sums_c, "values": values_c}
            steps += [
                Library("attention, scores", _matmul, {"a": chunk, "b": k[b].permute(1, 2, 0), "out": s_c}),
                Launch(_exponentials, (H * size,), exponentials, {"BLOCK": block}, num_warps=8),
                Library(
                    "attention, values",
                    _mean,
                    {**weighed, "out": out[b, first : first + rows].transpose(0, 1)},
                ),
            ]
    return out, steps


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b of [H, M, K] and [H, K, N]; out is float32."""
    if a.dtype == torch.float32:
        torch.bmm(a, b, out=out)
    elif a.is_cuda:
        torch.bmm(a, b, out_dtype=torch.float32, out=out)
    else:  # PyTorch has that on CUDA only
        torch.bmm(a.float(), b.float(), out=out)


def _mean(p: Tensor, v: Tensor, sums: Tensor, values: Tensor, out: Tensor) -> None:
    """out = p v / sums of [H, M, N], [H, N, D] and [H, M, 1]; by way of `values`, float32 [H, M, D]."""
    _matmul(p, v, values)
    torch.div(values, sums, out=out)
