"""The one step operator against the formula, written out for one image in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from latentrt.errors import KernelArgumentError
from latentrt.kernels.sampler_step import (
    COLUMNS,
    HISTORY,
    KEEP_NOTHING,
    KEEP_OUT,
    KEEP_X0,
    StepRow,
    sampler_step,
)
from tolerances import SAMPLER_STEP
from torch import Tensor

SHAPES = [
    (1, 4, 128, 128),  # SDXL at 1024x1024
    (3, 4, 5, 7),  # odd, so that images begin anywhere in a vector register
    (2, 1, 1, 1),  # tiny
]


def random_table(rows: int, *, keep: float, seed: int = 0, clamp: float = math.inf) -> Tensor:
    draw = random.Random(seed)
    table = torch.tensor([[draw.uniform(-1, 1) for _ in range(COLUMNS)] for _ in range(rows)])
    table[:, StepRow._fields.index("clamp")] = clamp
    table[:, StepRow._fields.index("keep")] = keep
    return table


def guidance(scale: float | None, rescale: float, images: int) -> tuple[Tensor | None, Tensor | None]:
    """The operator's last two arguments."""
    return (None, None) if scale is None else (torch.full((images,), scale), torch.full((images,), rescale))


def expected(
    x: Tensor,
    out: Tensor,
    h: Tensor,
    z: Tensor,
    row: Tensor,
    scale: float | None,
    rescale: float,
) -> tuple[Tensor, Tensor]:
    """One image [C, h, w]; out [1 or 2, C or 2C, h, w], h [HISTORY, C, h, w]. The docstring's formula."""
    x, out, h, z = x.double(), out.double(), h.double(), z.double()
    c = dict(zip(StepRow._fields, row.double().tolist(), strict=True))
    guided = out[-1]
    if scale is not None:
        guided = out[0] + scale * (out[1] - out[0])
        if rescale:
            guided = rescale_noise_cfg(guided[None], out[1][None], guidance_rescale=rescale)[0]
    deviation = torch.ones(())
    if guided.shape[0] == 2 * x.shape[0]:
        guided, v = guided.chunk(2)
        deviation = torch.exp((c["log_var_min"] * (1 - v) / 2 + c["log_var_max"] * (1 + v) / 2) / 2)
    x0 = (c["x0_x"] * x + c["x0_out"] * guided).clamp(-c["clamp"], c["clamp"])
    y = c["w_x"] * x + c["w_x0"] * x0 + c["w_out"] * guided
    y = y + c["w_h0"] * h[0] + c["w_h1"] * h[1] + c["w_h2"] * h[2] + c["w_noise"] * deviation * z
    latest = {KEEP_X0: x0, KEEP_OUT: guided, KEEP_NOTHING: None}[c["keep"]]
    return y, h if latest is None else torch.stack([latest, h[0], h[1]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [KEEP_NOTHING, KEEP_X0, KEEP_OUT])
@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(
    ("scale", "rescale", "clamp"), [(None, 0.0, math.inf), (7.5, 0.0, 0.5), (3.0, 0.7, math.inf)]
)
def test_formula(
    shape: tuple[int, ...], keep: float, variance: bool, scale: float | None, rescale: float, clamp: float
) -> None:
    B, C, *size = shape
    if scale is not None and C * size[0] == 1:
        shape = B, C, *size = (2, 2, 1, 1)  # one number has no deviation
    g = torch.Generator().manual_seed(1)
    table = random_table(5, keep=keep, clamp=clamp)
    x = torch.randn(shape, generator=g)
    out = torch.randn((B if scale is None else 2 * B, 2 * C if variance else C, *size), generator=g)
    history = torch.randn((HISTORY, *shape), generator=g)
    noise = torch.full((5, *shape), math.nan)
    noise[3] = torch.randn(shape, generator=g)
    y, h = x.clone(), history.clone()
    returned = sampler_step(y, out, h, noise, table, torch.tensor([3]), *guidance(scale, rescale, B))
    assert returned is y
    for k in range(B):
        rows = out[k::B]
        want, want_h = expected(x[k], rows, history[:, k], noise[3, k], table[3], scale, rescale)
        assert (y[k] - want).abs().max() <= SAMPLER_STEP * want.abs().max()
        assert (h[:, k] - want_h).abs().max() <= SAMPLER_STEP * want_h.abs().max()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("shape", [(5, 4, 16, 16), (5, 4, 5, 7), (3, 3, 1, 3)])
def test_an_image_does_not_depend_on_its_batch(shape: tuple[int, ...], rescale: float) -> None:
    """To the bit, where the learned variance takes an exponential and rescaling a deviation."""
    B, C, *size = shape
    g = torch.Generator().manual_seed(2)
    table = random_table(2, keep=KEEP_X0, seed=3)
    x, out = torch.randn(shape, generator=g), torch.randn((2 * B, 2 * C, *size), generator=g)
    history, noise = torch.randn((HISTORY, *shape), generator=g), torch.randn((2, *shape), generator=g)
    scales, rescales = torch.linspace(1.5, 9, B), torch.full((B,), rescale)
    step = torch.tensor([1])
    y, h = x.clone(), history.clone()
    sampler_step(y, out, h, noise, table, step, scales, rescales)
    for k in range(B):
        alone, h_alone = x[k : k + 1].clone(), history[:, k : k + 1].clone()
        each = scales[k : k + 1], rescales[k : k + 1]
        sampler_step(alone, out[k::B], h_alone, noise[:, k : k + 1], table, step, *each)
        assert alone[0].equal(y[k])
        assert h_alone[:, 0].equal(h[:, k])


def test_a_rescale_of_0_is_none() -> None:
    """To the bit, even of a flat output, whose ratio is no number; other images of the batch are rescaled."""
    g = torch.Generator().manual_seed(2)
    table, step = random_table(2, keep=KEEP_NOTHING, seed=3), torch.tensor([1])
    x, out = torch.randn(3, 4, 6, 5, generator=g), torch.randn(6, 4, 6, 5, generator=g)
    out[1::3] = 0.25
    scale = torch.full((3,), 3.0)
    y = sampler_step(x.clone(), out, None, None, table, step, scale, torch.tensor([0.7, 0.0, 0.0]))
    uncond, cond = out.chunk(2)
    guided = uncond + 3.0 * (cond - uncond)
    plain = sampler_step(x.clone(), guided, None, None, table, step)
    assert y[1:].equal(plain[1:])
    assert not y[0].allclose(plain[0])
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_do_not_touch_the_latents_precision(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    table = random_table(1, keep=KEEP_NOTHING)
    x, out = torch.randn(2, 4, 8, 8, generator=g), torch.randn(4, 4, 8, 8, generator=g).to(dtype)
    step = torch.tensor([0])
    y = sampler_step(x.clone(), out, None, None, table, step, *guidance(7.5, 0.0, 2))
    same = sampler_step(x.clone(), out.float(), None, None, table, step, *guidance(7.5, 0.0, 2))
    assert y.dtype == torch.float32
    assert y.equal(same)


def test_steps_are_read_from_the_tensor() -> None:
    table = random_table(4, keep=KEEP_NOTHING)
    step = torch.zeros(1, dtype=torch.int64)
    x, out = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    results = []
    for _ in range(4):
        results.append(float(sampler_step(x.clone(), out, None, None, table, step)[0, 0, 0, 0]))
        step += 1
    c = StepRow(*table.unbind(1))
    assert results == pytest.approx((c.w_x + c.w_x0 * c.x0_x).tolist())


def good() -> dict[str, object]:
    x = torch.zeros(2, 4, 8, 8)
    return {
        "x": x,
        "model_out": torch.zeros(4, 4, 8, 8),
        "history": torch.zeros(HISTORY, 2, 4, 8, 8),
        "noise": torch.zeros(6, 2, 4, 8, 8),
        "table": torch.zeros(6, COLUMNS),
        "step": torch.zeros(1, dtype=torch.int64),
        "guidance_scale": torch.full((2,), 7.5),
        "guidance_rescale": torch.zeros(2),
    }


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("x", None, "x must be a torch.Tensor, got NoneType"),
        ("table", [[0.0] * COLUMNS], "table must be a torch.Tensor, got list"),
        ("step", 3, "step must be a torch.Tensor, got int"),
        ("guidance_scale", 7.5, "guidance_scale must be a torch.Tensor, got float"),
        ("guidance_rescale", None, "guidance_rescale must be given with guidance_scale, .*, got None"),
        ("x", torch.zeros(2, 4, 8), "x must be"),
        ("x", torch.zeros(2, 4, 8, 8).half(), "x must be"),
        ("model_out", torch.zeros(2, 4, 8, 8), "model_out must be"),  # guided, but only one half
        ("model_out", torch.zeros(4, 5, 8, 8), "model_out must be"),
        ("model_out", torch.zeros(4, 4, 8, 8, dtype=torch.int64), "model_out must be"),
        ("guidance_scale", None, "model_out must be"),  # two halves, but not guided
        ("guidance_scale", torch.ones(3), "guidance_scale must be"),
        ("guidance_scale", torch.ones(2).double(), "guidance_scale must have"),
        ("guidance_rescale", torch.ones(3), "guidance_rescale must be"),
        ("guidance_rescale", torch.ones(2).double(), "guidance_rescale must have"),
        ("table", torch.zeros(6, 4), "table must be"),
        ("table", torch.zeros(6, COLUMNS).double(), "table must have"),
        ("table", torch.zeros(0, COLUMNS), "table must be .* a row at least, got shape"),
        ("step", torch.tensor([6]), r"step must be one of the table's 6 rows, got \[6\]"),
        ("step", torch.tensor(-1), "step must be one of the table's 6 rows, got -1"),
        ("step", torch.zeros(1), "step must be"),
        ("step", torch.zeros(2, dtype=torch.int64), "step must be"),
        ("history", torch.zeros(1, 2, 4, 8, 8), "history must be"),
        ("noise", torch.zeros(5, 2, 4, 8, 8), "noise must be"),
        ("noise", torch.zeros(6, 2, 4, 8, 8, device="meta"), "noise must be on"),
    ],
)
def test_arguments_are_checked(argument: str, value: object, named: str) -> None:
    sampler_step(**good())  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match=f"sampler_step: {named}"):
        sampler_step(**{**good(), argument: value})  # type: ignore[arg-type]


def test_a_rescale_without_a_scale() -> None:
    unguided = {**good(), "model_out": torch.zeros(2, 4, 8, 8), "guidance_scale": None}
    with pytest.raises(KernelArgumentError, match="guidance_rescale must be given with guidance_scale"):
        sampler_step(**unguided)  # type: ignore[arg-type]
