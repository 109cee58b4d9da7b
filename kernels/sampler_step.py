"""One step of any sampler: guidance, prediction of x0, update of the latents and of their history.

A sampler is a table `[N, COLUMNS]` with one row of coefficients for each step, so that this one operator
serves them all. With `out` the guided model output, h_k what was kept k + 1 steps ago, z standard normal
noise:

    out   = out_uncond + s (out_cond - out_uncond)
    x0    = clamp(x0_x x + x0_out out, -clamp, clamp)
    x    <- w_x x + w_x0 x0 + w_out out + sum_k w_hk h_k + w_noise exp(l / 2) z
    h    <- (x0 or out, h_0, h_1) where the row says that this step is kept

where l = log_var_min (1 - v) / 2 + log_var_max (1 + v) / 2 if the model predicts its variance too, as v in
[-1, 1], and 0 if not.

Sources: guidance: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), equation 6; its rescaling:
Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), equations 14 to 16; l:
Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), equation 15.

Everything but the guidance rescaling is elementwise, so one pass over the latents is enough for it. Which
step it is, is read from a tensor: a recorded CUDA graph replays it for any table, sampler and number of
steps.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import tuning
from ._check import FLOATS, fail
from ._triton import Launch, arch_of, kernel, run, takes, tl, usable
from .registry import Case, OpSpec, register

__all__ = ["COLUMNS", "HISTORY", "KEEP_NOTHING", "KEEP_OUT", "KEEP_X0", "StepRow", "sampler_step", "step_row"]

_OP = "sampler_step"
_Number = TypeVar("_Number", float, Tensor)

KEEP_NOTHING, KEEP_X0, KEEP_OUT = 0.0, 1.0, 2.0
"""What a step puts into the history."""


class StepRow(NamedTuple, Generic[_Number]):
    """The columns of a sampler table, in order."""

    timestep: _Number
    """What the model is told, in training steps; not always whole."""
    input_scale: _Number
    """The model sees the latents times this."""
    x0_x: _Number
    x0_out: _Number
    clamp: _Number
    """Bound of |x0|; inf for none."""
    w_x: _Number
    w_x0: _Number
    w_out: _Number
    w_h0: _Number
    w_h1: _Number
    w_h2: _Number
    w_noise: _Number
    log_var_min: _Number
    log_var_max: _Number
    keep: _Number
    """KEEP_NOTHING, KEEP_X0 or KEEP_OUT."""


COLUMNS = len(StepRow._fields)
HISTORY = 3
"""Tensors kept from earlier steps; PNDM needs three, DPM++ 2M one, the others none."""


@kernel
def _at(p, plane, CHANNELS, CHANNELS_LAST: tl.constexpr):
    """Where element p of an image [C, h, w] lies in one of `CHANNELS` channels, in either layout."""
    if CHANNELS_LAST:
        return p % plane * CHANNELS + p // plane
    return p


@kernel
def _ratio_kernel(
    out_ptr,  # [2B, channels, h, w], or [2B, h, w, channels] where CHANNELS_LAST
    scale_ptr,  # [B] or None
    ratio_ptr,  # [B]
    scale,
    B,
    P,  # elements of an image, all channels
    BLOCK: tl.constexpr,
):
    """std(conditional) / std(guided) of each image: means, then deviations."""
    b = tl.program_id(0).to(tl.int64)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + b)
    p_uncond = out_ptr + b * P
    p_cond = out_ptr + (b + B) * P
    sum_cond = tl.zeros((BLOCK,), tl.float32)
    sum_guided = tl.zeros((BLOCK,), tl.float32)
    for p0 in range(0, P, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        uncond = tl.load(p_uncond + p, mask=p < P, other=0.0).to(tl.float32)
        cond = tl.load(p_cond + p, mask=p < P, other=0.0).to(tl.float32)
        sum_cond += cond
        sum_guided += uncond + scale * (cond - uncond)
    mean_cond = tl.sum(sum_cond, 0) / P
    mean_guided = tl.sum(sum_guided, 0) / P
    sum_cond = tl.zeros((BLOCK,), tl.float32)
    sum_guided = tl.zeros((BLOCK,), tl.float32)
    for p0 in range(0, P, BLOCK):
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
    scale_ptr,  # [B] or None
    ratio_ptr,  # [B] or None
    scale,
    rescale,
    B,
    P,  # elements of an image of x
    plane,  # h w
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GUIDED: tl.constexpr,
    VARIANCE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(P, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = p < P
    step = tl.load(step_ptr)
    row = table_ptr + step * COLUMNS

    OUT_CHANNELS: tl.constexpr = 2 * CHANNELS if VARIANCE else CHANNELS
    size = P * 2 if VARIANCE else P
    p_out = out_ptr + b * size  # the unconditional one where GUIDED
    p_cond = out_ptr + (b + B) * size
    at = _at(p, plane, OUT_CHANNELS, CHANNELS_LAST)
    out = tl.load(p_out + at, mask=mask, other=0.0).to(tl.float32)
    if VARIANCE:
        at_v = _at(p + P, plane, OUT_CHANNELS, CHANNELS_LAST)
        v = tl.load(p_out + at_v, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + b)
        out += scale * (tl.load(p_cond + at, mask=mask, other=0.0).to(tl.float32) - out)
        if VARIANCE:
            v += scale * (tl.load(p_cond + at_v, mask=mask, other=0.0).to(tl.float32) - v)
        if ratio_ptr is not None:
            factor = rescale * tl.load(ratio_ptr + b) + (1.0 - rescale)
            out *= factor
            if VARIANCE:
                v *= factor

    p_x = x_ptr + b * P + p
    b_x = tl.load(p_x, mask=mask, other=0.0)
    clamp = tl.load(row + 4)
    x0 = tl.load(row + 2) * b_x + tl.load(row + 3) * out
    x0 = tl.minimum(tl.maximum(x0, -clamp), clamp)
    y = tl.load(row + 5) * b_x + tl.load(row + 6) * x0 + tl.load(row + 7) * out
    if history_ptr is not None:
        p_h0 = history_ptr + b * P + p
        p_h1 = history_ptr + (b + B) * P + p
        p_h2 = history_ptr + (b + 2 * B) * P + p
        h0 = tl.load(p_h0, mask=mask, other=0.0)
        h1 = tl.load(p_h1, mask=mask, other=0.0)
        h2 = tl.load(p_h2, mask=mask, other=0.0)
        y += tl.load(row + 8) * h0 + tl.load(row + 9) * h1 + tl.load(row + 10) * h2
        keep = tl.load(row + 14)
        kept = p < tl.where(keep == 0.0, 0, P)  # KEEP_NOTHING
        tl.store(p_h0, tl.where(keep == 1.0, x0, out), mask=kept)  # KEEP_X0
        tl.store(p_h1, h0, mask=kept)
        tl.store(p_h2, h1, mask=kept)
    if noise_ptr is not None:
        z = tl.load(noise_ptr + (step * B + b) * P + p, mask=mask, other=0.0)
        if VARIANCE:
            share = (v + 1.0) * 0.5
            log_var = share * tl.load(row + 13) + (1.0 - share) * tl.load(row + 12)
            z *= tl.exp(log_var * 0.5)
        y += tl.load(row + 11) * z
    tl.store(p_x, y, mask=mask)


def step_row(table: Tensor, step: Tensor) -> StepRow[Tensor]:
    """The row of `table` [N, COLUMNS] at `step` (int64, one element), which the host never reads."""
    return StepRow(*table.index_select(0, step.reshape(1)).reshape(COLUMNS).unbind())


def sampler_step(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    guidance_scale: float | Tensor | None = None,
    guidance_rescale: float = 0.0,
) -> Tensor:
    """Take one step, in place. Computed in x's dtype whatever the model's; each image by itself, so that on
    the CPU it does not depend, to the bit, on the batch it is in.

    Args:
        x: latents [B, C, h, w], float32 (or float64); overwritten with the next latents.
        model_out: [B, C, h, w], or [2B, C, h, w] with guidance, the unconditional half first; 2C channels
            where the model predicts its variance too, in the second C. Any float dtype.
        history: [HISTORY, B, C, h, w] of x's dtype, the latest first; updated. Zero it before the first step.
            None for a table that keeps nothing.
        noise: [N, B, C, h, w] of x's dtype, standard normal, a row for each step. None for a table without
            noise.
        table: [N, COLUMNS] of x's dtype; its columns are `StepRow`.
        step: int64, one element, on x's device: the row to take.
        guidance_scale: s, a number or [B] of x's dtype; None for no guidance.
        guidance_rescale: share in [0, 1] of the guided output rescaled to the conditional one's deviation.

    Returns:
        x.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    _check(x, model_out, history, noise, table, step, guidance_scale, guidance_rescale)
    if takes(x):
        tensor = guidance_scale if isinstance(guidance_scale, Tensor) else None
        number = None if tensor is not None else guidance_scale
        torch.ops.latentrt.sampler_step(
            x, model_out, history, noise, table, step, tensor, number, guidance_rescale
        )
        return x
    return _reference(x, model_out, history, noise, table, step, guidance_scale, guidance_rescale)


