"""The Triton kernels of group normalisation, and how they are launched: see `group_norm`.

In the first kernel each program takes the statistics of part of a group; the second merges and applies them: two
launches, no atomics, and the same sum in the same order every time. Means and squared deviations are merged after
Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979), equation
2.1; within a lane that is Welford's update (1962).

An image larger than the cache is read twice, so it takes at least 1.5 times as long as a copy (two reads and a write).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelArgumentError
from . import tuning
from ._triton import Launch, cdiv, kernel, round_up, tl

__all__ = ["LARGE", "MOST_SPLITS", "dense", "plan"]

LARGE = 2**25
"""Tensors in channels_last of so many elements or more are a shape class of their own: an H200's cache is smaller, and
a VAE's would decide for a UNet too, which runs once a step. For two images and more a UNet has such tensors as well."""

MOST_SPLITS = 256
"""Programs that share one group, at most: to apply the statistics each of them reads the partial ones of all."""


@kernel
def _merge(n, mean, m2, AXIS: tl.constexpr):
    """Chan's merge of (count, mean, sum of squared deviations) along an axis; the second sum corrects the first."""
    total = tl.sum(n, AXIS)
    share = 1.0 / tl.maximum(total, 1.0)
    centre = tl.sum(n * mean, AXIS) * share
    d = mean - tl.expand_dims(centre, AXIS)
    correction = tl.sum(n * d, AXIS) * share
    d -= tl.expand_dims(correction, AXIS)
    return total, centre + correction, tl.sum(m2 + n * d * d, AXIS)


@kernel
def _merge_equal(n, mean, m2, pivot, member, COUNT: tl.constexpr):
    """The same along axis 1 for COUNT members that all count n: half of the sums. Means are summed as distances from
    `pivot`, a value near them (shifted-data variance), which needs no correction."""
    d = mean - pivot[:, None]
    centre = tl.sum(tl.where(member, d, 0.0), 1) * (1.0 / COUNT)
    d -= centre[:, None]
    return pivot + centre, tl.sum(tl.where(member, m2 + n * d * d, 0.0), 1)


