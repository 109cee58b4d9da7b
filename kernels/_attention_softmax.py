"""What the attention kernels share: one step of the online softmax, with exponentials of base 2."""

from __future__ import annotations

import math

from ._triton import kernel, tl

__all__ = ["log2_scale", "softmax_start", "softmax_step"]


def log2_scale(scale: float) -> float:
    """|scale| log2(e), as the kernels take it for exp2: positive."""
    # Never 0: a masked score is -inf, and -inf * 0 is NaN. 1e-30 gives the same uniform weights.
    return max(abs(scale) * math.log2(math.e), 1e-30)


@kernel
def softmax_start(ROWS: tl.constexpr):
    """The running maximum and sum before the first block of keys."""
    # The lowest float32: finite, so that exp2(-inf - b_max) is 0, not NaN, in a block of masked keys.
    b_max = tl.full([ROWS], -3.4028234663852886e38, tl.float32)
    return b_max, tl.zeros([ROWS], tl.float32)


@kernel
def softmax_step(b_s, b_max, b_sum, scale):
    """Scores [M, N] of a block of keys -> p, the factor that rescales what was summed before, the new maximum and sum.

    Dao, "FlashAttention-2" (2023), algorithm 1, line 9: m = max(m', rowmax(s)), p = exp(s - m), l = exp(m' - m) l' +
    rowsum(p).
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_p = tl.exp2(b_s * scale - b_new[:, None])
    b_alpha = tl.exp2(b_max - b_new)
    return b_p, b_alpha, b_new, b_sum * b_alpha + tl.sum(b_p, 1)