def _reference(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    guidance_scale: float | Tensor | None = None,
    guidance_rescale: float = 0.0,
) -> Tensor:
    row = step_row(table, step)
    out = model_out.to(x.dtype)
    if guidance_scale is not None:
        out = _guide(out, guidance_scale, guidance_rescale)
    log_var: Tensor | None = None
    if out.shape[1] != x.shape[1]:
        out, share = out.chunk(2, dim=1)
        share = (share + 1) / 2
        log_var = share * row.log_var_max + (1 - share) * row.log_var_min

    x0 = (row.x0_x * x + row.x0_out * out).clamp(-row.clamp, row.clamp)
    following = row.w_x * x + row.w_x0 * x0 + row.w_out * out
    if history is not None:
        for weight, kept in zip((row.w_h0, row.w_h1, row.w_h2), history, strict=True):
            following = following + weight * kept
    if noise is not None:
        z = noise.index_select(0, step.reshape(1))[0]
        following = following + row.w_noise * (z if log_var is None else (log_var / 2).exp() * z)
    if history is not None:
        latest = torch.where(row.keep == KEEP_X0, x0, out)
        shifted = torch.cat([latest[None], history[:-1]])
        history.copy_(torch.where(row.keep == KEEP_NOTHING, history, shifted))
    return x.copy_(following)


