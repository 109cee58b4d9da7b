"""The loop: guidance, callbacks, static tensors, and images that do not know of each other."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from helpers.loops import denoise
from helpers.sampler_oracle import (
    CLASSES,
    config_of,
    diffusers_steps,
    generators,
    make_scheduler,
    model,
    noise_like,
)
from latentrt.errors import KernelArgumentError
from latentrt.kernels.sampler_step import sampler_step
from latentrt.runtime.denoise import DenoiseState, LoopKind, LoopRequest
from latentrt.runtime.latents import NoiseSource
from latentrt.runtime.sampler import SamplerTable, build_table
from tolerances import SAMPLER_TRAJECTORY, relative_error
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

CPU = torch.device("cpu")
X = noise_like(2, 4, 8, 8)


def table_for(name: str, steps: int = 6) -> SamplerTable:
    return build_table(config_of(make_scheduler(name)), steps)


def noise_for(table: SamplerTable, batch: int = 2) -> Tensor | None:
    return NoiseSource(generators(batch), batch).draw_steps(table, X.shape[1:], CPU)


def halves(x: Tensor, t: Tensor) -> Tensor:
    """A model whose conditional half (the second) differs, by little, so that guidance does not blow it up."""
    uncond, cond = model(x, t).chunk(2)
    return torch.cat([uncond, cond + 0.05 * torch.cos(x.chunk(2)[1])])


def guided(name: str, scale: float, rescale: float = 0.0) -> Tensor:
    table = table_for(name)
    return denoise(
        halves,
        X * table.init_noise_sigma,
        table,
        guidance_scale=scale,
        guidance_rescale=rescale,
        noise=noise_for(table),
    )


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", CLASSES)
def test_guidance_is_diffusers(name: str, rescale: float) -> None:
    def unet(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = halves(torch.cat([x] * 2), torch.cat([t] * 2)).chunk(2)
        out = uncond + 7.5 * (cond - uncond)
        return rescale_noise_cfg(out, cond, guidance_rescale=rescale) if rescale else out

    scheduler = make_scheduler(name)
    scheduler.set_timesteps(6)
    start = X * scheduler.init_noise_sigma
    theirs = diffusers_steps(scheduler, start, scheduler.timesteps, generators(2), unet=unet)
    assert relative_error(guided(name, 7.5, rescale), theirs) < SAMPLER_TRAJECTORY


@pytest.mark.parametrize("name", CLASSES)
def test_a_guidance_slightly_off_is_seen(name: str) -> None:
    assert relative_error(guided(name, 7.4), guided(name, 7.5)) > 20 * SAMPLER_TRAJECTORY


@pytest.mark.parametrize("name", CLASSES)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    x = noise_like(3, 4, 5, 7)
    table = table_for(name)
    scales = torch.tensor([7.5, 2.0, 5.0])
    noise = NoiseSource(generators(3), 3).draw_steps(table, x.shape[1:], CPU)

    def unet(sample: Tensor, t: Tensor) -> Tensor:
        # A model that is itself the same for every batch.
        return torch.cat([model(row, t[:1]) for row in sample.split(1)]) + 0.1

    together = denoise(unet, x, table, guidance_scale=scales, guidance_rescale=0.5, noise=noise)
    for k in range(3):
        own = None if noise is None else noise[:, k : k + 1]
        scale = float(scales[k])
        alone = denoise(unet, x[k : k + 1], table, guidance_scale=scale, guidance_rescale=0.5, noise=own)
        assert alone[0].equal(together[k])


def test_arguments_are_left_alone_and_tensors_stay_where_they_are() -> None:
    table, x = table_for("pndm"), X.clone()
    seen = []

    def unet(sample: Tensor, t: Tensor) -> Tensor:
        seen.append(
            (sample.data_ptr(), t.data_ptr(), sample.shape, t.shape, t.dtype, t[0].item(), t[-1].item())
        )
        return halves(sample, t)

    state = DenoiseState(LoopKind.of((2, 4, 8, 8), table, True, torch.float32), CPU)
    state.start(LoopRequest((2, 4, 8, 8), table, {}, 3.0))
    state.latents.copy_(x)
    address = state.latents.data_ptr()
    for _ in range(len(table)):
        state.step(lambda: state.prediction.copy_(unet(state.sample, state.timestep)))
    assert x.equal(X)
    assert state.latents.data_ptr() == address
    assert {s[:5] for s in seen} == {(*seen[0][:2], (4, 4, 8, 8), (4,), torch.float32)}
    assert [s[5] for s in seen] == [s[6] for s in seen] == table.timesteps


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_read_back_to_the_host(name: str) -> None:
    """On the meta device tensors have no values to read."""
    table = table_for(name)
    x = torch.empty(2, 4, 8, 8, device="meta")
    noise = torch.empty(len(table), 2, 4, 8, 8, device="meta")
    scale = torch.empty(2, device="meta")
    done = denoise(halves, x, table, guidance_scale=scale, guidance_rescale=0.5, noise=noise)
    assert (done.shape, done.device.type) == (x.shape, "meta")


def test_a_recorded_step_serves_another_sampler() -> None:
    """What a CUDA graph does: record one step with one table, replay it with another in its place."""

    def step(x: Tensor, out: Tensor, history: Tensor, noise: Tensor, table: Tensor, i: Tensor) -> None:
        each = torch.full((len(x),), 5.0), torch.zeros(len(x))
        sampler_step(x, out, history, noise, table, i, *each)

    def buffers(name: str) -> tuple[Tensor, ...]:
        table = table_for(name, 5)
        rows = table.on(CPU)[:5]
        noise = noise_for(table)
        noise = torch.zeros(5, *X.shape) if noise is None else noise[:5]
        return (
            X.clone(),
            halves(torch.cat([X, X]), torch.full((4,), 7.0)),
            torch.zeros(3, *X.shape),
            noise,
            rows,
        )

    recorded = make_fx(step)(*buffers("euler"), torch.tensor([0]))
    for name in CLASSES:
        live, replayed = buffers(name), buffers(name)
        for i in range(5):
            step(*live, torch.tensor([i]))
            recorded(*replayed, torch.tensor([i]))
        assert replayed[0].equal(live[0])
        assert replayed[2].equal(live[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_model_gets_its_dtype_and_the_latents_keep_theirs(dtype: torch.dtype) -> None:
    dtypes = set()

    def unet(sample: Tensor, t: Tensor) -> Tensor:
        dtypes.add((sample.dtype, t.dtype))
        return model(sample.float(), t).to(dtype)

    table = table_for("euler")
    x = X * table.init_noise_sigma
    done = denoise(unet, x, table, dtype=dtype)
    assert dtypes == {(dtype, torch.float32)}
    assert done.dtype == torch.float32
    # The model's rounding, and no more: latents of half precision would be off by as much at every step.
    assert relative_error(done, denoise(model, x, table)) < 16 * torch.finfo(dtype).eps


def test_callbacks_see_every_step() -> None:
    table = table_for("pndm")
    steps: list[tuple[int, float]] = []
    kept = []

    def on_step(i: int, t: float, x: Tensor) -> None:
        steps.append((i, t))
        kept.append(x)

    done = denoise(model, X, table, on_step=on_step)
    assert steps == list(enumerate(table.timesteps))
    assert kept[-1].equal(done)
    assert not kept[0].equal(kept[1])  # copies, not the loop's own tensor


def test_callbacks_can_replace_the_latents() -> None:
    table = table_for("euler")
    other = noise_like(2, 4, 8, 8, seed=9)
    done = denoise(model, X, table, on_step=lambda i, _, x: other if i == 2 else None)
    rest = build_table(config_of(make_scheduler("euler")), 6, begin=3)
    assert done.equal(denoise(model, other, rest))


def test_stopping_leaves_the_latents_of_the_last_step() -> None:
    table = table_for("euler")
    kept: list[Tensor] = []
    done = denoise(
        model, X, table, on_step=lambda i, t, x: kept.append(x), should_stop=lambda: len(kept) == 2
    )
    assert len(kept) == 2
    assert done.equal(kept[1])


def test_no_steps_leave_the_latents_as_they_are() -> None:
    nothing = build_table(config_of(make_scheduler("euler-a")), 6, begin=6)
    done = denoise(model, X, nothing)
    assert done.equal(X)
    assert done.data_ptr() != X.data_ptr()


def test_noise_must_be_given_where_it_is_drawn() -> None:
    with pytest.raises(KernelArgumentError, match=r"noise is None.*6 of 6"):
        denoise(model, X, table_for("euler-a"))


def test_a_predicted_variance_must_be_there() -> None:
    table = build_table(config_of(make_scheduler("ddpm", variance_type="learned_range")), 6)
    with pytest.raises(KernelArgumentError, match=r"4 channels.*8.*variance_type"):
        denoise(model, X, table, noise=noise_for(table))
    with pytest.raises(KernelArgumentError, match=r"8 channels.*4"):
        denoise(lambda x, t: torch.cat([x, x], dim=1), X, table_for("euler"))
