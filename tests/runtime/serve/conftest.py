"""A server over a runner without a model, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from helpers.fake_runner import FakeRunner
from helpers.served import Served, served
from latentrt.runtime.serve.schema import Limits


@pytest.fixture(scope="module")
def shared_runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture(scope="module")
def server(shared_runner: FakeRunner) -> Iterator[Served]:
    limits = Limits(pixels=512 * 512, steps=200, images=4, prompt=100, body=10_000)
    with served(lambda: shared_runner, limits=limits, max_waiting=8) as one:
        yield one


@pytest.fixture
def runner(shared_runner: FakeRunner) -> Iterator[FakeRunner]:
    """The server's; whatever a test held is let go."""
    shared_runner.calls.clear()
    shared_runner.steps.clear()
    yield shared_runner
    shared_runner.release()


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one
