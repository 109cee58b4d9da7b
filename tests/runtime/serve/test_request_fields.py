"""`runtime/serve/schema.py`: what a pipeline refuses names the field of the request, though it knows arguments
alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import latentrt
import pytest
from helpers.served import Served, served
from latentrt.runtime.serve.runner import PipelineRunner
from latentrt.runtime.serve.schema import Limits


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    pipe = latentrt.Pipeline.from_pretrained("demo", backend="eager", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    with served(lambda: PipelineRunner(pipe), limits=Limits(steps=5000, images=9), max_waiting=8) as one:
        yield one


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 9, "the request asks for 9 images, and at most 8 may wait; ask for fewer"),
        ("size", "60x64", "width is 60; it must be a multiple of 8"),
        ("size", "64x60", "height is 60; it must be a multiple of 8"),
        ("size", "8x20000", "height is 20000"),
        ("steps", 1001, "1001 steps were asked for; this schedule has 1 to 1000"),
        ("sampler", "heun", "there is no sampler 'heun'; there are euler,"),
        ("sampler", "", "there is no sampler ''"),
    ],
)
def test_a_refusal_names_the_field(field: str, value: Any, message: str, demo: Served) -> None:
    answer = demo.ask(**{field: value})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(message)


def test_the_largest_seed_is_taken(demo: Served) -> None:
    answer = demo.ask(seed=2**63 - 1, size="64x64", steps=1)
    assert answer.json()["data"][0]["seed"] == 2**63 - 1
