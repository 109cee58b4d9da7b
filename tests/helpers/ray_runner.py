"""What replicas of the tests run: the runner without a model, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from latentrt.errors import CheckpointNotFoundError
from latentrt.runtime.serve.requests import CheckedRequest, ImageResult
from latentrt.runtime.serve.runner import OnStep

from helpers.fake_runner import FakeRunner

STEP = 0.05
HELD = FakeRunner()


class SteadyRunner(FakeRunner):
    """Each step takes a while."""

    def run(self, requests: Sequence[CheckedRequest], on_step: OnStep) -> list[ImageResult]:
        def step(k: int, preview: object) -> None:
            time.sleep(STEP)
            on_step(k, preview)  # type: ignore[arg-type]

        return super().run(requests, step)


def steady() -> SteadyRunner:
    return SteadyRunner()


def quick() -> FakeRunner:
    return FakeRunner()


def held() -> FakeRunner:
    return HELD


def broken() -> FakeRunner:
    raise CheckpointNotFoundError("'no-model' is not a local folder or file")
