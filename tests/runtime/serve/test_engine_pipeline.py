"""`runtime/serve/engine.py` and `runner.py`: the engine over pipelines: every image is the one its request gets
alone."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import latentrt
import numpy as np
import PIL.Image
import pytest
from helpers.fake_runner import in_loop
from helpers.parity import Rig
from latentrt.errors import RequestError, ServiceError
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.requests import Finished, ImageRequest, ImageResult, Progress
from latentrt.runtime.serve.runner import PipelineRunner
from latentrt.runtime.serve.worker import BatchReport

REQUESTS = [
    ImageRequest("a red cat", "blurry", 48, 64, 4, 7.5, 3, "euler-a", 0.5),
    ImageRequest("storm", "dark night", 48, 64, 4, 2.0, 11, "euler-a", 0.5),
    ImageRequest("two people walking in the old town", "", 48, 64, 4, 5.0, 0, "euler-a", 0.5),
    ImageRequest("a red cat", None, 48, 64, 4, 7.5, 3, "euler-a", 0.5),  # none is not "": a call of its own
    ImageRequest("green", "blurry", 64, 48, 4, 1.0, 5, "euler-a", 0.5),
]


def alone(pipe: latentrt.Pipeline, request: ImageRequest) -> Any:
    """The pipeline's own answer to one request."""
    return pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
        sampler=request.sampler,
        high_noise_frac=request.high_noise_frac,
    )


@pytest.fixture(scope="module")
def demo() -> latentrt.Pipeline:
    pipe = latentrt.Pipeline.from_pretrained("demo", "demo", backend="eager")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.timeout(900)
def test_a_request_gets_the_bits_it_gets_alone(rig: Rig) -> None:
    pipe = rig.pipeline("ensemble", "onnxruntime")
    reports: list[BatchReport] = []

    async def main() -> list[ImageResult]:
        async with AsyncEngine(pipe, window=0.2, on_batch=reports.append) as engine:
            return await asyncio.gather(*[engine.generate(request) for request in REQUESTS])

    results = in_loop(main(), 600)
    assert sorted(report.images for report in reports) == [1, 1, 3]
    for request, result in zip(REQUESTS, results, strict=True):
        wanted = alone(pipe, request)
        assert np.array_equal(np.asarray(result.image), np.asarray(wanted.images[0]))
        assert result.parameters == wanted.parameters[0]
        assert {"queue", "text", "base", "refiner", "decode", "total"} <= set(result.timings)
        assert result.peak_memory > 1e8


def test_the_demo_shows_its_progress(demo: latentrt.Pipeline) -> None:
    request = ImageRequest("a red circle", steps=4, seed=1, guidance_scale=3.0)

    async def main() -> list[Progress | Finished]:
        async with (
            AsyncEngine(demo) as engine,
            aclosing(engine.stream(request, previews=True)) as events,
        ):
            return [event async for event in events]

    *steps, last = in_loop(main(), 120)
    assert isinstance(last, Finished)
    assert [step.step for step in steps][-1] == 4
    preview, image = steps[-1].preview, last.result.image
    assert preview.size == (16, 16)
    small = np.asarray(image.resize(preview.size, PIL.Image.Resampling.BOX), dtype=np.float64)
    # A linear map does the demo's small VAE little justice (0.5 here); a wrong one gives about 0.
    assert np.corrcoef(np.asarray(preview, np.float64).ravel(), small.ravel())[0, 1] > 0.3


def test_leaving_stops_the_pipeline_itself(demo: latentrt.Pipeline) -> None:
    reports: list[BatchReport] = []

    async def main() -> None:
        async with (
            AsyncEngine(demo, on_batch=reports.append) as engine,
            aclosing(engine.stream(ImageRequest("storm", steps=200, width=64, height=64))) as events,
        ):
            async for event in events:
                seen = event.step
                break
        assert reports[0].outcome == "abandoned"
        assert reports[0].steps - seen <= 2

    in_loop(main(), 120)


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupted_image_is_not_returned(
    times: int, demo: latentrt.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """`interrupt()` from elsewhere is meant for another call, and stops the engine's as well."""
    request = ImageRequest("a red circle", steps=6, seed=1, width=64, height=64)
    begun: list[int] = []

    def on_step(step: int, _: object) -> None:
        if step == 1:
            begun.append(step)
            if len(begun) <= times:
                demo.interrupt()

    runner = PipelineRunner(demo)
    checked = runner.check(request)
    if times == 3:
        with pytest.raises(ServiceError, match=r"3 times in a row the pipeline's interrupt\(\) was called"):
            runner.run([checked], on_step)
    else:
        (result,) = runner.run([checked], on_step)
        assert np.array_equal(np.asarray(result.image), np.asarray(alone(demo, request).images[0]))
    assert len(begun) == min(times + 1, 3)
    assert caplog.text.count("was called from elsewhere") == times


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 60}, "width is 60; it must be a multiple of 8"),
        ({"steps": 1001}, "1001 steps were asked for; this schedule has 1 to 1000"),
        ({"sampler": "heun"}, "no sampler 'heun'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale": [2.0]}, "its seed and guidance_scale are one number"),
        ({"seed": -1}, "seed is -1"),
        ({"prompt": ["a", "b"]}, "prompt must be a string; got a list"),
        ({"negative_prompt": ["x"]}, "negative_prompt must be a string; got a list"),
        ({"negative_prompt": "\udcff"}, "negative_prompt is not text"),
    ],
)
def test_requests_are_checked_when_they_come(
    fields: dict[str, Any], message: str, demo: latentrt.Pipeline
) -> None:
    async def main() -> None:
        engine = AsyncEngine(demo)
        engine._runner.warm_up = lambda batches: None
        async with engine:
            with pytest.raises(RequestError, match=message):
                engine.submit(replace(REQUESTS[0], **fields))

    in_loop(main())


def test_a_drawn_seed_is_reported(demo: latentrt.Pipeline) -> None:
    request = ImageRequest("storm", width=64, height=64, steps=1)

    async def main() -> list[ImageResult]:
        async with AsyncEngine(demo, window=0.1) as engine:
            return await asyncio.gather(engine.generate(request), engine.generate(request))

    first, second = in_loop(main(), 120)
    seeds = [result.parameters["seed"] for result in (first, second)]
    assert seeds[0] != seeds[1]
    again = alone(demo, replace(request, seed=seeds[1])).images[0]
    assert np.abs(np.asarray(again, np.int16) - np.asarray(second.image, np.int16)).max() <= 1
