"""Scaled dot-product attention without a mask.

    o[b, i, h, :] = sum_j softmax_j(scale * <q[b, i, h, :], k[b, j, h, :]>) v[b, j, h, :]

Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; by default scale = D ** -0.5.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._check import fail, require_dtypes, require_equal, require_rank

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of each head over all keys.

    The layout is what a linear projection leaves behind, so callers neither transpose nor copy.

    Args:
        q: [B, Sq, H, D], any strides.
        k, v: [B, Sk, H, D], of q's dtype and device.
        scale: factor on the scores; D ** -0.5 where None.

    Returns:
        [B, Sq, H, D] of q's dtype. Scores and softmax of half types are kept in float32.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    require_dtypes("attention", {"q": q, "k": k, "v": v})
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_rank("attention", name, tensor, f"[B, S{'q' if name == 'q' else 'k'}, H, D]")
    for name, tensor in (("k", k), ("v", v)):
        require_equal("attention", name, "have q's batch size", tensor.shape[0], q.shape[0])
        require_equal("attention", name, "have q's number of heads", tensor.shape[2], q.shape[2])
        require_equal("attention", name, "have q's head size", tensor.shape[3], q.shape[3])
    require_equal("attention", "v", "have k's number of keys", v.shape[1], k.shape[1])
    if isinstance(k.shape[1], int) and k.shape[1] == 0:
        raise fail("attention", "k", "hold at least one key", f"shape {tuple(k.shape)}")
    return reference.attention(q, k, v, scale)
