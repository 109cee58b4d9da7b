"""The arithmetic of a plan: policies by hand, refusals, floors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from latentrt.errors import MemoryPlanError, RequestError
from latentrt.kernels.roofline import Gpu
from latentrt.runtime.footprint import Footprint
from latentrt.runtime.memory import POLICIES, RESERVE, STAGING, Network, Plan, PlannedStage, format_bytes

GB = 10**9
GPU = Gpu("G", 90, tflops=100.0, bandwidth=1.0, source="datasheet")


def network(weights: int, pool: int, flops: int = 0) -> Network:
    footprint = Footprint(
        parameters=weights // 2,
        weight_bytes=weights,
        held_bytes=weights,
        flops=flops,
        activation_bytes=pool,
        scratch_bytes=0,
        pool_bytes=pool,
        input_bytes=0,
        output_bytes=0,
    )
    return Network("float16", 1, footprint)


# Every number is a power of two of megabytes, so that each sum tells what is in it.
MB = 10**6
PLAN = Plan(
    "a model at 64x64, batch 1, float16",
    networks={
        "te1": network(1 * MB, 2 * MB),
        "te2": network(4 * MB, 8 * MB),
        "unet": network(16 * MB, 32 * MB, flops=10**12),
        "refiner unet": network(64 * MB, 128 * MB),
        "vae_encoder": network(256 * MB, 512 * MB),
        "vae_decoder": network(1024 * MB, 2048 * MB),
    },
    stages=(
        PlannedStage("text", "text", {"te1": 1, "te2": 3}),
        PlannedStage("base", "denoise", {"unet": 24}),
        PlannedStage("refiner", "denoise", {"refiner unet": 6}),
        PlannedStage("decode", "pixels", {"vae_decoder": 1}, extra_bytes=4096 * MB),
    ),
    buffers={"latents": 8000 * MB, "noise": 192 * MB},
)


def need(policy: str) -> dict[str, int]:
    """In megabytes, without what is always there."""
    return {name: (n - RESERVE - 8192 * MB) // MB for name, n in PLAN.need(policy).items()}


def test_resident_keeps_everything_and_one_pool() -> None:
    every = 1 + 4 + 16 + 64 + 1024 + 2048
    assert need("resident") == {"text": every, "base": every, "refiner": every, "decode": every + 4096}
    assert PLAN.peak("resident") == RESERVE + (8192 + every + 4096) * MB


def test_balanced_has_encoders_for_the_text_only() -> None:
    stay = 16 + 64 + 1024
    pool = 128
    assert need("balanced") == {
        "text": stay + 1 + 4 + pool + 8,
        "base": stay + pool,
        "refiner": stay + pool,
        "decode": stay + pool + 2048 + 4096,
    }


def test_what_the_device_holds_counts_not_what_the_checkpoint_has() -> None:
    more = {
        name: replace(n, footprint=replace(n.footprint, held_bytes=n.footprint.held_bytes + 1))
        for name, n in PLAN.networks.items()
    }
    laid_out = replace(PLAN, networks=more)
    for policy, networks in (("resident", 5), ("balanced", 3), ("low", 1)):
        assert laid_out.need(policy)["base"] == PLAN.need(policy)["base"] + networks
    assert laid_out.floor_ms(PLAN.stages[1], GPU) == PLAN.floor_ms(PLAN.stages[1], GPU)


def test_low_has_one_network_at_a_time() -> None:
    assert need("low") == {"text": 4 + 8, "base": 16 + 32, "refiner": 64 + 128, "decode": 1024 + 2048 + 4096}


def test_a_network_that_does_not_run_is_not_loaded() -> None:
    stages = (PlannedStage("encode", "pixels", {"vae_encoder": 1}), *PLAN.stages)
    encoded = replace(PLAN, stages=stages).need("resident")
    assert encoded["base"] - PLAN.need("resident")["base"] == 256 * MB


def test_what_stays_on_the_device_is_needed_beside_what_runs() -> None:
    """And once where it runs itself. Another policy would not have it there."""
    staying = {"unet": 16 * MB, "vae_encoder": 256 * MB, "te1": 1 * MB}
    more = {
        "resident": {"text": 256, "base": 256, "refiner": 256, "decode": 256},
        "balanced": {"text": 256, "base": 256 + 1, "refiner": 256 + 1, "decode": 256 + 1},
        "low": {"text": 256 + 16 + 1, "base": 256 + 1, "refiner": 256 + 16 + 1, "decode": 256 + 16 + 1},
    }
    for policy in POLICIES:
        plan = replace(PLAN, staying={policy: staying})
        assert plan.need(policy) == {
            name: n + more[policy][name] * MB for name, n in PLAN.need(policy).items()
        }
        for other in set(POLICIES) - {policy}:
            assert plan.need(other) == PLAN.need(other)
        assert plan.describe(policy).endswith(", besides vae_encoder, which stays there)")


def test_what_fits_passes() -> None:
    for policy in POLICIES:
        PLAN.require_fit(PLAN.peak(policy), policy)
        with pytest.raises(MemoryPlanError):
            PLAN.require_fit(PLAN.peak(policy) - 1, policy)


SMALL = Plan(
    "sdxl at 1024x1024, batch 2, float16",
    networks={"te": network(2 * GB, GB), "unet": network(5 * GB, 2 * GB)},
    stages=(PlannedStage("text", "text", {"te": 1}), PlannedStage("base", "denoise", {"unet": 30})),
    buffers={},
)


@pytest.mark.parametrize(
    ("available", "policy", "message"),
    [
        (
            8 * GB,
            "resident",
            "sdxl at 1024x1024, batch 2, float16 needs 9.27 GB of device memory with memory='resident' (text 9.27 GB, "
            "base 9.27 GB), and 8.00 GB are available; use memory='low' (7.27 GB), or a smaller size or batch",
        ),
        (
            7 * GB,
            "balanced",
            "7.00 GB are available; no policy fits, memory='low' still needs 7.27 GB: use a smaller size or batch",
        ),
        (
            4 * GB,
            "low",
            "the weights of unet alone are 5.00 GB, and 268.4 MB are kept free for libraries: take a GPU with more",
        ),
    ],
)
def test_refusals_have_numbers_and_a_remedy(available: int, policy: str, message: str) -> None:
    with pytest.raises(MemoryPlanError) as caught:
        SMALL.require_fit(available, policy)
    assert message in str(caught.value)
    assert isinstance(caught.value, RequestError)


def test_an_unknown_policy() -> None:
    for call in (PLAN.need, PLAN.peak, lambda policy: PLAN.require_fit(0, policy)):
        with pytest.raises(
            RequestError, match=r"no memory policy 'fast'; there are resident, balanced, low$"
        ):
            call("fast")


def test_the_floor_is_the_longer_of_work_and_traffic() -> None:
    text, base, *_ = PLAN.stages
    assert PLAN.floor_ms(base, GPU) == (
        24 * 10.0,
        "matmul",
    )  # 1 TFLOP at 100 TFLOP/s; 16 MB would take 0.016 ms
    ms, limit = PLAN.floor_ms(text, GPU)
    assert limit == "copy"
    assert ms == pytest.approx((1 * 1 + 3 * 4) * 1e-3)  # MB at 1 TB/s
    assert PLAN.flops(base) == 24 * 10**12


def test_json_has_every_figure() -> None:
    told = json.loads(json.dumps(PLAN.as_json(GPU)))
    assert told["policies"]["low"]["need_bytes"] == PLAN.need("low")
    assert told["policies"]["low"]["peak_bytes"] == PLAN.peak("low")
    assert told["stages"][1]["floor_ms"] == 240
    assert told["networks"]["unet"]["footprint"]["weight_bytes"] == 16 * MB
    assert {told["policies"][policy]["pinned_host_bytes"] for policy in POLICIES} == {STAGING}
    assert told["gpu"] == {"name": "G", "ceilings": "datasheet"}


def test_readable() -> None:
    assert [format_bytes(n) for n in (0, 53_400, 3_560_000, 5_134_927_368)] == [
        "0 kB",
        "53 kB",
        "3.6 MB",
        "5.13 GB",
    ]
