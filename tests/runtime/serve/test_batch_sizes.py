"""The sizes of batches: which are formed, and that those are warm before the first request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import latentrt
import pytest
from helpers.fake_runner import FakeRunner, device_occupied, image_request, in_loop
from latentrt.errors import EngineSizeError, MemoryPlanError
from latentrt.runtime.graph import Graph, Graphs
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.requests import ImageRequest
from latentrt.runtime.serve.runner import PipelineRunner
from latentrt.runtime.serve.worker import BatchReport

Load = Callable[..., latentrt.Pipeline]


@pytest.mark.parametrize(
    ("captures", "max_batch", "warm", "formed"),
    [
        (True, 6, [1, 2, 4, 6], [4, 1]),
        (True, 8, [1, 2, 4, 8], [4, 1]),
        (True, 1, [1], [1] * 5),
        (False, 8, [1], [5]),  # any size is as fast at once
    ],
)
def test_where_work_is_captured_few_sizes_are_formed_and_all_are_warm(
    captures: bool, max_batch: int, warm: list[int], formed: list[int]
) -> None:
    async def main() -> None:
        runner = FakeRunner()
        runner.captures = captures
        async with AsyncEngine(runner, max_batch=max_batch) as engine:
            assert runner.batches == warm
            async with device_occupied(runner, engine):
                jobs = engine.submit(*[image_request(seed) for seed in range(1, 6)])
            for job in jobs:
                await job.result()
        assert [len(call) for call in runner.calls[1:]] == formed

    in_loop(main())


def test_a_batch_that_does_not_fit_is_divided_into_sizes_that_are_formed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        runner = FakeRunner(lambda seeds: MemoryError("none left") if len(seeds) > 3 else None)
        runner.captures = True
        async with AsyncEngine(runner, max_batch=6) as engine:
            async with device_occupied(runner, engine):
                jobs = engine.submit(*[image_request(seed) for seed in range(1, 7)])
            for job in jobs:
                await job.result()
            jobs = engine.submit(*[image_request(seed) for seed in range(1, 5)])
            for job in jobs:
                await job.result()
        assert [len(call) for call in runner.calls[1:]] == [6, 2, 2, 2, 2, 2]

    with caplog.at_level(logging.WARNING):
        in_loop(main())
    assert "the limit is now 2" in caplog.text


def test_what_is_left_of_a_batch_is_made_in_sizes_that_are_formed() -> None:
    """One of eight is cancelled before memory runs out: of the half that is left three are two and one."""

    async def main() -> None:
        jobs: list[Any] = []

        def fail(seeds: list[int]) -> Exception | None:
            if len(seeds) < 8:
                return None
            asyncio.run_coroutine_threadsafe(cancel(jobs[0]), loop).result(60)
            return MemoryError("none left")

        async def cancel(job: Any) -> None:
            job.cancel()

        loop = asyncio.get_running_loop()
        runner = FakeRunner(fail)
        runner.captures = True
        async with AsyncEngine(runner, max_batch=8) as engine:
            async with device_occupied(runner, engine):
                jobs += engine.submit(*[image_request(seed) for seed in range(1, 9)])
            for job in jobs[1:]:
                await job.result()
        assert [len(call) for call in runner.calls[1:]] == [8, 2, 1, 4]

    in_loop(main())


def test_what_was_warmed_is_captured_no_more(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[str] = []
    capture = Graphs.capture

    def noting(self: Graphs, work: Callable[[], object], what: str) -> Graph:
        captured.append(what)
        return capture(self, work, what)

    monkeypatch.setattr(Graphs, "capture", noting)
    reports: list[BatchReport] = []

    async def main() -> None:
        engine = AsyncEngine(load(graphs=True), max_batch=4, window=0.1, on_batch=reports.append)
        async with engine:
            assert sum("denoising step" in what for what in captured) == 6  # base and refiner, three batches
            captured.clear()
            for images in (4, 3, 2, 1):
                asked = [
                    ImageRequest("a red cat", steps=3, seed=k, high_noise_frac=0.5) for k in range(images)
                ]
                await asyncio.gather(*[engine.generate(request) for request in asked])

    in_loop(main())
    assert [report.images for report in reports] == [4, 2, 1, 2, 1]
    assert captured == []


def test_a_warm_size_that_does_not_fit_does_not_keep_a_server_from_starting(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    free = load(memory_limit="64GB")
    size = free._request("").height
    one, two, four = (free._budget.planner.plan(batch=n, steps=5).peak("resident") for n in (1, 2, 4))
    assert one < two < four
    with caplog.at_level(logging.WARNING):
        PipelineRunner(load(graphs=True, memory_limit=two)).warm_up((1, 2, 4))
    found = [text for text in caplog.messages if "a batch of 4" in text]
    assert len(found) == 1
    assert f"{size}x{size}" in found[0]
    with pytest.raises(MemoryPlanError):
        PipelineRunner(load(graphs=True, memory_limit=one - 1)).warm_up((1, 2, 4))


def test_a_warm_size_without_an_engine_does_not_keep_a_server_from_starting(
    load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm: list[int] = []

    def warmup(self: latentrt.Pipeline, *, batches: Any) -> None:
        if max(batches) > 1:
            raise EngineSizeError("the engine takes a batch of 1; build another")
        warm.extend(batches)

    monkeypatch.setattr(latentrt.Pipeline, "warmup", warmup)
    PipelineRunner(load()).warm_up((1, 2))
    assert warm == [1]
    assert "a batch of 2" in caplog.text


def test_a_pipeline_says_whether_sizes_need_warming(load: Load) -> None:
    assert PipelineRunner(load(graphs=True)).captures
    assert not PipelineRunner(load(graphs=False)).captures
