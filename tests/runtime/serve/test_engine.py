"""The engine over a runner without a model: batching, leaving, failing, deadlines, draining."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
import torch
from helpers.fake_runner import FakeRunner, device_occupied, image_request, in_loop, seed_of, until_at_step
from latentrt.errors import (
    BackendError,
    EngineSizeError,
    LatentRTError,
    MemoryPlanError,
    OutOfMemoryError,
    RequestError,
    ServiceError,
    StoppedError,
)
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.jobs import Job
from latentrt.runtime.serve.requests import Finished, ImageResult, Progress
from latentrt.runtime.serve.worker import BatchReport


def test_requests_within_the_window_share_a_batch() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0.05) as engine:
            assert runner.warm == 1
            results = await asyncio.gather(*[engine.generate(image_request(k)) for k in range(5)])
        assert runner.calls == [[0, 1, 2, 3, 4]]
        assert [seed_of(r.image) for r in results] == [0, 1, 2, 3, 4]
        assert [r.batch for r in results] == [5] * 5
        assert all(r.timings["queue"] >= 0 and r.timings["base"] == 0.1 for r in results)

    in_loop(main())


def test_requests_that_arrive_during_a_batch_share_the_next() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, max_batch=3, window=0) as engine:
            async with device_occupied(runner, engine):
                tasks = [asyncio.create_task(engine.generate(image_request(k))) for k in range(1, 6)]
                await asyncio.sleep(0)
                assert (engine.waiting, engine.running) == (5, 1)
            assert [seed_of((await t).image) for t in tasks] == [1, 2, 3, 4, 5]
        assert runner.calls == [[0], [1, 2, 3], [4, 5]]

    in_loop(main())


def test_progress_and_previews_go_to_those_who_asked() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0.05) as engine:

            async def follow(seed: int, previews: bool) -> list[Progress | Finished]:
                return [event async for event in engine.stream(image_request(seed), previews=previews)]

            runner.hold()
            tasks = [asyncio.create_task(follow(k, previews=k == 7)) for k in (7, 8)]
            await until_at_step(runner)
            for _ in range(2):
                await asyncio.to_thread(runner.step)
                await asyncio.sleep(0.01)
            runner.release()
            seven, eight = await asyncio.gather(*tasks)
        for events, seed in ((seven, 7), (eight, 8)):
            *steps, last = events
            assert isinstance(last, Finished)
            assert seed_of(last.result.image) == seed
            assert [s.step for s in steps][:2] == [1, 2]
            assert {s.steps for s in steps} == {3}
        assert {seed_of(s.preview) for s in seven[:-1]} == {107}
        assert {s.preview for s in eight[:-1]} == {None}

    in_loop(main())


def test_a_slow_reader_misses_steps_and_nothing_piles_up() -> None:
    async def main() -> None:
        async with AsyncEngine(FakeRunner()) as engine:
            (job,) = engine.submit(image_request(1, steps=200))
            await job.result()
            events = [event async for event in job.events()]
        assert [type(event) for event in events] == [Progress, Finished]
        assert events[0].step == 200

    in_loop(main())


def test_retried_steps_are_reported_once() -> None:
    """As where a batch fails after them, and each of it is made alone."""

    async def main() -> None:
        runner = FakeRunner(one_is_bad(2, BackendError("no such size")))
        steps = []
        async with AsyncEngine(runner, window=0.05) as engine:

            async def follow() -> None:
                async for event in engine.stream(image_request(1)):
                    if isinstance(event, Progress):
                        steps.append(event.step)

            runner.hold()
            tasks = [asyncio.create_task(follow()), asyncio.create_task(engine.generate(image_request(2)))]
            await until_at_step(runner)
            for _ in range(3 + 3):  # of the batch, and alone
                await asyncio.to_thread(runner.step)
                await asyncio.sleep(0.01)
            runner.release()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert runner.calls == [[1, 2], [1], [2]]
        assert steps == [1, 2, 3]

    in_loop(main())


def test_cancelling_one_request_keeps_its_batch_running() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0.05) as engine:
            runner.hold()
            tasks = [asyncio.create_task(engine.generate(image_request(k))) for k in (1, 2)]
            await until_at_step(runner)
            tasks[0].cancel()
            await asyncio.sleep(0)
            assert engine.running == 1
            runner.release()
            assert seed_of((await tasks[1]).image) == 2
            assert tasks[0].cancelled()
        assert runner.steps == [3]

    in_loop(main())


def test_the_last_to_leave_frees_the_device_within_two_steps() -> None:
    async def main() -> None:
        runner = FakeRunner()
        reports: list[BatchReport] = []
        async with AsyncEngine(runner, window=0.05, on_batch=reports.append) as engine:
            runner.hold()
            tasks = [asyncio.create_task(engine.generate(image_request(k, steps=50))) for k in (1, 2)]
            await until_at_step(runner)
            await asyncio.to_thread(runner.step)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            taken = runner.steps[0]
            runner.release()
            assert seed_of((await engine.generate(image_request(3))).image) == 3
        assert runner.steps[0] - taken <= 2
        assert [(r.outcome, r.images) for r in reports] == [("abandoned", 2), ("made", 1)]

    in_loop(main())


def test_a_cancelled_request_in_the_queue_is_not_made() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0) as engine, device_occupied(runner, engine):
            task = asyncio.create_task(engine.generate(image_request(1)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
            assert engine.waiting == 0
        assert runner.calls == [[0]]

    in_loop(main())


def test_leaving_the_stream_is_leaving() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner) as engine:
            runner.hold()

            async def follow() -> None:
                async with aclosing(engine.stream(image_request(1, steps=50))) as events:
                    async for _ in events:
                        break

            task = asyncio.create_task(follow())
            await until_at_step(runner)
            await asyncio.to_thread(runner.step)
            await task
            assert engine.running == 0
            runner.release()
        assert runner.steps[0] <= 3

    in_loop(main())


def test_a_bad_request_is_refused_before_it_joins() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0.05) as engine:
            good = asyncio.create_task(engine.generate(image_request(1)))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="num_inference_steps is 0"):
                engine.submit(image_request(2), image_request(3, steps=0))  # all or none
            await good
        assert runner.calls == [[1]]

    in_loop(main())


def one_is_bad(bad: int, error: Exception) -> Callable[[list[int]], Exception | None]:
    return lambda seeds: error if bad in seeds else None


@pytest.mark.parametrize("error", [BackendError("no such size"), StopIteration()])
def test_a_request_that_fails_fails_alone(error: Exception) -> None:
    async def main() -> None:
        runner = FakeRunner(one_is_bad(2, error))
        async with AsyncEngine(runner, window=0.05) as engine:
            tasks = [asyncio.create_task(engine.generate(image_request(k))) for k in (1, 2, 3)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert seed_of(results[0].image) == 1
        assert seed_of(results[2].image) == 3
        assert isinstance(results[1], LatentRTError)
        assert error in (results[1], results[1].__cause__)
        assert runner.calls == [[1, 2, 3], [1], [2], [3]]

    in_loop(main())


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MemoryError(), "out of memory"),
        (OutOfMemoryError("no memory left on cuda in stage 'base'"), "out of memory"),
        (MemoryPlanError("demo at 1024x1024, batch 5, needs 9 GB"), "out of memory"),
        (EngineSizeError("the engine takes batch 1..4"), "no engine was built"),
    ],
)
def test_a_batch_too_large_is_halved_and_that_is_remembered(
    error: Exception, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        runner = FakeRunner(lambda seeds: error if len(seeds) > 2 else None)
        async with AsyncEngine(runner, window=0.05) as engine:
            for turn in range(2):
                seeds = list(range(10 * turn, 10 * turn + 5))
                results = await asyncio.gather(*[engine.generate(image_request(s)) for s in seeds])
                assert [seed_of(r.image) for r in results] == seeds
        assert [len(call) for call in runner.calls] == [5, 3, 2, 1, 2, 2, 2, 1]

    with caplog.at_level(logging.WARNING):
        in_loop(main())
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{why} for a batch of {n} images of 64x64; the limit is now {m}: {error!r}"
        for n, m in ((5, 3), (3, 2))
    ]


def test_out_of_memory_for_a_single_image_raises() -> None:
    async def main() -> None:
        runner = FakeRunner(lambda _: MemoryError("none left"))
        async with AsyncEngine(runner) as engine:
            with pytest.raises(MemoryError, match="none left"):
                await engine.generate(image_request(1))
        assert len(runner.calls) == 1

    in_loop(main())


def test_sizes_of_which_there_is_no_engine_are_no_fault_of_the_device() -> None:
    async def main() -> None:
        runner = FakeRunner(lambda _: EngineSizeError("the engine takes height 64..160"))
        reports: list[BatchReport] = []
        async with AsyncEngine(runner, on_batch=reports.append) as engine:
            for seed in range(4):
                with pytest.raises(EngineSizeError, match="takes height"):
                    await engine.generate(image_request(seed))
        assert [report.outcome for report in reports] == ["refused"] * 4
        assert runner.warm == 1

    in_loop(main())


def test_a_transient_device_error_does_not_stop_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        runner = FakeRunner(one_is_bad(1, ZeroDivisionError("mine")))
        async with AsyncEngine(runner) as engine:
            with pytest.raises(ZeroDivisionError):
                await engine.generate(image_request(1))
            assert seed_of((await engine.generate(image_request(2))).image) == 2

    in_loop(main())
    assert "a call for 1 images failed" in caplog.text


def test_failures_in_a_row_that_the_device_recovers_from_do_not_stop_the_engine() -> None:
    """A client whose requests fail cannot end the service."""

    async def main() -> None:
        runner = FakeRunner(lambda seeds: BackendError("no such size") if seeds[0] < 10 else None)
        async with AsyncEngine(runner) as engine:
            for seed in range(7):
                with pytest.raises(BackendError):
                    await engine.generate(image_request(seed))
            assert seed_of((await engine.generate(image_request(10))).image) == 10
        assert runner.warm == 3  # at the start, and after the third and the sixth

    in_loop(main())


def test_calls_that_are_refused_between_failures_show_nothing_of_the_device() -> None:
    async def main() -> None:
        error = BackendError("lost"), EngineSizeError("the engine takes height 64..160")
        runner = FakeRunner(lambda seeds: error[seeds[0] % 2])
        async with AsyncEngine(runner) as engine:
            for seed in range(5):
                with pytest.raises(type(error[seed % 2])):
                    await engine.generate(image_request(seed))
        assert runner.warm == 2  # at the start, and after the third that failed

    in_loop(main())


def test_memory_that_does_not_suffice_for_the_proof_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Others may hold it just then; it is tried again after as many failures."""

    class Full(FakeRunner):
        def warm_up(self, batches: Sequence[int] = (1,)) -> None:
            super().warm_up(batches)
            if self.warm == 2:
                raise OutOfMemoryError("no memory left on cuda")

    async def main() -> None:
        runner = Full(lambda seeds: BackendError("no such size") if seeds[0] < 10 else None)
        async with AsyncEngine(runner) as engine:
            for seed in range(6):
                with pytest.raises(BackendError):
                    await engine.generate(image_request(seed))
            assert seed_of((await engine.generate(image_request(10))).image) == 10
        assert runner.warm == 3

    in_loop(main())
    assert "the self-test image ran out of memory: no memory left on cuda" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), StopIteration()])
