"""`runtime/budget.py` in whole pipelines: the plan is asked before a request, and refuses what cannot fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.pipeline_insides import checked, graph_cache_of, networks_on_device, plan_of
from helpers.tiny_requests import NO_SIZE, SEEDED_CALL
from latentrt.errors import MemoryPlanError, RequestError
from latentrt.runtime import budget
from latentrt.runtime.memory import POLICIES, RESERVE
from latentrt.runtime.planner import Planner
from latentrt.runtime.vae import VAE

Load = Callable[..., latentrt.Pipeline]

LARGE = {**SEEDED_CALL, "height": 512, "width": 512}


def test_what_cannot_fit_is_refused_before_anything_is_allocated(load: Load, between: int) -> None:
    pipe = load(memory_limit=between)
    for refused in (
        lambda: pipe(**LARGE),
        lambda: pipe.check(**LARGE),
        lambda: pipe.warmup([(32, 32), (512, 512)], sampler="euler-a"),
    ):
        with pytest.raises(MemoryPlanError) as caught:
            refused()
        assert re.search(
            r"at 512x512, batch 1, float32 needs [\d.]+ MB of device memory with memory='resident' \(text [\d.]+ MB, "
            rf"base [\d.]+ MB, refiner [\d.]+ MB, decode [\d.]+ MB\), and {between / 1e6:.1f} MB are available; ",
            str(caught.value),
        )
        assert networks_on_device(pipe) == set()
        assert graph_cache_of(pipe).nbytes == 0


def test_what_fits_is_made(load: Load, between: int, image_of_call: Any) -> None:
    pipe = load(memory_limit=f"{between / 1e6:.0f}MB")
    assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)
    with pytest.raises(MemoryPlanError):
        pipe(**LARGE)
    assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)


def test_a_picture_that_would_not_fit_whole_is_decoded_in_tiles(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.runtime.request.TILE", 8)
    free, call = load(), {**SEEDED_CALL, "height": 128, "width": 96}
    whole, tiled = (plan_of(free, {**call, "tiled_vae": x}).peak("resident") for x in (False, True))
    assert tiled < whole
    pipe = load(memory_limit=(whole + tiled) // 2)
    pipe.check(**call)
    found = pipe(**call)
    assert np.array_equal(found.images, free(**call, tiled_vae=True).images)
    assert found.parameters[0]["tiled_vae"] is True
    whole_image = free(**call)
    assert not np.array_equal(found.images, whole_image.images)
    assert "tiled_vae" not in whole_image.parameters[0]


def test_tiles_are_taken_only_once_nothing_more_can_be_freed(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They make another picture: not for what waits for the garbage collector, or what libraries hold."""
    pipe, call = load(), {**SEEDED_CALL, "height": 128, "width": 96}
    request, stages = checked(pipe, call)
    whole = plan_of(pipe, call).peak("resident")
    monkeypatch.setattr("latentrt.runtime.request.TILE", 8)
    monkeypatch.setattr(budget, "free_memory", lambda device: whole - 1)
    monkeypatch.setattr(budget.Budget, "_available_after_collecting", lambda self, available: available + 1)
    assert pipe._budget.require(request, stages, idle=True).request.tile is None
    assert pipe._budget.require(request, stages, idle=False).request.tile == 8


