"""Layer normalisation, alone and after a residual addition.

    y = (x - mean) / sqrt(variance + eps) * weight + bias

with mean and (biased) variance over the last dimension.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._check import fail, require_dtypes, require_equal, require_rank

__all__ = ["add_layer_norm", "layer_norm"]


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
    return reference.add_layer_norm(x, residual, weight, bias, eps)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    if x.ndim < 1:
        raise fail(op, "x", "be [..., D]", f"shape {tuple(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_rank(op, name, tensor, "[D]")
        require_equal(op, name, "have x's last dimension", tensor.shape[0], x.shape[-1])
    if not eps >= 0:
        raise fail(op, "eps", "be zero or more", eps)