def test_a_device_that_does_not_recover_ends_the_engine(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Lost(FakeRunner):
        def warm_up(self, batches: Sequence[int] = (1,)) -> None:
            if self.calls:
                raise error

    async def main() -> None:
        runner = Lost(lambda _: RuntimeError("CUDA error: an illegal memory access was encountered"))
        engine = AsyncEngine(runner, window=0, max_batch=1)
        await engine.start()
        async with busy_and_failing(runner, engine):
            waiting = engine.submit(*[image_request(seed) for seed in range(1, 6)])
        ends = [await settled(job) for job in waiting]
        assert [type(end) for end in ends] == [RuntimeError] * 2 + [StoppedError] * 3
        assert isinstance(engine.failure, StoppedError)
        await engine.drain()

    in_loop(main(), 20)
    assert "3 calls failed in a row" in caplog.text


@asynccontextmanager
async def busy_and_failing(runner: FakeRunner, engine: AsyncEngine) -> AsyncIterator[None]:
    with pytest.raises(RuntimeError):
        async with device_occupied(runner, engine):
            yield


async def settled(job: Job) -> ImageResult | BaseException:
    return (await asyncio.gather(job.result(), return_exceptions=True))[0]


def test_another_event_loop_is_refused() -> None:
    async def main() -> None:
        async with AsyncEngine(FakeRunner(), window=0) as engine:

            def elsewhere() -> None:
                with pytest.raises(ServiceError, match="belongs to the event loop that started it"):
                    asyncio.run(engine.generate(image_request(1)))

            await asyncio.to_thread(elsewhere)

    in_loop(main())