def test_previews_are_fitted_in_the_tiles_in_which_a_picture_fits(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles: list[int | None] = []
    decode = VAE.decode
    monkeypatch.setattr(
        VAE, "decode", lambda self, x, *, tile: tiles.append(tile) or decode(self, x, tile=tile)
    )
    monkeypatch.setattr("latentrt.runtime.request.TILE", 8)
    admit = budget.Budget.admit
    monkeypatch.setattr(
        budget.Budget,
        "admit",
        lambda self, request, *a, **k: admit(self, replace(request, tiled_vae=True), *a, **k),
    )
    assert load().fit_previewer().weights.shape == (5, 3)
    assert tiles == [8]


def test_weights_that_cannot_fit_are_refused_when_they_are_loaded(load: Load) -> None:
    message = (
        r"^the weights of .* \+ .*, float32, needs .* with memory='resident' .* and 268\.5 MB are available; the "
        r"weights of text_encoder.* alone are .*, and 268\.4 MB are kept free for libraries: give a larger "
        r"memory_limit$"
    )
    with pytest.raises(MemoryPlanError, match=message.replace("text_encoder", "")):
        load(memory_limit=RESERVE + 100_000)
    least = load()._budget.planner.of_weights()
    with pytest.raises(MemoryPlanError, match=r"use memory='low' \([\d.]+ MB\)$"):
        load(memory_limit=(least.peak("low") + least.peak("balanced")) // 2)
    load(memory_limit=least.peak("resident"))


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, ("text", "denoise", "pixels")),
        ({"memory": "low"}, ("denoise",)),
        ({"loop_memory": 20_000}, ("text", "denoise")),  # of which the VAE's call is not recorded
    ],
)
def test_graphs_get_their_pool_size_from_the_plan(load: Load, options: Any, kinds: Any) -> None:
    pipe = load(memory_limit="1GB", graphs=True, **options)
    pipe(**SEEDED_CALL)
    plan = plan_of(pipe, SEEDED_CALL)
    found = pipe._loader.graphs.first_block if pipe._loader.backend.name in ("eager", "triton") else 0
    assert found == plan.pool_bytes(plan.used(*kinds)) > 0