@kernel
def _load_pivot(x_ptr, shift_ptr, b, c, m_c, s, S, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """x + shift of channels c at position s."""
    at = (b * S + s) * C + c if CHANNELS_LAST else b * C * S + c.to(tl.int64) * S + s
    b_x = tl.load(x_ptr + at, mask=m_c, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        b_x += tl.load(shift_ptr + b * C + c, mask=m_c, other=0.0).to(tl.float32)
    return b_x


@kernel
def _welford_even(b_x, count, mean, m2):
    """One more value in every lane; `count` is a scalar."""
    count += 1.0
    d = b_x - mean
    mean += d * (1.0 / count)
    return count, mean, m2 + d * (b_x - mean)


@kernel
def _welford_masked(b_x, m_x, count, mean, m2):
    """One more value in the lanes of the mask; `count` is each lane's."""
    count += m_x.to(tl.float32)
    d = tl.where(m_x, b_x - mean, 0.0)
    mean += d / tl.maximum(count, 1.0)
    return count, mean, m2 + d * (b_x - mean)


@kernel
def _stats_kernel(
    x_ptr,  # [B, C, S], or [B, S, C] where CHANNELS_LAST
    shift_ptr,  # [B, C] or None
    stats_ptr,  # float32 [2, B, G, splits]: mean, sum of squared deviations
    S,
    chunk,
    splits,
    partials,  # B G splits
    C: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    PAD_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EVEN: tl.constexpr,  # whether blocks need no masks: they divide positions, and channels if there are several
):
    TILE_C: tl.constexpr = TILE_GROUPS * GROUP
    TILES: tl.constexpr = C // TILE_C
    pid = tl.program_id(0)
    split = pid % splits
    tile = (pid // splits) % TILES
    b = (pid // (splits * TILES)).to(tl.int64)
    start = split * chunk
    end = tl.minimum(start + chunk, S)
    rows = tl.arange(0, BLOCK_C)
    cols = tl.arange(0, BLOCK_S)

    # Welford in every lane: nothing is reduced across threads until the end.
    count = 0.0 if EVEN else tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    m2 = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for c0 in range(0, TILE_C, BLOCK_C):
        c = tile * TILE_C + c0 + rows
        m_c = c0 + rows < TILE_C
        if shift_ptr is not None:
            b_shift = tl.load(shift_ptr + b * C + c, mask=m_c, other=0.0).to(tl.float32)
        for s0 in range(start, end, BLOCK_S):
            if CHANNELS_LAST:
                p_x = x_ptr + (b * S + s0) * C + c[:, None] + (cols * C)[None, :]
            else:
                p_x = x_ptr + b * C * S + s0 + c.to(tl.int64)[:, None] * S + cols[None, :]
            m_x = m_c[:, None] if EVEN else m_c[:, None] & (s0 + cols < end)[None, :]
            b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                b_x += b_shift[:, None]
            if EVEN:
                count, mean, m2 = _welford_even(b_x, count, mean, m2)
            else:
                count, mean, m2 = _welford_masked(b_x, m_x, count, mean, m2)

    # Merge lanes to channels [BLOCK_C], and channels to groups [PAD_GROUPS].
    g = tl.arange(0, PAD_GROUPS)
    member = (rows // GROUP)[None, :] == g[:, None]  # [PAD_GROUPS, BLOCK_C]
    if EVEN:
        MEMBERS: tl.constexpr = GROUP if GROUP < BLOCK_C else BLOCK_C
        base, first = tile * TILE_C, g * GROUP
        b_row = _load_pivot(x_ptr, shift_ptr, b, base + rows, rows < TILE_C, start, S, C, CHANNELS_LAST)
        b_group = _load_pivot(x_ptr, shift_ptr, b, base + first, first < TILE_C, start, S, C, CHANNELS_LAST)
        b_mean, b_m2 = _merge_equal(count, mean, m2, b_row, (rows < TILE_C)[:, None], BLOCK_S)
        b_mean, b_m2 = _merge_equal(count * BLOCK_S, b_mean[None, :], b_m2[None, :], b_group, member, MEMBERS)
    else:
        b_n, b_mean, b_m2 = _merge(count, mean, m2, 1)
        b_n, b_mean = tl.where(member, b_n[None, :], 0.0), tl.where(member, b_mean[None, :], 0.0)
        b_n, b_mean, b_m2 = _merge(b_n, b_mean, tl.where(member, b_m2[None, :], 0.0), 1)
    p_stats = stats_ptr + (b * (C // GROUP) + tile * TILE_GROUPS + g) * splits + split
    tl.store(p_stats, b_mean, mask=g < TILE_GROUPS)
    tl.store(p_stats + partials, b_m2, mask=g < TILE_GROUPS)


@kernel
def _silu(y, HALF: tl.constexpr):
    """y / (1 + exp(-y)), float32, to be rounded to a HALF type or not.

    1 / (1 + exp(-y)) is the square of an inverse root, which is one instruction where a division is several. The root's
    relative error is up to 2^-22.9 (PTX ISA, `rsqrt.approx.f32`), the square's twice that: nothing beside the rounding
    of half types, too near to what float32 is allowed. Where the exponential overflows both ways give -0, and NaN for
    y = -inf.
    """
    if not HALF:
        return y / (1.0 + tl.exp(-y))
    root = tl.rsqrt(1.0 + tl.exp2(y * -1.4426950408889634))
    return y * root * root


@kernel
def _apply_kernel(
    x_ptr,  # [B, C, S], or [B, S, C] where CHANNELS_LAST
    shift_ptr,  # [B, C] or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    stats_ptr,  # float32 [2, B, G, splits]
    y_ptr,  # as x
    S,
    chunk,
    splits,
    partials,
    eps,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    PAD_GROUPS: tl.constexpr,
    PAD_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    TILE_C: tl.constexpr = TILE_GROUPS * GROUP
    TILES: tl.constexpr = C // TILE_C
    # In reverse: what the statistics read last may still be in the cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    split = pid % splits
    tile = (pid // splits) % TILES
    b = (pid // (splits * TILES)).to(tl.int64)
    start = split * chunk
    end = tl.minimum(start + chunk, S)
    rows = tl.arange(0, BLOCK_C)
    cols = tl.arange(0, BLOCK_S)

    g = tl.arange(0, PAD_GROUPS)
    k = tl.arange(0, PAD_SPLITS)
    m_k = (g < TILE_GROUPS)[:, None] & (k < splits)[None, :]
    p_stats = stats_ptr + ((b * (C // GROUP) + tile * TILE_GROUPS + g) * splits)[:, None] + k[None, :]
    b_mean = tl.load(p_stats, mask=m_k, other=0.0)
    b_m2 = tl.load(p_stats + partials, mask=m_k, other=0.0)
    positions = tl.minimum(S - k * chunk, chunk)[None, :] * GROUP
    b_n, b_mean, b_m2 = _merge(tl.where(m_k, positions.to(tl.float32), 0.0), b_mean, b_m2, 1)
    b_rstd = 1.0 / tl.sqrt(b_m2 / tl.maximum(b_n, 1.0) + eps)  # [PAD_GROUPS]
    member = (rows // GROUP)[None, :] == g[:, None]

    for c0 in range(0, TILE_C, BLOCK_C):
        c = tile * TILE_C + c0 + rows
        m_c = c0 + rows < TILE_C
        mean = tl.sum(tl.where(member, b_mean[:, None], 0.0), 0)  # [BLOCK_C]
        scale = tl.sum(tl.where(member, b_rstd[:, None], 0.0), 0)
        if shift_ptr is not None:
            b_shift = tl.load(shift_ptr + b * C + c, mask=m_c, other=0.0).to(tl.float32)
        scale *= tl.load(weight_ptr + c, mask=m_c, other=0.0).to(tl.float32)
        b_bias = tl.load(bias_ptr + c, mask=m_c, other=0.0).to(tl.float32)
        for s0 in range(start, end, BLOCK_S):
            if CHANNELS_LAST:
                at = (b * S + s0) * C + c[:, None] + (cols * C)[None, :]
            else:
                at = b * C * S + s0 + c.to(tl.int64)[:, None] * S + cols[None, :]
            m_x = m_c[:, None] & (s0 + cols < end)[None, :]
            b_x = tl.load(x_ptr + at, mask=m_x, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                b_x += b_shift[:, None]
            # The mean is subtracted first: x * scale - mean * scale cancels if the mean is large.
            y = (b_x - mean[:, None]) * scale[:, None] + b_bias[:, None]
            if SILU:
                y = _silu(y, y_ptr.dtype.element_ty != tl.float32)
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=m_x)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    shift: Tensor | None = None,
    *,
    silu: bool,
    arch: int,
) -> tuple[Tensor, list[Launch]]:
    """A fresh output in the layout of `dense(x)`, and the launches that fill it."""
    x = dense(x)
    y = torch.empty_like(x)
    B, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    if x.numel() == 0:
        return y, []
    if S >= 2**31:  # positions are counted in 32 bits, elements in 64
        raise KernelArgumentError(
            f"group norm: x must have fewer than 2^31 positions, got shape {tuple(x.shape)}"
        )
    channels_last = not x.is_contiguous()
    sizes = tuning.constants("group_norm", arch, x.dtype, _shape_class(x))
    tile = _tile(C, C // num_groups, S, sizes["BLOCK"], channels_last)
    tile_c, block_s = tile["TILE_GROUPS"] * tile["GROUP"], tile["BLOCK_S"]
    # Whole waves of PROGRAMS, which run at once: more than one only if each of them then has PROGRAM elements.
    tiles, programs = B * (C // tile_c), sizes["PROGRAMS"]
    waves = min(x.numel() // (sizes["PROGRAM"] * programs), MOST_SPLITS * tiles // programs)
    splits = min(MOST_SPLITS, max(1, max(1, waves) * programs // tiles))
    chunk = round_up(cdiv(S, splits), block_s)
    splits = cdiv(S, chunk)
    stats = torch.empty(2, B, num_groups, splits, dtype=torch.float32, device=x.device)
    common: dict[str, Any] = {
        "x_ptr": x,
        "shift_ptr": None if shift is None else shift.contiguous(),
        "stats_ptr": stats,
    }
    common |= {"S": S, "chunk": chunk, "splits": splits, "partials": stats.numel() // 2}
    grid = (B * (C // tile_c) * splits,)
    even = S % block_s == 0 and (tile_c <= tile["BLOCK_C"] or tile_c % tile["BLOCK_C"] == 0)
    warps, stages = sizes["num_warps"], sizes["num_stages"]
    affine = {"weight_ptr": weight.contiguous(), "bias_ptr": bias.contiguous()}
    return y, [
        Launch(_stats_kernel, grid, common, {**tile, "EVEN": even}, warps, stages),
        Launch(
            _apply_kernel,
            grid,
            {**common, **affine, "y_ptr": y, "eps": eps},
            {**tile, "PAD_SPLITS": _power_of_2(splits), "SILU": silu},
            warps,
            stages,
        ),
    ]


def _shape_class(x: Tensor) -> str:
    if x.is_contiguous():
        return "contiguous"
    return "channels_last-large" if x.numel() >= LARGE else "channels_last"


def _tile(C: int, group: int, S: int, block: int, channels_last: bool) -> dict[str, Any]:
    """The constants of a tile of about `block` elements: whole groups, or one group in several steps."""
    groups = 1
    if channels_last:  # channels are contiguous: take enough groups to fill whole sectors
        divisors = [g for g in range(1, C // group + 1) if C // group % g == 0 and g * group <= 256]
        groups = next(
            (g for g in divisors if g * group >= 64 and g * group % 8 == 0), max(divisors, default=1)
        )
        block_c = min(_power_of_2(groups * group), 256)
        block_s = min(max(block // block_c, 1), _power_of_2(S))
    else:
        even = S & -S  # the largest power of two that divides it
        block_s = min(even if even >= 256 else _power_of_2(S), block)
        block_c = min(group & -group, block // block_s)
        if block_c * block_s < block // 2:
            block_c = min(_power_of_2(group), max(block // block_s, 1))
    return {
        "C": C,
        "GROUP": group,
        "TILE_GROUPS": groups,
        "PAD_GROUPS": _power_of_2(groups),
        "BLOCK_C": block_c,
        "BLOCK_S": block_s,
        "CHANNELS_LAST": channels_last,
    }


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last; a contiguous copy of anything else."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
