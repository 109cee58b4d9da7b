"""One step of any sampler: guidance, prediction of x0, update of the latents and of their history.

A sampler is a table `[N, COLUMNS]` with one row of coefficients for each step, so that this one operator
serves them all. With `out` the guided model output, h_k what was kept k + 1 steps ago, z standard normal
noise, s the guidance scale and r its rescale:

    out   = out_uncond + s (out_cond - out_uncond)
    out  <- (r std(out_cond) / std(out) + 1 - r) out
    x0    = clamp(x0_x x + x0_out out, -clamp, clamp)
    x    <- w_x x + w_x0 x0 + w_out out + sum_k w_hk h_k + w_noise exp(l / 2) z
    h    <- (x0 or out, h_0, h_1) where the row says that this step is kept

where l = log_var_min (1 - v) / 2 + log_var_max (1 + v) / 2 if the model predicts its variance too, as v in
[-1, 1], and 0 if not.

Sources: guidance: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), equation 6; its rescaling:
Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), equations 14 to 16; l:
Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), equation 15.

All but the two standard deviations is elementwise: one pass over the latents. The index of the step is read from a
tensor, so that one captured CUDA graph serves any table, sampler and number of steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._check import FLOATS, fail, require_own_memory, require_tensors
from ._dispatch import arch_of, launches_triton, uses_custom_op
from ._sampler_step_triton import plan
from ._triton import run
from .registry import Case, OpSpec, register

__all__ = ["COLUMNS", "HISTORY", "KEEP_NOTHING", "KEEP_OUT", "KEEP_X0", "StepRow", "sampler_step", "step_row"]

_OP = "sampler_step"
_Number = TypeVar("_Number", float, Tensor)

KEEP_NOTHING, KEEP_X0, KEEP_OUT = 0.0, 1.0, 2.0
"""What a step puts into the history."""


class StepRow(NamedTuple, Generic[_Number]):
    """The columns of a sampler table, in order."""

    timestep: _Number
    """The timestep that the model is conditioned on, in training steps; not always whole."""
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
    guidance_scale: Tensor | None = None,
    guidance_rescale: Tensor | None = None,
) -> Tensor:
    """Take one step, in place. It is computed in x's dtype, whatever the model's, and for each image by itself: on the
    CPU the result is the same to the bit in any batch.

    Args:
        x: latents [B, C, h, w], float32 (or float64); overwritten with the next latents.
        model_out: [B, C, h, w], or [2B, C, h, w] with guidance, the unconditional half first; 2C channels
            where the model predicts its variance too, in the second C. Any float dtype.
        history: [HISTORY, B, C, h, w] of x's dtype, the latest first; updated. Zero it before the first step.
            None for a table that keeps nothing.
        noise: [N, B, C, h, w] of x's dtype, standard normal, a row for each step. None for a table without
            noise.
        table: [N, COLUMNS] of x's dtype; its columns are `StepRow`.
        step: int64, one element, on x's device: the row to take. The host does not read it: one outside the table makes
            x NaN where the kernel runs, and is refused on the CPU.
        guidance_scale: s, [B] of x's dtype; None for no guidance.
        guidance_rescale: r, [B] of x's dtype, in [0, 1] (the host does not read it); None where the scale is. 0 leaves
            the guided output as it is, to the bit.

    Returns:
        x.

    Raises:
        KernelArgumentError: naming the argument and what it got.
    """
    _check(x, model_out, history, noise, table, step, guidance_scale, guidance_rescale)
    if uses_custom_op(x):
        torch.ops.latentrt.sampler_step(
            x, model_out, history, noise, table, step, guidance_scale, guidance_rescale
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
    guidance_scale: Tensor | None = None,
    guidance_rescale: Tensor | None = None,
) -> Tensor:
    try:
        row = step_row(table, step)
    except IndexError as error:  # the CPU's; on a GPU nothing is read back to be looked at
        raise fail(_OP, "step", f"be one of the table's {table.shape[0]} rows", step.tolist()) from error
    out = model_out.to(x.dtype)
    if guidance_scale is not None and guidance_rescale is not None:
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


def _guide(out: Tensor, scale: Tensor, rescale: Tensor) -> Tensor:
    """[2B, ...] -> [B, ...]; scale and rescale are [B]."""
    uncond, cond = out.chunk(2)
    scale, rescale = scale.reshape(-1, 1, 1, 1), rescale.reshape(-1, 1, 1, 1)
    guided = uncond + scale * (cond - uncond)
    if len(guided) == 0:
        return guided
    # One reduction for each image: a batched one sums in an order that depends on the batch.
    ratio = torch.stack([c.std() / g.std() for c, g in zip(cond, guided, strict=True)]).reshape(-1, 1, 1, 1)
    rescaled = rescale * (guided * ratio) + (1 - rescale) * guided
    # A flat output's ratio is not finite, and 0 times it is NaN.
    return torch.where(rescale == 0, guided, rescaled)


def _check(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    guidance_scale: Tensor | None,
    guidance_rescale: Tensor | None,
) -> None:
    tensors = {"x": x, "model_out": model_out, "table": table, "step": step}
    guidance = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
    optional = {"history": history, "noise": noise, **guidance}
    require_tensors(_OP, {**tensors, **optional}, optional=optional)
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64):
        raise fail(_OP, "x", "be [B, C, h, w] in float32 or float64", f"{tuple(x.shape)} in {x.dtype}")
    B, C, *size = x.shape
    rows = B if guidance_scale is None else 2 * B
    shapes = [(rows, C, *size), (rows, 2 * C, *size)]
    if tuple(model_out.shape) not in shapes or model_out.dtype not in FLOATS:
        need = f"be {shapes[0]}, or {shapes[1]} with a variance, of a float dtype"
        raise fail(_OP, "model_out", need, f"{tuple(model_out.shape)} in {model_out.dtype}")
    if table.ndim != 2 or table.shape[1] != COLUMNS or table.shape[0] < 1:
        need = f"be [N, {COLUMNS}] with a row at least"
        raise fail(_OP, "table", need, f"shape {tuple(table.shape)}")
    if step.dtype != torch.int64 or step.numel() != 1:
        raise fail(_OP, "step", "be one int64", f"{tuple(step.shape)} in {step.dtype}")
    if history is not None and tuple(history.shape) != (HISTORY, *x.shape):
        raise fail(_OP, "history", f"be {(HISTORY, *x.shape)}", f"shape {tuple(history.shape)}")
    if noise is not None and tuple(noise.shape) != (table.shape[0], *x.shape):
        raise fail(_OP, "noise", f"be {(table.shape[0], *x.shape)}", f"shape {tuple(noise.shape)}")
    if (guidance_scale is None) != (guidance_rescale is None):
        need = "be given with guidance_scale, and only then"
        raise fail(_OP, "guidance_rescale", need, guidance_rescale)
    for name, tensor in guidance.items():
        if tensor is not None and tuple(tensor.shape) != (B,):
            raise fail(_OP, name, f"be [{B}]", f"shape {tuple(tensor.shape)}")
    others = {"table": table, **optional}
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise fail(_OP, name, f"have x's dtype {x.dtype}", tensor.dtype)
    for name, tensor in {**others, "model_out": model_out, "step": step}.items():
        if tensor is not None and tensor.device != x.device:
            raise fail(_OP, name, f"be on x's device {x.device}", tensor.device)
    require_own_memory(_OP, "x", x)
    if history is not None:
        require_own_memory(_OP, "history", history)


@torch.library.custom_op("latentrt::sampler_step", mutates_args=("x", "history"))
def _op(
    x: Tensor,
    model_out: Tensor,
    history: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    step: Tensor,
    guidance_scale: Tensor | None,
    guidance_rescale: Tensor | None,
) -> None:
    guidance = guidance_scale, guidance_rescale
    if not launches_triton(x):
        _reference(x, model_out, history, noise, table, step, *guidance)
        return
    dense_x = x.contiguous()
    dense_history = None if history is None else history.contiguous()
    arch = arch_of(x.device)
    run(plan(dense_x, model_out, dense_history, noise, table, step, *guidance, arch=arch)[1])
    if dense_x is not x:
        x.copy_(dense_x)
    if history is not None and dense_history is not None and dense_history is not history:
        history.copy_(dense_history)


@_op.register_fake
def _(*_: Tensor | None) -> None:
    return None


_LATENTS = 4 * 128 * 128
"""Elements of one image at 1024x1024. A step reads and writes them, two outputs of the model (its dtype), a row of
noise, and the history: read and written three times."""


def _inputs(dtype: torch.dtype, device: torch.device, rescale: float) -> tuple[Any, ...]:
    """One image at 1024x1024 with guidance, history and noise; the model's output in `dtype`."""
    x = torch.randn(1, 4, 128, 128, device=device)
    out = torch.randn(2, 4, 128, 128, device=device).to(dtype)
    history = torch.randn(HISTORY, *x.shape, device=device)
    noise = torch.randn(30, *x.shape, device=device)
    table = torch.rand(30, COLUMNS, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    guidance = (torch.full((1,), value, device=device) for value in (7.5, rescale))
    return x, out, history, noise, table, step, *guidance


def _case(name: str, rescale: float, calls: int) -> Case:
    inputs = partial(_inputs, rescale=rescale)
    return Case(name, inputs, flops=0, elements=11 * _LATENTS, calls=calls, float32=9 * _LATENTS)


register(
    OpSpec(
        name=_OP,
        op=sampler_step,
        reference=_reference,
        plan=plan,
        # The same two launches: where the rescale is 0, as by default, the first has nothing to do.
        cases=[_case("1024 x 1024", 0.0, calls=1), _case("1024 x 1024, rescaled", 0.2, calls=0)],
        limit="copy",
        candidates={
            "sampler_step": [
                {"BLOCK": block, "num_warps": warps, "num_stages": 1}
                for block in (256, 512, 1024, 2048)
                for warps in (2, 4, 8)
            ],
            "sampler_step_ratio": [
                {"BLOCK": block, "num_warps": warps, "num_stages": 1}
                for block in (2048, 4096, 8192)
                for warps in (8, 16, 32)
            ],
        },
        baselines={"PyTorch's operators": _reference},
    )
)
