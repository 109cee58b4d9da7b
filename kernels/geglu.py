"""Gated linear unit with GELU, alone and fused with the projection before it.

    geglu(x) = x[..., :F] * gelu(x[..., F:]),   gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 5; GELU from Hendrycks and Gimpel (2016),
the exact form. The order of the halves is diffusers': value first, gate second.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._check import fail, require_dtypes, require_equal, require_rank

__all__ = ["geglu", "linear_geglu"]


def geglu(x: Tensor) -> Tensor:
    """First half of the last dimension times gelu of the second.

    Args:
        x: [..., 2F], any strides.

    Returns:
        [..., F] of x's dtype; half types are computed in float32 and rounded once.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    require_dtypes("geglu", {"x": x})
    if x.ndim < 1 or (isinstance(x.shape[-1], int) and x.shape[-1] % 2 != 0):
        raise fail("geglu", "x", "be [..., 2F]", f"shape {tuple(x.shape)}")
    return reference.geglu(x)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """geglu(x weight^T + bias).

    Args:
        x: [..., D].
        weight: [2F, D], of x's dtype and device.
        bias: [2F] or None.

    Returns:
        [..., F] of x's dtype.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    require_dtypes("linear_geglu", {"x": x, "weight": weight, "bias": bias})
    if x.ndim < 1:
        raise fail("linear_geglu", "x", "be [..., D]", f"shape {tuple(x.shape)}")
    require_rank("linear_geglu", "weight", weight, "[2F, D]")
    require_equal("linear_geglu", "weight", "have x's last dimension", weight.shape[1], x.shape[-1])
    if isinstance(weight.shape[0], int) and weight.shape[0] % 2 != 0:
        raise fail("linear_geglu", "weight", "be [2F, D]", f"shape {tuple(weight.shape)}")
    if bias is not None:
        require_rank("linear_geglu", "bias", bias, "[2F]")
        require_equal("linear_geglu", "bias", "have weight's first dimension", bias.shape[0], weight.shape[0])
    return reference.linear_geglu(x, weight, bias)
