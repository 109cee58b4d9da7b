"""The attention kernels with the parameters that TensorRT passes to a kernel it launches by itself: see `attention`.

An ahead-of-time plugin gets inputs, then integers, then outputs. So strides are worked out here, of contiguous
tensors, and the scale is compiled in.
"""

from __future__ import annotations

from ._attention_triton import _attention, _attention_wide
from ._triton import kernel, tl

__all__ = ["attention_aot", "attention_wide_aot"]


@kernel
def attention_aot(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    H,
    Sq,
    Sk,
    o_ptr,  # [B, Sq, H, D]
    SCALE: tl.constexpr,
    D: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_TO_8: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = H * D
    _attention(
        *(q_ptr, k_ptr, v_ptr, o_ptr),
        *(Sq * row, row, D, 1),
        *(Sk * row, row, D, 1),
        *(Sk * row, row, D, 1),
        *(H, Sq, Sk, SCALE),
        *(D, NEGATIVE_SCALE, PRECISION, ALIGNED_TO_8, BLOCK_D, BLOCK_E, BLOCK_M, BLOCK_N),
    )


@kernel
def attention_wide_aot(
    q_ptr,  # [B, Sq, H, D]
    k_ptr,  # [B, Sk, H, D]
    v_ptr,  # [B, Sk, H, D]
    H,
    Sq,
    Sk,
    o_ptr,  # [B, Sq, H, D]
    SCALE: tl.constexpr,
    D: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = H * D
    _attention_wide(
        *(q_ptr, k_ptr, v_ptr, o_ptr),
        *(Sq * row, row, D, 1),
        *(Sk * row, row, D, 1),
        *(Sk * row, row, D, 1),
        *(H, Sq, Sk, SCALE),
        *(D, NEGATIVE_SCALE, PRECISION, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N),
    )
