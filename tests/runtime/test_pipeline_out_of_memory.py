"""`runtime/calls.py`: pipelines that run out of memory, or whose work cannot be recorded: what is said, and that
they go on."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from collections.abc import Callable
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.tiny_requests import SEEDED_CALL
from latentrt.errors import CaptureError, OutOfMemoryError
from latentrt.runtime.denoise import DenoiseState
from latentrt.runtime.engines.lazy import LazyEngine
from latentrt.runtime.engines.triton import _UNetProgram
from latentrt.runtime.graph import Graphs
from latentrt.runtime.latents import NoiseSource
from latentrt.runtime.vae import VAE

Load = Callable[..., latentrt.Pipeline]

OTHER = {**SEEDED_CALL, "height": 32, "width": 32}


def place(name: str) -> tuple[type, str]:
    """Where memory runs out."""
    return {
        "text": (LazyEngine, "__call__"),
        "noise": (NoiseSource, "draw_steps"),
        "loop": (DenoiseState, "__init__"),
        "text of the loop": (_UNetProgram, "prepare"),
        "recording": (Graphs, "capture"),
        "decode": (VAE, "decode"),
    }[name]


PLACES = ("text", "noise", "loop", "text of the loop", "recording", "decode")


def fail(patch: pytest.MonkeyPatch, where: tuple[type, str], times: int, *, after: int = 0) -> list[int]:
    """Have a method fail so often; returns what counts its calls."""
    kind, name = where
    method, calls = getattr(kind, name), [0]

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        if any(isinstance(x, torch.device) and x.type == "meta" for x in args) or any(
            isinstance(x, torch.Tensor) and x.is_meta for x in vars(self).values()
        ):
            return method(self, *args, **options)  # the planner's, which takes no memory
        calls[0] += 1
        if after < calls[0] <= after + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore on that")
        return method(self, *args, **options)

    patch.setattr(kind, name, failing)
    return calls


@pytest.fixture(scope="module")
def used(load: Load) -> latentrt.Pipeline:
    return load(graphs=True)


@pytest.mark.parametrize("where", PLACES)
def test_out_of_memory_frees_cached_graphs_and_retries_once(
    where: str, used: latentrt.Pipeline, image_of_call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    used._loader.graph_cache.drop()
    used(**OTHER)
    assert used._loader.graph_cache.nbytes > 0
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "latentrt"):
        calls = fail(patch, place(where), 1)
        output = used(**SEEDED_CALL)
        assert calls[0] > 1
    assert np.array_equal(output.images, image_of_call)
    assert set(output.timings) == {"prepare", "text", "start", "base", "refiner", "decode", "total"}
    assert re.search(
        r"^no memory left on cpu in stage '\w+' .*; freed [\d.]+ [kM]B kept from earlier requests, trying once more$",
        caplog.messages[-1],
    )


@pytest.mark.parametrize("where", PLACES)
def test_out_of_memory_twice_shows_the_plan_and_the_pipeline_stays_usable(
    where: str, used: latentrt.Pipeline, image_of_call: Any
) -> None:
    used._loader.graph_cache.drop()
    used(**OTHER)
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, place(where), 1000)
        with pytest.raises(OutOfMemoryError) as caught:
            used(**SEEDED_CALL)
    assert re.search(
        r"^no memory left on cpu in stage '\w+' \(CUDA out of memory\. Tried to allocate 2\.00 GiB\.\); .*\. By plan, "
        r".* at 48x64, batch 1, float32 needs [\d.]+ MB of device memory with memory='resident' "
        r"\(text [\d.]+ MB, base ",
        str(caught.value),
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert used._calls.running == set()
    assert np.array_equal(used(**SEEDED_CALL).images, image_of_call)


def test_a_retry_draws_the_same_noise_from_given_generators_and_reports_its_steps_anew(
    used: latentrt.Pipeline, image_of_call: Any
) -> None:
    used(**OTHER)
    call = {key: value for key, value in SEEDED_CALL.items() if key != "seed"}
    steps: list[int] = []

    def note(pipe: Any, step: int, *_: Any) -> None:
        steps.append(step)

    with pytest.MonkeyPatch.context() as patch:
        fail(patch, place("decode"), 1)
        output = used(**call, generator=torch.Generator().manual_seed(3), callback_on_step_end=note)
    assert steps == [0, 1, 0, 1]
    assert np.array_equal(output.images, image_of_call)


@pytest.mark.parametrize("callback", ["callback_on_step_end", "callback_on_progress"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("my uploader: cannot allocate memory"), MemoryError(), OutOfMemoryError("of another")],
)
def test_what_a_callback_raises_is_the_caller_s(
    error: Exception, callback: str, used: latentrt.Pipeline, image_of_call: Any
) -> None:
    used(**OTHER)
    calls = []

    def upload(*_: Any) -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        used(**SEEDED_CALL, **{callback: upload})
    assert caught.value is error
    assert calls == [1]
    assert np.array_equal(used(**SEEDED_CALL).images, image_of_call)


def test_garbage_is_collected_before_a_retry(
    used: latentrt.Pipeline, image_of_call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that was dropped may be among it."""

    class Holder:
        def __init__(self) -> None:
            self.itself = self

    draw, waiting = NoiseSource.draw_steps, list[weakref.ref[Holder]]()

    def drawn(*args: Any) -> Any:
        if any(there() for there in waiting):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(*args)

    monkeypatch.setattr(NoiseSource, "draw_steps", drawn)
    used(**OTHER)
    gc.disable()
    try:
        waiting.append(weakref.ref(Holder()))
        assert np.array_equal(used(**SEEDED_CALL).images, image_of_call)
    finally:
        gc.enable()


def test_where_nothing_can_be_let_go_it_is_not_made_twice(load: Load) -> None:
    pipe = load(graphs=False)
    with pytest.MonkeyPatch.context() as patch:
        calls = fail(patch, (NoiseSource, "draw_steps"), 1000)
        with pytest.raises(OutOfMemoryError, match="By plan"):
            pipe(**SEEDED_CALL)
    assert calls == [1]


def test_what_cannot_be_recorded_is_named_and_runs_without_graphs(
    load: Load, image_of_call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _UNetProgram.run

    def reading(self: Any) -> None:
        run(self)
        self._prediction[0, 0, 0, 0].item()

    monkeypatch.setattr(_UNetProgram, "run", reading)
    pipe = load(graphs=True)
    for _ in range(2):  # not without graphs unless asked to
        with pytest.raises(
            CaptureError, match=r"a denoising step of unet .*_local_scalar_dense.*graphs=False"
        ):
            pipe(**SEEDED_CALL)
    assert np.array_equal(load(graphs=False)(**SEEDED_CALL).images, image_of_call)
