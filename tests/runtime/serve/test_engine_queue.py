"""`runtime/serve/engine.py`: what may wait in the queue, deadlines, draining, and a fault that stops the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.fake_clock import FakeClock
from helpers.fake_runner import (
    FakeRunner,
    FakeTime,
    device_occupied,
    image_request,
    in_loop,
    pass_time,
    seed_of,
    until_at_step,
)
from latentrt.errors import (
    BackendError,
    DeadlineError,
    DrainingError,
    QueueFullError,
    RequestError,
    ServiceError,
    StoppedError,
)
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.requests import CheckedRequest, ImageResult
from latentrt.runtime.serve.runner import OnStep


def test_the_queue_is_bounded_and_says_when_to_come_again() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, max_waiting=3, window=0) as engine:
            async with device_occupied(runner, engine):
                jobs = engine.submit(image_request(1), image_request(2))
                with pytest.raises(
                    QueueFullError, match=r"2 of 3 places are taken, and the request needs 2;"
                ) as full:
                    engine.submit(image_request(3), image_request(4))
                assert full.value.retry_after >= 1
                jobs += engine.submit(image_request(3))
            for job in jobs:
                await job.result()

    in_loop(main())


def test_deadlines() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0) as engine:
            async with device_occupied(runner, engine):
                (job,) = engine.submit(image_request(1), timeout=5.0)
                await pass_time(4.9)
                assert engine.waiting == 1
                await pass_time(0.2)
                with pytest.raises(DeadlineError, match=r"still waiting after 5 s; give it more time"):
                    await job.result()
                assert engine.waiting == 0
            runner.hold()
            (late,) = engine.submit(image_request(2, steps=50), timeout=60.0)
            await until_at_step(runner)
            await pass_time(61.0)
            with pytest.raises(DeadlineError, match=r"still being made after 60 s"):
                await late.result()
            runner.release()
        assert [call for call in runner.calls if 1 in call] == []
        assert runner.steps[-1] <= 2

    in_loop(main(), loop=FakeTime)


def test_what_cannot_be_made_in_time_is_refused_at_once() -> None:
    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0, max_batch=1) as engine:
            runner.hold()
            (first,) = engine.submit(image_request(1))
            await until_at_step(runner)
            await pass_time(30.0)  # the pace it learns: 30 s for 3 steps of 64x64
            runner.release()
            await first.result()
            async with device_occupied(runner, engine):
                jobs = engine.submit(*[image_request(k) for k in range(2, 6)])
                late = r"take an estimated 153\.[78] to 384\.\d s, .* timeout is 380 s; try again in 5 s"
                with pytest.raises(QueueFullError, match=late):
                    engine.submit(image_request(9), timeout=380.0)
                with pytest.raises(QueueFullError, match="try again in 60 s"):  # never longer
                    engine.submit(image_request(9), timeout=10.0)
                jobs += engine.submit(image_request(9), timeout=390.0)
                jobs += engine.submit(
                    image_request(10), timeout=300.0, again=True
                )  # let in before, by one that was lost
                with pytest.raises(QueueFullError, match="6 of 64 places are taken"):
                    engine.submit(
                        *[image_request(k) for k in range(20, 79)], again=True
                    )  # but there is no room
            for job in jobs:
                await job.result()

    in_loop(main(), loop=FakeTime)


def test_small_images_say_nothing_against_large_ones() -> None:
    """The largest is ten million times the work of the smallest: by that share it would take days."""

    async def main() -> None:
        runner = FakeRunner()
        async with AsyncEngine(runner, window=0) as engine:
            for seed in range(3):
                await engine.generate(image_request(seed, height=8, width=8, steps=1))
            async with device_occupied(runner, engine):
                (job,) = engine.submit(image_request(1, height=2048, width=2048, steps=150), timeout=600.0)
                runner.release()
                assert seed_of((await job.result()).image) == 1

    in_loop(main())


def test_the_time_of_calls_that_failed_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes a second, be it for four images, of which three fail alone as well, or for one."""
    clock = FakeClock()
    clock.install(monkeypatch)

    class Timed(FakeRunner):
        def run(self, requests: Sequence[CheckedRequest], on_step: OnStep) -> list[ImageResult]:
            clock.sleep(1.0)
            loop.now += 1.0
            return super().run(requests, on_step)

    loop = FakeTime()

    async def main() -> None:
        runner = Timed(lambda seeds: RequestError("bad") if max(seeds) >= 100 else None)
        async with AsyncEngine(runner, window=0) as engine:
            for _ in range(3):
                async with device_occupied(runner, engine):
                    jobs = engine.submit(*(image_request(seed) for seed in (1, 100, 101, 102)))
                await asyncio.gather(*(job.result() for job in jobs), return_exceptions=True)
            assert runner.calls[-5:] == [[1, 100, 101, 102], [1], [100], [101], [102]]
            group = jobs[0].group
            seconds = engine._admission.call_times.seconds(group.size, group.cost, loop.time())
        assert seconds == pytest.approx(1.0, rel=1e-3)

    in_loop(main(), loop=lambda: loop)


