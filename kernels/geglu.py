"""Gated linear unit with GELU, alone and fused with the projection before it.

    geglu(x) = x[..., :F] * gelu(x[..., F:]),   gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 5; GELU from Hendrycks and Gimpel (2016),
the exact form. The order of the halves is diffusers': value first, gate second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, tuning
from ._check import fail, require_dtypes, require_equal, require_rank
from ._dispatch import arch_of, launches_triton, uses_custom_op
from ._geglu_triton import plan, plan_linear
from ._triton import run
from .registry import Case, OpSpec, register

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
    if uses_custom_op(x):
        out: Tensor = torch.ops.latentrt.geglu(x)
        return out
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
    require_dtypes("linear_geglu", {"x": x, "weight": weight, "bias": bias}, optional=["bias"])
    if x.ndim < 1:
        raise fail("linear_geglu", "x", "be [..., D]", f"shape {tuple(x.shape)}")
    require_rank("linear_geglu", "weight", weight, "[2F, D]")
    require_equal("linear_geglu", "weight", "have x's last dimension", weight.shape[1], x.shape[-1])
    if isinstance(weight.shape[0], int) and weight.shape[0] % 2 != 0:
        raise fail("linear_geglu", "weight", "be [2F, D]", f"shape {tuple(weight.shape)}")
    if bias is not None:
        require_rank("linear_geglu", "bias", bias, "[2F]")
        require_equal("linear_geglu", "bias", "have weight's first dimension", bias.shape[0], weight.shape[0])
    if uses_custom_op(x):
        out: Tensor = torch.ops.latentrt.linear_geglu(x, weight, bias)
        return out
    return reference.linear_geglu(x, weight, bias)


@torch.library.custom_op("latentrt::geglu", mutates_args=())
def _geglu_op(x: Tensor) -> Tensor:
    if not launches_triton(x):
        return reference.geglu(x).contiguous()
    y, launches = plan(x, arch=arch_of(x.device))
    run(launches)
    return y


@_geglu_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("latentrt::linear_geglu", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not launches_triton(x):
        return reference.linear_geglu(x, weight, bias).contiguous()
    y, steps = plan_linear(x, weight, bias, arch=arch_of(x.device))
    run(steps)
    return y


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def _inputs(M: int, N: int) -> Callable[[torch.dtype, torch.device], tuple[Any, ...]]:
    return lambda dtype, device: (torch.randn(2, M, 2 * N, dtype=dtype, device=device),)


def _linear_inputs(M: int, K: int) -> Callable[[torch.dtype, torch.device], tuple[Any, ...]]:
    def draw(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        weight = torch.randn(8 * K, K, dtype=dtype, device=device) * K**-0.5
        bias = torch.randn(8 * K, dtype=dtype, device=device)
        return torch.randn(2, M, K, dtype=dtype, device=device), weight, bias

    return draw


def _linear_case(M: int, K: int, calls: int) -> Case:
    """With guidance; the projection is to 4 K values and as many gates."""
    elements = 2 * M * K + 8 * K * K + 8 * K + 2 * M * 4 * K
    return Case(f"{M} x {K} to {4 * K}", _linear_inputs(M, K), 2.0 * 2 * M * K * 8 * K, elements, calls)


def _linear_then_gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = F.linear(x, weight, bias).chunk(2, -1)
    return value * F.gelu(gate)


_BLOCKS = (
    (128, 128, 64, 8),
    (256, 64, 64, 8),
    (128, 64, 64, 8),
    (128, 64, 64, 4),
    (128, 64, 32, 8),
    (128, 64, 32, 4),
    (64, 128, 64, 4),
    (128, 128, 32, 8),
)
"""BLOCK_M, BLOCK_N, BLOCK_K and warps of `linear_geglu`, to be tried."""

register(
    OpSpec(
        name="geglu",
        op=geglu,
        reference=reference.geglu,
        plan=plan,
        cases=[
            Case("4096 x 2560", _inputs(4096, 2560), flops=0, elements=3 * 2 * 4096 * 2560, calls=0),
            Case("1024 x 5120", _inputs(1024, 5120), flops=0, elements=3 * 2 * 1024 * 5120, calls=0),
        ],
        limit="copy",
        candidates={
            "geglu": [
                {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": 1}
                for m in (1, 2, 4)
                for n in (512, 1024)
                for w in (4, 8)
            ]
        },
        baselines={"chunk, F.gelu, multiply": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1])},
    )
)
register(
    OpSpec(
        name="linear_geglu",
        op=linear_geglu,
        reference=reference.linear_geglu,
        plan=plan_linear,
        cases=[_linear_case(4096, 640, 10), _linear_case(1024, 1280, 60)],
        limit="matmul",
        tensor_cores=True,
        candidates={
            "linear_geglu": [
                tuning.LIBRARY,
                *(
                    {
                        "BLOCK_M": m,
                        "BLOCK_N": n,
                        "BLOCK_K": k,
                        "GROUP_M": 8,
                        "num_warps": w,
                        "num_stages": s,
                        **variant,
                    }
                    for variant, stages, blocks in (
                        ({}, (2, 3, 4, 5), _BLOCKS),
                        ({"TMA": 1}, (3, 4), _BLOCKS[:3]),
                        # Triton specialises kernels of four warps only, and adds eight.
                        ({"TMA": 1, "SPECIALIZE": 1}, (3, 4), [(128, 128, 64, 4), (128, 64, 64, 4)]),
                    )
                    for m, n, k, w in blocks
                    for s in stages
                ),
            ]
        },
        baselines={"F.linear, then gate": _linear_then_gate},
    )
)
