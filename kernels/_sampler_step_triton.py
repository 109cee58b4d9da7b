"""The Triton kernels of a sampler's step, and how they are launched: see `sampler_step`.

The step itself is one pass over the latents. Guidance rescaling needs two standard deviations before it, which a launch
of one program per image takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tuning
from ._triton import Launch, cdiv, kernel, tl

__all__ = ["plan"]


@kernel
def _at(p, plane, CHANNELS, CHANNELS_LAST: tl.constexpr):
    """Offset of element p, counted in [C, h, w], within an image of `CHANNELS` channels in either layout."""
    if CHANNELS_LAST:
        return p % plane * CHANNELS + p // plane
    return p


@kernel
def _ratio_kernel(
    out_ptr,  # [2B, channels, h, w], or [2B, h, w, channels] where CHANNELS_LAST
    scale_ptr,  # [B]
    rescale_ptr,  # [B]
    ratio_ptr,  # [B]
    B,
    P,  # elements of an image, all channels
    BLOCK: tl.constexpr,
):
    """std(conditional) / std(guided) of each image: means, then deviations. Where the rescale is 0 no element is read,
    and the step does not use the ratio, which is NaN."""
    b = tl.program_id(0).to(tl.int64)
    end = tl.where(tl.load(rescale_ptr + b) == 0.0, 0, P)
    scale = tl.load(scale_ptr + b)
    p_uncond = out_ptr + b * P
    p_cond = out_ptr + (b + B) * P
    sum_cond = tl.zeros((BLOCK,), tl.float32)
    sum_guided = tl.zeros((BLOCK,), tl.float32)
    for p0 in range(0, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        uncond = tl.load(p_uncond + p, mask=p < P, other=0.0).to(tl.float32)
        cond = tl.load(p_cond + p, mask=p < P, other=0.0).to(tl.float32)
        sum_cond += cond
        sum_guided += uncond + scale * (cond - uncond)
    mean_cond = tl.sum(sum_cond, 0) / P
    mean_guided = tl.sum(sum_guided, 0) / P
    sum_cond = tl.zeros((BLOCK,), tl.float32)
    sum_guided = tl.zeros((BLOCK,), tl.float32)
    for p0 in range(0, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        uncond = tl.load(p_uncond + p, mask=p < P, other=0.0).to(tl.float32)
        cond = tl.load(p_cond + p, mask=p < P, other=0.0).to(tl.float32)
        d = tl.where(p < P, cond - mean_cond, 0.0)
        sum_cond += d * d
        d = tl.where(p < P, uncond + scale * (cond - uncond) - mean_guided, 0.0)
        sum_guided += d * d
    tl.store(ratio_ptr + b, tl.sqrt(tl.sum(sum_cond, 0) / tl.sum(sum_guided, 0)))


@kernel
def _step_kernel(
    x_ptr,  # [B, C, h, w], overwritten
    out_ptr,  # [B or 2B, C or 2C, h, w], or channels last
    history_ptr,  # [3, B, C, h, w], overwritten, or None
    noise_ptr,  # [N, B, C, h, w] or None
    table_ptr,  # [N, COLUMNS]
    step_ptr,  # int64, one element
    scale_ptr,  # [B], or None without guidance, as are the next two
    ratio_ptr,  # [B]
    rescale_ptr,  # [B]
    B,
    N,  # rows of the table
    P,  # elements of an image of x
    plane,  # h w
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VARIANCE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(P, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = p < P
    step = tl.load(step_ptr)
    in_table = (step >= 0) & (step < N)
    step = tl.where(in_table, step, 0)
    row = table_ptr + step * COLUMNS  # in the order of StepRow
    x0_x, x0_out, clamp = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    w_x, w_x0, w_out = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    w_h0, w_h1, w_h2 = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10)
    w_noise, log_var_min, log_var_max = tl.load(row + 11), tl.load(row + 12), tl.load(row + 13)
    keep = tl.load(row + 14)

    OUT_CHANNELS: tl.constexpr = 2 * CHANNELS if VARIANCE else CHANNELS
    size = P * 2 if VARIANCE else P
    p_out = out_ptr + b * size  # the unconditional one if guided
    p_cond = out_ptr + (b + B) * size
    at = _at(p, plane, OUT_CHANNELS, CHANNELS_LAST)
    out = tl.load(p_out + at, mask=mask, other=0.0).to(tl.float32)
    if VARIANCE:
        at_v = _at(p + P, plane, OUT_CHANNELS, CHANNELS_LAST)
        v = tl.load(p_out + at_v, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale, rescale = tl.load(scale_ptr + b), tl.load(rescale_ptr + b)
        factor = rescale * tl.load(ratio_ptr + b) + (1.0 - rescale)
        factor = tl.where(rescale == 0.0, 1.0, factor)  # the ratio is not finite then
        out += scale * (tl.load(p_cond + at, mask=mask, other=0.0).to(tl.float32) - out)
        out *= factor
        if VARIANCE:
            v += scale * (tl.load(p_cond + at_v, mask=mask, other=0.0).to(tl.float32) - v)
            v *= factor

    p_x = x_ptr + b * P + p
    b_x = tl.load(p_x, mask=mask, other=0.0)
    x0 = x0_x * b_x + x0_out * out
    x0 = tl.minimum(tl.maximum(x0, -clamp), clamp)
    y = w_x * b_x + w_x0 * x0 + w_out * out
    if history_ptr is not None:
        p_h0 = history_ptr + b * P + p
        p_h1 = history_ptr + (b + B) * P + p
        p_h2 = history_ptr + (b + 2 * B) * P + p
        h0 = tl.load(p_h0, mask=mask, other=0.0)
        h1 = tl.load(p_h1, mask=mask, other=0.0)
        h2 = tl.load(p_h2, mask=mask, other=0.0)
        y += w_h0 * h0 + w_h1 * h1 + w_h2 * h2
        kept = p < tl.where(in_table & (keep != 0.0), P, 0)  # KEEP_NOTHING
        tl.store(p_h0, tl.where(keep == 1.0, x0, out), mask=kept)  # KEEP_X0
        tl.store(p_h1, h0, mask=kept)
        tl.store(p_h2, h1, mask=kept)
    if noise_ptr is not None:
        z = tl.load(noise_ptr + (step * B + b) * P + p, mask=mask, other=0.0)
        if VARIANCE:
            share = (v + 1.0) * 0.5
            log_var = share * log_var_max + (1.0 - share) * log_var_min
            z *= tl.exp(log_var * 0.5)
        y += w_noise * z
    tl.store(p_x, tl.where(in_table, y, float("nan")), mask=mask)


def plan(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    guidance_scale: Tensor | None = None,
    guidance_rescale: Tensor | None = None,
    *,
    arch: int,
) -> tuple[Tensor, list[Launch]]:
    """x, and the launches that write it and history in place; both must be contiguous."""
    B, C = x.shape[:2]
    P = x[0].numel() if B else 0
    if x.numel() == 0:
        return x, []
    channels_last = not model_out.is_contiguous()
    if channels_last and not model_out.is_contiguous(memory_format=torch.channels_last):
        model_out, channels_last = model_out.contiguous(), False
    guidance: dict[str, Tensor | None] = {"scale_ptr": None, "rescale_ptr": None, "ratio_ptr": None}
    launches = []
    if guidance_scale is not None and guidance_rescale is not None:
        guidance = {
            "scale_ptr": guidance_scale.contiguous(),
            "rescale_ptr": guidance_rescale.contiguous(),
            "ratio_ptr": torch.empty(B, dtype=x.dtype, device=x.device),
        }
        args = {"out_ptr": model_out, **guidance, "B": B, "P": model_out[0].numel()}
        sizes = tuning.constants("sampler_step_ratio", arch, x.dtype, "any")
        constants = {"BLOCK": sizes["BLOCK"]}
        launches.append(Launch(_ratio_kernel, (B,), args, constants, sizes["num_warps"], sizes["num_stages"]))
    sizes = tuning.constants("sampler_step", arch, x.dtype, "any")
    launches.append(
        Launch(
            _step_kernel,
            (B * cdiv(P, sizes["BLOCK"]),),
            {
                "x_ptr": x,
                "out_ptr": model_out,
                "history_ptr": history,
                "noise_ptr": None if noise is None else noise.contiguous(),
                "table_ptr": table.contiguous(),
                "step_ptr": step,
                **guidance,
                "B": B,
                "N": table.shape[0],
                "P": P,
                "plane": P // C,
            },
            {
                "CHANNELS": C,
                "COLUMNS": table.shape[1],
                "VARIANCE": model_out.shape[1] != C,
                "CHANNELS_LAST": channels_last,
                "BLOCK": sizes["BLOCK"],
            },
            sizes["num_warps"],
            sizes["num_stages"],
        )
    )
    return x, launches
