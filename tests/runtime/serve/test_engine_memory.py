"""`runtime/serve/engine.py` and `worker.py`: the engine over pipelines whose memory is bounded, or runs out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.fake_runner import in_loop
from helpers.pipeline_insides import plan_of
from latentrt.errors import BackendError, MemoryPlanError
from latentrt.runtime import request
from latentrt.runtime.planner import Planner
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.requests import ImageRequest, ImageResult
from latentrt.runtime.serve.worker import BatchReport
from latentrt.runtime.vae import VAE

Load = Callable[..., latentrt.Pipeline]

ASKED = ImageRequest("a red cat on the hill", "blurry", 48, 64, 2, 5.0, 3, "euler-a", 0.5)


@pytest.fixture(autouse=True)
def nothing_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own size is not what these are about."""
    monkeypatch.setattr(latentrt.Pipeline, "warmup", lambda self, **_: None)
    monkeypatch.setattr(latentrt.Pipeline, "fit_previewer", lambda self: None)


def made(pipe: latentrt.Pipeline, requests: Sequence[ImageRequest]) -> tuple[list[Any], list[BatchReport]]:
    """What the engine answers to requests that come together, and its calls."""
    reports: list[BatchReport] = []

    async def main() -> list[ImageResult | BaseException]:
        async with AsyncEngine(pipe, window=0.2, on_batch=reports.append) as engine:
            asked = [engine.generate(request) for request in requests]
            return await asyncio.gather(*asked, return_exceptions=True)

    return in_loop(main()), reports


def call_of(request: ImageRequest) -> dict[str, Any]:
    """The pipeline's arguments for it."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "seed": request.seed,
        "sampler": request.sampler,
        "high_noise_frac": request.high_noise_frac,
    }


def seeds(count: int, **fields: Any) -> list[ImageRequest]:
    return [ImageRequest(**{**vars(ASKED), **fields, "seed": seed}) for seed in range(count)]


def test_a_back_end_s_own_words_for_it_halve_the_batch(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = VAE.decode

    def failing(self: VAE, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(latents) > 2:
            raise BackendError("ONNX Runtime failed on vae_decoder: std::bad_alloc")
        return decode(self, latents, **options)

    monkeypatch.setattr(VAE, "decode", failing)
    results, reports = made(load(), seeds(4))
    assert [(r.images, r.outcome) for r in reports] == [(4, "out of memory"), (2, "made"), (2, "made")]
    assert [r.parameters["seed"] for r in results] == [0, 1, 2, 3]


def test_a_batch_that_by_plan_does_not_fit_is_halved(load: Load) -> None:
    free = load()
    two = plan_of(free, {**call_of(ASKED), "prompt": ["x"] * 2, "negative_prompt": None}).peak("resident")
    results, reports = made(load(memory_limit=two - 1), seeds(2))
    assert [(r.images, r.outcome) for r in reports] == [(2, "out of memory"), (1, "made"), (1, "made")]
    assert [r.parameters["seed"] for r in results] == [0, 1]


def test_an_image_that_fits_in_tiles_alone_is_the_one_the_pipeline_makes(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "TILE", 8)
    (asked,) = seeds(1, height=128, width=96)
    free = load()
    whole, tiled = (plan_of(free, {**call_of(asked), "tiled_vae": x}).peak("resident") for x in (False, True))
    ((result,), _) = made(load(memory_limit=(whole + tiled) // 2), [asked])
    wanted = {tile: np.asarray(free(**call_of(asked), tiled_vae=tile).images[0]) for tile in (False, True)}
    assert np.array_equal(np.asarray(result.image), wanted[True])
    assert not np.array_equal(wanted[True], wanted[False])


def test_plans_do_not_hold_up_the_event_loop(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made in the thread that makes images; what cannot fit is refused there."""
    threads: list[str] = []
    plan = Planner._build

    def noting(self: Planner, *rest: Any) -> Any:
        threads.append(threading.current_thread().name)
        return plan(self, *rest)

    monkeypatch.setattr(Planner, "_build", noting)
    least = load()._budget.planner.of_weights().peak("resident")
    (error,), reports = made(load(memory_limit=least), seeds(1))
    assert isinstance(error, MemoryPlanError)
    assert [(r.images, r.outcome) for r in reports] == [(1, "out of memory")]
    assert threads
    assert all(name.startswith("latentrt-engine") for name in threads)
