"""What each operator means, in plain PyTorch: any float dtype, any device, any strides.

Tests compare every other implementation with these functions, the CPU path runs them, an export traces them.
Half-precision inputs are computed in float32 and rounded once, at the end (`linear_geglu` rounds its projection as
well, as a linear layer does); float32 and float64 stay as they are. No argument is checked here: that is the public
wrappers' work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "add_layer_norm",
    "attention",
    "geglu",
    "group_norm",
    "group_norm_silu",
    "layer_norm",
    "linear_geglu",
]

_HALF = (torch.float16, torch.bfloat16)


def _up(x: Tensor) -> Tensor:
    """float32 for half types; the tensor itself otherwise."""
    return x.float() if x.dtype in _HALF else x


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v for each head. See `latentrt.kernels.attention`."""
    # PyTorch's CPU and CUDA kernels keep scores, softmax and accumulation of half types in float32.
    q, k, v = (_without_overlap(t).transpose(1, 2) for t in (q, k, v))  # [B, S, H, D] -> [B, H, S, D]
    if scale is not None and scale < 0:
        # Flash attention on CUDA subtracts scale * max(q k^T), the least of scaled scores: others overflow a half type.
        q, scale = -q, -scale
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _without_overlap(t: Tensor) -> Tensor:
    """[B, S, H, D], copied if rows overlap (stride(1) < D): PyTorch's CPU kernel passes them to BLAS as a matrix whose
    leading dimension is too small, and returns uninitialised memory."""
    if not torch.compiler.is_compiling() and t.stride(3) == 1 and t.stride(1) < t.shape[3]:
        return t.contiguous()
    return t


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    """Group normalisation of x + shift. See `latentrt.kernels.group_norm`."""
    return _group_norm(_shifted(_up(x), shift), num_groups, _up(weight), _up(bias), eps).to(x.dtype)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    """silu(group_norm(x + shift)). See `latentrt.kernels.group_norm_silu`."""
    y = _group_norm(_shifted(_up(x), shift), num_groups, _up(weight), _up(bias), eps)
    return F.silu(y).to(x.dtype)


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x + _up(shift)[(...,) + (None,) * (x.ndim - 2)]


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm, which refuses groups of one value, without its channels_last path on the CPU: that takes the
    variance as E[x^2] - E[x]^2, which cancels where the mean is large (off by 0.2 to 4 at mean 1000 and deviation 1, in
    float32)."""
    if x.device.type != "cpu" or x.is_contiguous():
        return torch.group_norm(x, num_groups, weight, bias, eps)
    y = torch.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)
    return y


def geglu(x: Tensor) -> Tensor:
    """First half of the last dimension times gelu of the second. See `latentrt.kernels.geglu`."""
    hidden, gate = _up(x).chunk(2, dim=-1)
    return (hidden * F.gelu(gate)).to(x.dtype)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """geglu(x weight^T + bias). See `latentrt.kernels.linear_geglu`."""
    return geglu(F.linear(x, weight, bias))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalisation of the last dimension. See `latentrt.kernels.layer_norm`."""
    return F.layer_norm(_up(x), x.shape[-1:], _up(weight), _up(bias), eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual). See `latentrt.kernels.add_layer_norm`."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total