def _guide(out: Tensor, scale: float | Tensor, rescale: float) -> Tensor:
    """[2B, ...] -> [B, ...]"""
    uncond, cond = out.chunk(2)
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, 1, 1, 1)
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    # One reduction for each image: a batched one sums in an order that depends on the batch.
    ratio = torch.stack([c.std() / g.std() for c, g in zip(cond, guided, strict=True)]).reshape(-1, 1, 1, 1)
    return rescale * (guided * ratio) + (1 - rescale) * guided


def _check(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    guidance_scale: float | Tensor | None,
    guidance_rescale: float,
) -> None:
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise fail(_OP, "x", "be [B, C, h, w] in float32 or float64", f"{tuple(x.shape)} in {x.dtype}")
    B, C, *size = x.shape
    rows = B if guidance_scale is None else 2 * B
    shapes = [(rows, C, *size), (rows, 2 * C, *size)]
    if tuple(model_out.shape) not in shapes or model_out.dtype not in FLOATS:
        need = f"be {shapes[0]}, or {shapes[1]} with a variance, of a float dtype"
        raise fail(_OP, "model_out", need, f"{tuple(model_out.shape)} in {model_out.dtype}")
    if table.ndim != 2 or table.shape[1] != COLUMNS:
        raise fail(_OP, "table", f"be [N, {COLUMNS}]", f"shape {tuple(table.shape)}")
    if step.dtype != torch.int64 or step.numel() != 1:
        raise fail(_OP, "step", "be one int64", f"{tuple(step.shape)} in {step.dtype}")
    if history is not None and tuple(history.shape) != (HISTORY, *x.shape):
        raise fail(_OP, "history", f"be {(HISTORY, *x.shape)}", f"shape {tuple(history.shape)}")
    if noise is not None and tuple(noise.shape) != (table.shape[0], *x.shape):
        raise fail(_OP, "noise", f"be {(table.shape[0], *x.shape)}", f"shape {tuple(noise.shape)}")
    scale = guidance_scale if isinstance(guidance_scale, Tensor) else None
    if scale is not None and tuple(scale.shape) != (B,):
        raise fail(_OP, "guidance_scale", f"be a number or [{B}]", f"shape {tuple(scale.shape)}")
    if not 0 <= guidance_rescale <= 1:
        raise fail(_OP, "guidance_rescale", "be in [0, 1]", guidance_rescale)
    others = {"table": table, "history": history, "noise": noise, "guidance_scale": scale}
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise fail(_OP, name, f"have x's dtype {x.dtype}", tensor.dtype)
    for name, tensor in {**others, "model_out": model_out, "step": step}.items():
        if tensor is not None and tensor.device != x.device:
            raise fail(_OP, name, f"be on x's device {x.device}", tensor.device)


