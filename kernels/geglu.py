"""Gated linear unit with GELU, alone and fused with the projection before it.

    geglu(x) = x[..., :F] * gelu(x[..., F:]),   gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 5; GELU from Hendrycks and Gimpel (2016),
the exact form. The order of the halves is diffusers': value first, gate second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, tuning
from ._check import fail, require_dtypes, require_equal, require_rank
from ._triton import (
    Descriptor,
    Launch,
    Library,
    arch_of,
    kernel,
    run,
    specializes_wide_sums,
    takes,
    tl,
    usable,
)
from .registry import Case, OpSpec, register

__all__ = ["geglu", "linear_geglu"]


@kernel
def _gated(value, gate):
    """value * gelu(gate), float32"""
    return value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))


@kernel
def _geglu_kernel(
    x_ptr,  # [M, 2N]
    y_ptr,  # [M, N]
    M,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    rows = (pid // BLOCKS_N).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % BLOCKS_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    p_x = x_ptr + rows[:, None] * (2 * N) + cols[None, :]
    value = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_x + N, mask=mask, other=0.0).to(tl.float32)
    y = _gated(value, gate)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def _tile(M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile this program computes, down and across.

    Programs that run together share rows of x and of the weight in L2: GROUP_M tiles down, then across.
    """
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first_m = pid // (GROUP_M * BLOCKS_N) * GROUP_M
    group = tl.minimum(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    in_group = pid % (GROUP_M * BLOCKS_N)
    return first_m + in_group % group, in_group // group


@kernel
def _store_gated(
    both, bias_ptr, y_ptr, tile_m, tile_n, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What follows the products, values beside gates: biases, the gate, one rounding."""
    value, gate = tl.split(tl.permute(tl.reshape(both, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        m_n = cols < N
        value += tl.load(bias_ptr + cols, mask=m_n, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + N + cols, mask=m_n, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    p_y = y_ptr + rows[:, None] * N + cols[None, :]
    tl.store(p_y, _gated(value, gate).to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def _linear_geglu_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [2, N, K]: the values' rows, then the gates'
    bias_ptr,  # [2N] or None
    y_ptr,  # [M, N]
    M,
    K,
    N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile's values and their gates are one product: its instructions are twice as wide as those of two would be.

    A thread holds values with their own gates, so that they part without an exchange.
    """
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    both = tl.arange(0, 2 * BLOCK_N)
    cols = tile_n * BLOCK_N + both % BLOCK_N
    k = tl.arange(0, BLOCK_K)
    # Beyond the edge the last row again: loads need no mask, and the store drops what comes of it.
    p_x = x_ptr + tl.minimum(rows, M - 1)[:, None] * K + k[None, :]
    weight_rows = tl.minimum(cols, N - 1).to(tl.int64) + both // BLOCK_N * N
    p_weight = weight_ptr + weight_rows[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_x + k0)
            b_weight = tl.load(p_weight + k0)
        else:
            m_k = k0 + k < K
            b_x = tl.load(p_x + k0, mask=m_k[None, :], other=0.0)
            b_weight = tl.load(p_weight + k0, mask=m_k[:, None], other=0.0)
        acc = tl.dot(b_x, b_weight, acc, input_precision="ieee")
    _store_gated(acc, bias_ptr, y_ptr, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)


@kernel
def _linear_geglu_tma_kernel(
    x,  # descriptor of [M, K]; the tensor's pointer where SPECIALIZE
    weight_desc,  # descriptor of [2, N, K]: the values' rows, then the gates'
    bias_ptr,  # [2N] or None
    y_ptr,  # [M, N]
    M,
    K,
    N: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As the one above, with blocks brought by the copy engine: see `_attention_tma` for what that asks and why."""
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if SPECIALIZE:
        x = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
        b_x = x.load([tile_m * BLOCK_M, k0])
        b_weight = weight_desc.load([0, tile_n * BLOCK_N, k0]).reshape(2 * BLOCK_N, BLOCK_K)
        acc = tl.dot(b_x, b_weight.T, acc)
    _store_gated(acc, bias_ptr, y_ptr, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N)


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
    if takes(x):
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
    if takes(x):
        out: Tensor = torch.ops.latentrt.linear_geglu(x, weight, bias)
        return out
    return reference.linear_geglu(x, weight, bias)


def _plan(x: Tensor, *, arch: int) -> tuple[Tensor, list[Launch]]:
    x = x.contiguous()
    N = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, []
    M = y.numel() // N
    sizes = tuning.constants("geglu", arch, x.dtype, "any")
    blocks = {name: sizes[name] for name in ("BLOCK_M", "BLOCK_N")}
    grid = (-(-M // blocks["BLOCK_M"]) * -(-N // blocks["BLOCK_N"]),)
    args = {"x_ptr": x, "y_ptr": y, "M": M}
    return y, [Launch(_geglu_kernel, grid, args, {"N": N, **blocks}, sizes["num_warps"], sizes["num_stages"])]


def _plan_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, arch: int
) -> tuple[Tensor, Sequence[Launch | Library]]:
    x = x.contiguous()
    N, K = weight.shape[0] // 2, weight.shape[1]
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, []
    if N * K >= 2**31:
        raise fail("linear_geglu", "weight", "have fewer than 2^32 elements", f"shape {tuple(weight.shape)}")
    M = y.numel() // N
    unaligned = K % 16 != 0
    sizes = tuning.constants("linear_geglu", arch, x.dtype, "few" if M <= 512 or unaligned else "many")
    if tuning.by_library(sizes):
        del y
        projected = torch.empty(*x.shape[:-1], 2 * N, dtype=x.dtype, device=x.device)
        out, launches = _plan(projected, arch=arch)
        given = {"x": x.view(M, K), "weight": weight, "bias": bias, "out": projected.view(M, 2 * N)}
        return out, [Library("linear_geglu, projection", _project, given), *launches]
    blocks = {name: sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
    if unaligned:  # loaded by single elements, through registers: larger tiles spill
        blocks["BLOCK_K"] = min(blocks["BLOCK_K"], 32)
    warps, stages = sizes["num_warps"], sizes["num_stages"]
    grid = (-(-M // blocks["BLOCK_M"]) * -(-N // blocks["BLOCK_N"]),)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    args: dict[str, Any] = {"bias_ptr": bias, "y_ptr": y, "M": M, "K": K}
    # A descriptor's rows and its beginning lie at multiples of 16 bytes.
    half = x.dtype in (torch.float16, torch.bfloat16)
    if (
        sizes.get("TMA")
        and half
        and K > 0
        and K % 8 == 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    ):
        specialize = bool(sizes.get("SPECIALIZE")) and specializes_wide_sums(arch)
        x = x.view(M, K)
        described = Descriptor(x, (blocks["BLOCK_M"], blocks["BLOCK_K"]))
        weights = Descriptor(weight.view(2, N, K), (2, blocks["BLOCK_N"], blocks["BLOCK_K"]))
        args |= {"x": x if specialize else described, "weight_desc": weights}
        constants = {"N": N, "SPECIALIZE": specialize, **blocks}
        return y, [Launch(_linear_geglu_tma_kernel, grid, args, constants, warps, stages, scratch=specialize)]
    args |= {"x_ptr": x, "weight_ptr": weight}
    constants = {"N": N, "EVEN_K": K % blocks["BLOCK_K"] == 0, **blocks}
    return y, [Launch(_linear_geglu_kernel, grid, args, constants, warps, stages)]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, of two dimensions each but the bias."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


@torch.library.custom_op("latentrt::geglu", mutates_args=())
def _geglu_op(x: Tensor) -> Tensor:
    if not usable(x):
        return reference.geglu(x).contiguous()
    y, launches = _plan(x, arch=arch_of(x.device))
    run(launches)
    return y


@_geglu_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("latentrt::linear_geglu", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not usable(x):
        return reference.linear_geglu(x, weight, bias).contiguous()
    y, steps = _plan_linear(x, weight, bias, arch=arch_of(x.device))
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
        plan=_plan,
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
        rivals={"chunk, F.gelu, multiply": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1])},
    )
)
register(
    OpSpec(
        name="linear_geglu",
        op=linear_geglu,
        reference=reference.linear_geglu,
        plan=_plan_linear,
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
        rivals={"F.linear, then gate": _linear_then_gate},
    )
)
