"""Group normalisation, alone and followed by SiLU.

    y = (x - mean) / sqrt(variance + eps) * weight[c] + bias[c]

with mean and (biased) variance over one group of channels and all positions of one image. The fused form is
silu(y) = y * sigmoid(y), and may first add a vector per image and channel to x: in a residual block that is
the projected time embedding.

Source: Wu and He, "Group Normalization" (2018), equations 1 to 4; SiLU from Elfwing et al. (2017), eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._check import fail, require_dtypes, require_eps, require_equal, require_multiple, require_rank
from ._dispatch import arch_of, launches_triton, uses_custom_op
from ._group_norm_triton import dense, plan
from ._triton import run
from .registry import Case, OpSpec, register

__all__ = ["group_norm", "group_norm_silu"]


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    """Group normalisation of x + shift.

    Args:
        x: [B, C, ...], any strides.
        weight, bias: [C], of x's dtype and device.
        num_groups: divides C.
        eps: added to the variance.
        shift: [B, C], added to every position of x before the norm; nothing where None.

    Returns:
        x's shape and dtype. Statistics of half types are taken in float32.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    _check("group_norm", x, weight, bias, num_groups, eps, shift)
    if uses_custom_op(x):
        out: Tensor = torch.ops.latentrt.group_norm(x, weight, bias, num_groups, eps, shift)
        return out
    return reference.group_norm(x, weight, bias, num_groups, eps, shift)


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
    if uses_custom_op(x):
        out: Tensor = torch.ops.latentrt.group_norm_silu(x, weight, bias, num_groups, eps, shift)
        return out
    return reference.group_norm_silu(x, weight, bias, num_groups, eps, shift)


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None
) -> None:
    require_dtypes(op, {"x": x, "weight": weight, "bias": bias, "shift": shift}, optional=["shift"])
    if x.ndim < 2:
        raise fail(op, "x", "be [B, C, ...]", f"shape {tuple(x.shape)}")
    channels = x.shape[1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_rank(op, name, tensor, "[C]")
        require_equal(op, name, "have one value for each of x's channels,", tensor.shape[0], channels)
    require_multiple(op, "num_groups", "x's channels,", channels, num_groups)
    require_eps(op, eps)
    if shift is not None:
        require_rank(op, "shift", shift, "[B, C]")
        require_equal(op, "shift", "have x's batch size", shift.shape[0], x.shape[0])
        require_equal(op, "shift", "have one value for each of x's channels,", shift.shape[1], channels)


_plan_norm, _plan_silu = partial(plan, silu=False), partial(plan, silu=True)


def _define(name: str, by_reference: Callable[..., Tensor], planned: Callable[..., Any]) -> None:
    """Make the custom op `latentrt::NAME`."""

    @torch.library.custom_op(f"latentrt::{name}", mutates_args=())
    def op(
        x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None = None
    ) -> Tensor:
        given = x, weight, bias, num_groups, eps, shift
        if not launches_triton(x):  # in the layout that the kernels and the fakes give it
            return torch.empty_like(dense(x)).copy_(by_reference(*given))
        y, launches = planned(*given, arch=arch_of(x.device))
        run(launches)
        out: Tensor = y
        return out

    @op.register_fake
    def _(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(dense(x))


_define("group_norm", reference.group_norm, _plan_norm)
_define("group_norm_silu", reference.group_norm_silu, _plan_silu)


_UNET = (
    *((320, 128, 8), (640, 128, 2), (960, 128, 1)),
    *((320, 64, 1), (640, 64, 6), (960, 64, 1), (1280, 64, 1), (1920, 64, 1)),
    *((640, 32, 1), (1280, 32, 10), (1920, 32, 1), (2560, 32, 2)),
)
_VAE = (
    *((128, 1024, 6), (256, 1024, 1), (256, 512, 5)),
    *((512, 512, 1), (512, 256, 6), (512, 128, 10)),
)
"""Channels, height and width, calls: as `engines/packing.py` lays SDXL out, where every norm is given a shift."""


def _case(channels: int, side: int, calls: int, *, images: int = 2) -> Case:
    """Channels_last, as convolutions want it on a GPU; two images with guidance, one in the VAE."""
    shape = (images, channels, side, side)

    def draw(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        x = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).normal_()
        weight, bias = (torch.randn(channels, dtype=dtype, device=device) for _ in range(2))
        return (x, weight, bias, 32, 1e-5, torch.randn(shape[:2], dtype=dtype, device=device))

    name = f"{'VAE ' if images == 1 else ''}{channels} x {side} x {side}"
    size = math.prod(shape)
    return Case(name, draw, flops=0, elements=2 * size, calls=calls, again=size)


def _torch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    if shift is not None:
        x = x + shift[:, :, None, None]
    return F.group_norm(x, num_groups, weight, bias, eps)


def _torch_norm_silu(*args: Any) -> Tensor:
    return F.silu(_torch_norm(*args))


def _contiguous(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """x in the layout that PyTorch's own group norm computes in on CUDA: its `native_group_norm` copies a
    channels_last input to that first."""
    return x.contiguous(), *others


_CANDIDATES = {
    "group_norm": [  # 396 programs: three on each of an H200's 132 multiprocessors, all at once
        {"BLOCK": block, "PROGRAM": program, "PROGRAMS": programs, "num_warps": warps, "num_stages": 1}
        for block in (2048, 4096, 8192)
        for program, programs in ((16384, 1024), (65536, 1024), (65536, 396), (262144, 396))
        for warps in (4, 8)
    ]
}

register(
    OpSpec(
        name="group_norm",
        op=group_norm,
        reference=reference.group_norm,
        plan=_plan_norm,
        cases=[
            _case(640, 64, 5),
            _case(1280, 32, 6),
            _case(512, 128, 1, images=1),
        ],
        limit="copy",
        candidates=_CANDIDATES,
        baselines={"F.group_norm": _torch_norm, "F.group_norm, contiguous": _torch_norm},
        baseline_inputs={"F.group_norm, contiguous": _contiguous},
    )
)
register(
    OpSpec(
        name="group_norm_silu",
        op=group_norm_silu,
        reference=reference.group_norm_silu,
        plan=_plan_silu,
        cases=[
            *(_case(*row) for row in _UNET),
            *(_case(*row, images=1) for row in _VAE),
        ],
        limit="copy",
        candidates=_CANDIDATES,
        baselines={
            "F.group_norm, F.silu": _torch_norm_silu,
            "F.group_norm, F.silu, contiguous": _torch_norm_silu,
        },
        baseline_inputs={"F.group_norm, F.silu, contiguous": _contiguous},
    )
)
