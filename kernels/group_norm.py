"""Group normalisation, alone and followed by SiLU.

    y = (x - mean) / sqrt(variance + eps) * weight[c] + bias[c]

with mean and (biased) variance over one group of channels and all positions of one image. The fused form is
silu(y) = y * sigmoid(y), and may first add a vector per image and channel to x: in a residual block that is
the projected time embedding.

Source: Wu and He, "Group Normalization" (2018), equations 1 to 4; SiLU from Elfwing et al. (2017), eq. 5.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._check import fail, require_dtypes, require_equal, require_multiple, require_rank

__all__ = ["group_norm", "group_norm_silu"]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """Group normalisation.

    Args:
        x: [B, C, ...], any strides.
        weight, bias: [C], of x's dtype and device.
        num_groups: divides C.
        eps: added to the variance.

    Returns:
        x's shape and dtype. Statistics of half types are taken in float32.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    _check("group_norm", x, weight, bias, num_groups, eps, None)
    return reference.group_norm(x, weight, bias, num_groups, eps)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    """silu(group_norm(x + shift)).

    Args:
        x: [B, C, ...], any strides.
        weight, bias: [C], of x's dtype and device.
        num_groups: divides C.
        eps: added to the variance.
        shift: [B, C], added to every position of x before the norm; nothing where None.

    Returns:
        x's shape and dtype; half types are computed in float32 and rounded once.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    _check("group_norm_silu", x, weight, bias, num_groups, eps, shift)
    return reference.group_norm_silu(x, weight, bias, num_groups, eps, shift)


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None
) -> None:
    require_dtypes(op, {"x": x, "weight": weight, "bias": bias, "shift": shift})
    if x.ndim < 2:
        raise fail(op, "x", "be [B, C, ...]", f"shape {tuple(x.shape)}")
    channels = x.shape[1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_rank(op, name, tensor, "[C]")
        require_equal(op, name, "have one value for each of x's channels,", tensor.shape[0], channels)
    require_multiple(op, "num_groups", "x's channels,", channels, num_groups)
    if not eps >= 0:
        raise fail(op, "eps", "be zero or more", eps)
    if shift is not None:
        require_rank(op, "shift", shift, "[B, C]")
        require_equal(op, "shift", "have x's batch size", shift.shape[0], x.shape[0])
        require_equal(op, "shift", "have one value for each of x's channels,", shift.shape[1], channels)