def _plan(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    guidance_scale: float | Tensor | None = None,
    guidance_rescale: float = 0.0,
    *,
    arch: int,
) -> tuple[Tensor, list[Launch]]:
    """x and history must be contiguous: they are written in place."""
    B, C = x.shape[:2]
    P = x[0].numel() if B else 0
    if x.numel() == 0:
        return x, []
    channels_last = not model_out.is_contiguous()
    if channels_last and not model_out.is_contiguous(memory_format=torch.channels_last):
        model_out, channels_last = model_out.contiguous(), False
    sizes = tuning.constants("sampler_step", arch, x.dtype, "any")
    tensor = guidance_scale.contiguous() if isinstance(guidance_scale, Tensor) else None
    number = 0.0 if guidance_scale is None or tensor is not None else float(guidance_scale)
    guided = guidance_scale is not None
    ratio = None
    launches = []
    if guided and guidance_rescale > 0:
        ratio = torch.empty(B, dtype=x.dtype, device=x.device)
        args = {"out_ptr": model_out, "scale_ptr": tensor, "ratio_ptr": ratio, "scale": number, "B": B}
        args["P"] = model_out[0].numel()
        launches.append(Launch(_ratio_kernel, (B,), args, {"BLOCK": 4096}, num_warps=16))
    launches.append(
        Launch(
            _step_kernel,
            (B * -(-P // sizes["BLOCK"]),),
            {
                "x_ptr": x,
                "out_ptr": model_out,
                "history_ptr": history,
                "noise_ptr": None if noise is None else noise.contiguous(),
                "table_ptr": table.contiguous(),
                "step_ptr": step,
                "scale_ptr": tensor,
                "ratio_ptr": ratio,
                "scale": number,
                "rescale": float(guidance_rescale),
                "B": B,
                "P": P,
                "plane": P // C,
            },
            {
                "CHANNELS": C,
                "COLUMNS": COLUMNS,
                "GUIDED": guided,
                "VARIANCE": model_out.shape[1] != C,
                "CHANNELS_LAST": channels_last,
                "BLOCK": sizes["BLOCK"],
            },
            sizes["num_warps"],
            sizes["num_stages"],
        )
    )
    return x, launches


@torch.library.custom_op("latentrt::sampler_step", mutates_args=("x", "history"))
def _op(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    scale_tensor: Tensor | None,
    scale: float | None,
    guidance_rescale: float,
) -> None:
    both = scale if scale_tensor is None else scale_tensor
    if not usable(x):
        _reference(x, model_out, history, noise, table, step, both, guidance_rescale)
        return
    dense_x = x.contiguous()
    dense_history = None if history is None else history.contiguous()
    arch = arch_of(x.device)
    run(_plan(dense_x, model_out, dense_history, noise, table, step, both, guidance_rescale, arch=arch)[1])
    if dense_x is not x:
        x.copy_(dense_x)
    if history is not None and dense_history is not None and dense_history is not history:
        history.copy_(dense_history)


@_op.register_fake
def _(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    scale_tensor: Tensor | None,
    scale: float | None,
    guidance_rescale: float,
) -> None:
    return None


def _inputs(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """One image at 1024x1024 with guidance, history and noise; the model's output of `dtype`."""
    x = torch.randn(1, 4, 128, 128, device=device)
    out = torch.randn(2, 4, 128, 128, device=device).to(dtype)
    history = torch.randn(HISTORY, *x.shape, device=device)
    noise = torch.randn(30, *x.shape, device=device)
    table = torch.rand(30, COLUMNS, device=device)
    return x, out, history, noise, table, torch.zeros(1, dtype=torch.int64, device=device), 7.5


register(
    OpSpec(
        name=_OP,
        op=sampler_step,
        reference=_reference,
        plan=_plan,
        cases=[Case("1024 x 1024", _inputs, flops=0, elements=(2 + 2 + 6 + 1) * 4 * 128 * 128)],
        limit="copy",
        candidates={
            _OP: [
                {"BLOCK": block, "num_warps": warps, "num_stages": 1}
                for block in (256, 512, 1024, 2048)
                for warps in (2, 4, 8)
            ]
        },
    )
)