def test_a_kind_is_planned_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, seeds, scales and numbers of steps do not matter."""
    planned: list[Any] = []
    made = Planner._build
    monkeypatch.setattr(Planner, "_build", lambda self, *a: planned.append(a) or made(self, *a))
    pipe = load(memory_limit="1GB")
    pipe.check(**SEEDED_CALL)
    for change in ({"seed": 9}, {"prompt": "storm"}, {"guidance_scale": 2.0}, {"num_inference_steps": 30}):
        pipe.check(**{**SEEDED_CALL, **change})
    assert len(planned) == 1
    pipe.check(**{**SEEDED_CALL, "guidance_scale": 1.0})
    pipe.check(**{**SEEDED_CALL, "output_type": "latent"})
    assert len(planned) == 3


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_of_no_steps_is_planned_too(policy: str, load: Load) -> None:
    """Its networks are loaded all the same, and its pictures have their size."""
    free, pipe = load(), load(memory=policy, memory_limit="1GB")
    peaks = []
    for side in (8, 16):
        latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(side))
        call = {**NO_SIZE, "image": latents, "strength": 0.0}
        assert pipe.check(**call)[1] == 0  # steps
        plan = plan_of(pipe, call)
        assert {"text_encoder", "text_encoder_2", "unet", "vae_decoder"} == plan.used()
        peaks.append(plan.peak(policy))
        assert np.array_equal(pipe(**call).images, free(**call).images)
    assert peaks[0] < peaks[1]


def test_without_a_bound_nothing_is_planned(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: Any) -> None:
        raise AssertionError("it was planned")

    monkeypatch.setattr(Planner, "_build", plan)
    load().check(**LARGE)


def test_a_gpu_s_free_memory_is_the_bound(
    load: Load, between: int, monkeypatch: pytest.MonkeyPatch, image_of_call: Any
) -> None:
    """Together with what the pipeline holds; while a call runs, as it was before."""
    free = [between]
    monkeypatch.setattr(budget, "free_memory", lambda _: free[0])
    pipe = load()
    assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)
    holds = pipe._budget.held()
    assert {"unet", "refiner unet", "recorded"} <= set(holds)
    free[0] -= sum(holds.values())
    assert pipe._budget.available() == between

    def ask(*_: Any) -> None:
        free[0] = 0
        pipe.check(**SEEDED_CALL)

    assert np.array_equal(pipe(**SEEDED_CALL, callback_on_step_end=ask).images, image_of_call)
    with pytest.raises(MemoryPlanError):
        pipe(**SEEDED_CALL)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_network_of_another_request_that_stays_is_no_room(policy: str, load: Load) -> None:
    """The refiner's UNet, while a request has the base's alone."""
    alone = {**LARGE, "high_noise_frac": 1.0}
    pipe = load(memory=policy, memory_limit=plan_of(load(memory=policy), alone).peak(policy))
    pipe.check(**alone)
    pipe(**{**SEEDED_CALL, "high_noise_frac": 0.0})
    assert ("refiner unet" in networks_on_device(pipe)) == (policy != "low")
    if policy == "low":
        pipe.check(**alone)
    else:
        with pytest.raises(
            MemoryPlanError, match=r"besides refiner unet, which stays there\), and .* are available"
        ):
            pipe.check(**alone)


def test_what_another_pipeline_keeps_is_no_room(load: Load) -> None:
    """Shared, it goes by the policy of its owner, and by its device."""
    one = load()
    two = load(memory="low", vae=one.vae)
    before = plan_of(two, SEEDED_CALL).need("low")
    one(**SEEDED_CALL)
    more = {name: n - before[name] for name, n in plan_of(two, SEEDED_CALL).need("low").items()}
    nbytes = one.vae.decoder.held_bytes
    assert more == {"text": nbytes, "base": nbytes, "refiner": nbytes, "decode": 0}
    assert networks_on_device(two) == {"vae_decoder"}
    one._loader.device = torch.device("meta")
    assert networks_on_device(two) == set()
    assert plan_of(two, SEEDED_CALL).need("low") == before


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("of_donors", POLICIES)
def test_what_another_policy_would_need_is_what_it_needs(policy: str, of_donors: str, load: Load) -> None:
    """Of parts that two pipelines lend, whatever their policy."""
    donors = [load(memory=of_donors), load(memory=of_donors)]
    lent = {"text_encoder_2": donors[0].text_encoder_2, "vae": donors[1].vae}
    for donor in donors:
        donor(**SEEDED_CALL)
    for part in (lent["text_encoder_2"].engine, lent["vae"].decoder):
        part.load()
    need = plan_of(load(memory=policy, **lent), SEEDED_CALL).need(policy)
    for other in POLICIES:
        assert plan_of(load(memory=other, **lent), SEEDED_CALL).need(policy) == need


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "some"}, "no memory policy 'some'; there are resident, balanced, low"),
        ({"memory_limit": "much"}, "'much' is no amount of memory; write such as 20GB"),
        ({"memory_limit": -1}, "memory_limit is -1; give a number of bytes, or such as"),
        ({"memory_limit": True}, "memory_limit is True"),
        ({"loop_memory": 1.5}, "loop_memory is 1.5; give a number of bytes"),
    ],
)
def test_options_that_cannot_be_met(options: dict[str, Any], message: str, load: Load) -> None:
    with pytest.raises(RequestError, match=message):
        load(**options)


def test_the_command(run_cli: Any, tiny: Callable[..., Path]) -> None:
    model = (
        "--model",
        str(tiny("sdxl")),
        "--backend",
        "eager",
        "--device",
        "cpu",
        "--size",
        "64x48",
        "--steps",
        "1",
    )
    code, out, _ = run_cli("generate", "a cat", *model, "--memory", "low", "--memory-limit", "1GB")
    assert (code, out.split()[0]) == (0, "image.png")
    code, out, err = run_cli("generate", "a cat", *model, "--memory-limit", "100MB")
    assert (code, out) == (1, "")
    assert "of device memory with memory='resident' (" in err
    assert "and 100.0 MB are available" in err


def test_a_gpu_too_small_for_the_weights_is_refused_at_load(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda _: RESERVE + 100_000)
    with pytest.raises(MemoryPlanError, match=r"end what else is on the GPU, or take one with more memory$"):
        load()
