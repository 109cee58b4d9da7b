"""A runner without a model: steps are let through one by one, images are made of the seed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import PIL.Image
from latentrt.errors import RequestError
from latentrt.runtime.serve.requests import CheckedRequest, Group, ImageRequest, ImageResult
from latentrt.runtime.serve.runner import OnStep

T = TypeVar("T")


def in_loop(coroutine: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
    """Run to its end, in an event loop of its own."""
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


class FakeRunner:
    """Seeds name the images. `hold()` stops it before the next step; `fail` decides what goes wrong.

    Attributes:
        calls: the seeds of each call begun.
        steps: steps taken of each call.
    """

    def __init__(self, fail: Callable[[list[int]], Exception | None] = lambda _: None) -> None:
        self.calls: list[list[int]] = []
        self.steps: list[int] = []
        self.warm = 0
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

    def warm_up(self) -> None:
        self.warm += 1

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
        assert self.at_gate.acquire(timeout=10)

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
                self._single.acquire(timeout=120)
            self.steps[-1] += 1
            on_step(k + 1, lambda i: picture(seeds[i] + 100))
        if (error := self._fail(seeds)) is not None:
            raise error
        return [
            ImageResult(picture(s), {"seed": s}, {"base": 0.1, "total": 0.1}, len(seeds), 0) for s in seeds
        ]


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (2, 2), (seed % 256, seed // 256, 0))


def seed_of(image: PIL.Image.Image) -> int:
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green
