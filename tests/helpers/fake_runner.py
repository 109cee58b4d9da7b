"""A runner without a model: steps are let through one by one, images are made of the seed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import PIL.Image
from latentrt.errors import RequestError
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.requests import CheckedRequest, Group, ImageRequest, ImageResult
from latentrt.runtime.serve.runner import OnStep

T = TypeVar("T")


def in_loop(
    coroutine: Coroutine[Any, Any, T],
    seconds: float = 240.0,
    loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """The result of a coroutine in an event loop of its own, within `seconds` where the clock is the usual one."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, seconds) if loop is None else coroutine)


class FakeTime(asyncio.SelectorEventLoop):
    """A loop whose clock stands still until `pass_time`."""

    now = 1000.0

    def time(self) -> float:
        return self.now


async def pass_time(seconds: float) -> None:
    """Let what can go on do so, move a FakeTime's clock, and let what was waiting for that go on as well."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, FakeTime)
    for step in (seconds, 0.0):
        for _ in range(50):
            await asyncio.sleep(0)
        loop.now += step


class FakeRunner:
    """Seeds name the images. `hold()` stops it before the next step; `fail` decides what goes wrong.

    Attributes:
        calls: the seeds of each call begun.
        steps: steps taken of each call.
        warm: how often it was warmed up, the last time with `batches`.
    """

    captures = False

    def __init__(self, fail: Callable[[list[int]], Exception | None] = lambda _: None) -> None:
        self.calls: list[list[int]] = []
        self.steps: list[int] = []
        self.warm = 0
        self.batches: list[int] = []
        self._fail = fail
        self._gate = threading.Event()
        self._gate.set()
        self._single = threading.Semaphore(0)
        self.at_gate = threading.Semaphore(0)

    def check(self, request: ImageRequest) -> CheckedRequest:
        if request.steps < 1:
            raise RequestError(f"num_inference_steps is {request.steps}; it must be at least 1")
        group = Group(
            request.height or 64,
            request.width or 64,
            request.steps,
            True,
            request.sampler,
            request.high_noise_frac,
            request.negative_prompt is not None,
        )
        return CheckedRequest(request.prompt, None, 5.0, request.seed or 0, request.steps, group)

    def warm_up(self, batches: Sequence[int] = (1,)) -> None:
        self.warm += 1
        self.batches = list(batches)

    def hold(self) -> None:
        """From now on every step waits for `let_one()`, `step()` or `release()`."""
        self._single = threading.Semaphore(0)
        self.at_gate = threading.Semaphore(0)
        self._gate.clear()

    def step(self) -> None:
        """Let one step through, and wait until the next one is asked for."""
        self.let_one()
        self.reached()

    def let_one(self) -> None:
        """Let one step through."""
        self._single.release()

    def reached(self) -> None:
        """Wait until a step is asked for."""
        assert self.at_gate.acquire(timeout=240)

    def release(self) -> None:
        self._gate.set()
        self._single.release()

    def run(self, requests: Sequence[CheckedRequest], on_step: OnStep) -> list[ImageResult]:
        seeds = [request.seed for request in requests]
        self.calls.append(seeds)
        self.steps.append(0)
        for k in range(requests[0].steps):
            if not self._gate.is_set():
                self.at_gate.release()
                self._single.acquire(timeout=240)
            self.steps[-1] += 1
            on_step(k + 1, lambda i: picture(seeds[i] + 100))
        if (error := self._fail(seeds)) is not None:
            raise error
        return [
            ImageResult(picture(s), {"seed": s}, {"base": 0.1, "total": 0.1}, len(seeds), 0) for s in seeds
        ]


def picture(seed: int) -> PIL.Image.Image:
    """The image of a seed, 2x2."""
    return PIL.Image.new("RGB", (2, 2), (seed % 256, seed // 256 % 256, 0))


def seed_of(image: PIL.Image.Image) -> int:
    """The seed that `picture` was given."""
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def image_request(seed: int, **fields: Any) -> ImageRequest:
    """A request for the image of a seed, in three steps."""
    return ImageRequest("a cat", **{"seed": seed, "steps": 3, **fields})


async def until_at_step(runner: FakeRunner) -> None:
    """Wait until the runner, which is held, has come to a step."""
    await asyncio.to_thread(runner.reached)


@asynccontextmanager
async def device_occupied(runner: FakeRunner, engine: AsyncEngine) -> AsyncIterator[None]:
    """Occupy the device with a request of seed 0: those that come meanwhile share the batch that follows."""
    runner.hold()
    first = asyncio.create_task(engine.generate(image_request(0, height=8)))
    await until_at_step(runner)
    try:
        yield
    finally:
        runner.release()
    await first