def test_draining_makes_what_was_taken_and_takes_nothing_new() -> None:
    async def main() -> None:
        runner = FakeRunner()
        engine = AsyncEngine(runner, window=5)
        with pytest.raises(DrainingError, match="was not started"):
            engine.submit(image_request(1))
        await engine.start()
        job, other = engine.submit(image_request(1), image_request(2, steps=4))
        await engine.drain()  # without waiting for the window
        assert seed_of((await job.result()).image) == 1
        assert seed_of((await other.result()).image) == 2
        assert engine.draining
        assert not engine.at_work
        with pytest.raises(DrainingError, match="shutting down and takes nothing new"):
            engine.submit(image_request(3))

    in_loop(main())


def test_requests_left_after_the_drain_timeout_get_a_draining_error() -> None:
    async def main() -> None:
        runner = FakeRunner()
        engine = AsyncEngine(runner, window=0)
        await engine.start()
        runner.hold()
        running, waiting = engine.submit(image_request(1, steps=50), image_request(2, steps=4))
        await until_at_step(runner)
        draining = asyncio.create_task(engine.drain(timeout=5.0))
        await pass_time(6.0)
        for job in (running, waiting):
            with pytest.raises(
                DrainingError, match="shut down before the image was made; send the request to another server"
            ):
                await job.result()
        runner.release()
        await draining
        assert runner.calls == [[1]]
        assert runner.steps[0] <= 2

    in_loop(main(), loop=FakeTime)


def test_draining_ends_though_the_device_does_not(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        runner = FakeRunner()
        engine = AsyncEngine(runner, window=0)
        await engine.start()
        runner.hold()
        (job,) = engine.submit(image_request(1))
        await until_at_step(runner)
        draining = asyncio.create_task(engine.drain(timeout=5.0))
        await pass_time(6.0)
        await pass_time(60.0)
        await draining
        assert engine.at_work
        with pytest.raises(DrainingError):
            await job.result()
        runner.release()

    in_loop(main(), loop=FakeTime)
    assert "the device is still busy" in caplog.text


def test_a_fault_that_stops_the_engine_fails_waiting_requests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        runner = FakeRunner()
        engine = AsyncEngine(runner, window=0)
        await engine.start()
        async with device_occupied(runner, engine):
            jobs = engine.submit(image_request(1), image_request(2))

            def take(now: float) -> Any:
                raise ZeroDivisionError("planted")

            monkeypatch.setattr(engine._queue, "take", take)
        for job in jobs:
            with pytest.raises(
                StoppedError, match="stopped through a fault of its own; start the service again"
            ):
                await job.result()
        assert engine.waiting == 0
        with pytest.raises(StoppedError):
            engine.submit(image_request(3))
        await engine.drain()

    in_loop(main())
    assert "planted" in caplog.text


def test_a_model_that_does_not_load_says_so() -> None:
    class Broken(FakeRunner):
        def warm_up(self, batches: Sequence[int] = (1,)) -> None:
            raise BackendError("no device")

    async def main() -> None:
        with pytest.raises(BackendError, match="no device"):
            async with AsyncEngine(Broken()):
                raise AssertionError("never entered")

    in_loop(main())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0; it must be at least 1"),
        ({"max_batch": 2.5}, "max_batch must be a whole number; got 2.5"),
        ({"max_waiting": 0}, "max_waiting is 0; it must be at least 1"),
        ({"max_waiting": "8"}, "max_waiting must be a whole number; got '8'"),
        ({"window": float("nan")}, "window must be a finite number; got nan"),
        ({"window": None}, "window must be a finite number; got None"),
        ({"pipe": "demo"}, "pipe is 'demo'; give what Pipeline.from_pretrained returns"),
    ],
)
def test_what_an_engine_cannot_be_made_of_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        AsyncEngine(**{"pipe": FakeRunner(), **fields})


@pytest.mark.parametrize(
    ("asked", "timeout", "message"),
    [
        ({"prompt": "a cat"}, None, "the request is a dict; give an ImageRequest"),
        ("a cat", None, "the request is a str; give an ImageRequest"),
        (image_request(1), "3", "timeout must be a finite number; got '3'"),
        (image_request(1), float("nan"), "timeout must be a finite number; got nan"),
        (image_request(1), np.array([1.0, 2.0]), "timeout must be a finite number; got array"),
    ],
)
def test_what_is_no_request_is_refused(asked: Any, timeout: Any, message: str) -> None:
    async def main() -> None:
        async with AsyncEngine(FakeRunner(), window=0) as engine:
            with pytest.raises(RequestError, match=message):
                await engine.generate(asked, timeout=timeout)
            with pytest.raises(RequestError, match="previews is array"):
                engine.submit(image_request(1), previews=np.array([True, False]))  # type: ignore[arg-type]
            assert seed_of((await engine.generate(image_request(2), timeout=float("inf"))).image) == 2

    in_loop(main())


def test_an_engine_serves_once() -> None:
    """Started again it would serve twice at once, or without its thread."""
    once = "an engine serves once; make a new AsyncEngine"

    async def main() -> None:
        engine = AsyncEngine(FakeRunner(), window=0)
        async with engine:
            with pytest.raises(ServiceError, match=once):
                await engine.start()
            assert seed_of((await engine.generate(image_request(2))).image) == 2
        for ended in (engine, AsyncEngine(FakeRunner())):
            await ended.drain()
            with pytest.raises(ServiceError, match=once):
                async with ended:
                    raise AssertionError("never entered")

    in_loop(main())
