"""`runtime/progress.py` and `previews.py`: callbacks: what they see of a step and of the progress, what they may
change, and how they end a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.fake_stream import FakeStream
from helpers.parity import Rig
from helpers.tiny_requests import PLAIN_CALL
from latentrt.errors import RequestError
from latentrt.runtime.previews import Previewer
from latentrt.runtime.vae import VAE
from tolerances import PIPELINE_EAGER


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_callback_can_interrupt(at: int, both: latentrt.Pipeline) -> None:
    """Three steps are the base's and one the refiner's; the latents are those of the step it was told at. After the
    last there is nothing to stop."""
    call = {**PLAIN_CALL, "seed": 6, "high_noise_frac": 0.75}
    whole = both(**call).images
    seen: list[torch.Tensor] = []

    def stop(_: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"])
        return {"interrupt": 2 * (step == at)}  # whatever is true

    result = both(**{**call, "output_type": "latent"}, callback_on_step_end=stop)
    assert result.interrupted is (at < 3)
    assert len(seen) == at + 1
    assert torch.equal(result.images, seen[-1])
    again = both(**call)
    assert not again.interrupted
    assert np.array_equal(again.images, whole)


def test_diffusers_way_to_interrupt(both: latentrt.Pipeline) -> None:
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: float, tensors: Any) -> dict[str, Any]:
        seen.append(step)
        if step == 1:
            pipe._interrupt = True
        return {}

    assert both(**PLAIN_CALL, seed=6, callback_on_step_end=callback).interrupted
    assert seen == [0, 1]
    assert not both(**PLAIN_CALL, seed=6).interrupted


@pytest.mark.parametrize("name", ["_guidance_scale", "_guidance_rescale"])
def test_guidance_that_a_callback_changes_is_not_ignored(name: str, both: latentrt.Pipeline) -> None:
    """As diffusers' documentation has it for guidance that ends early."""

    def callback(pipe: Any, step: int, timestep: float, tensors: Any) -> dict[str, Any]:
        setattr(pipe, name, 0.0)
        return {}

    with pytest.raises(RequestError, match=f"{name} cannot be set.* denoising_start= and other guidance"):
        both(**PLAIN_CALL, seed=6, callback_on_step_end=callback)


def test_whether_a_call_is_interrupted_is_read_while_others_begin(both: latentrt.Pipeline) -> None:
    """A set that changes while it is iterated raises RuntimeError, in the callback that only looks."""

    class Call:
        @property
        def stop(self) -> threading.Event:
            both._calls.running.add(Call())  # as another thread's call does meanwhile
            return threading.Event()

    try:
        both._calls.running.update([Call(), Call()])
        assert not both._interrupt
    finally:
        both._calls.running.clear()


def test_interrupt_from_another_thread(both: latentrt.Pipeline) -> None:
    steps = []

    def wait_for_it(pipe: latentrt.Pipeline, step: int, *_: Any) -> None:
        steps.append(step)
        if step == 1:
            thread = threading.Thread(target=pipe.interrupt)
            thread.start()
            thread.join()

    result = both(**PLAIN_CALL, seed=6, callback_on_step_end=wait_for_it)
    assert result.interrupted
    assert steps == [0, 1]
    assert result.images.shape == (1, 64, 48, 3)
    assert np.isfinite(result.images).all()
    both.interrupt()  # nothing runs: nothing happens, to later calls neither
    assert not both(**PLAIN_CALL, seed=6).interrupted


def test_what_is_interrupted_after_its_last_step_is_whole(
    both: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = both(**PLAIN_CALL, seed=6).images
    decode = VAE.decode

    def interrupted(vae: VAE, *arguments: Any, **options: Any) -> torch.Tensor:
        both.interrupt()
        return decode(vae, *arguments, **options)

    monkeypatch.setattr(VAE, "decode", interrupted)
    result = both(**PLAIN_CALL, seed=6)
    assert not result.interrupted
    assert np.array_equal(result.images, whole)


def test_a_callback_that_fails_leaves_the_pipeline_usable(pipe: latentrt.Pipeline) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        pipe(**PLAIN_CALL, callback_on_step_end=fail)
    assert not pipe(**PLAIN_CALL).interrupted


def test_a_callback_sees_and_replaces_what_it_does_in_diffusers(rig: Rig, pipe: latentrt.Pipeline) -> None:
    def halve(log: list[tuple[int, float]]) -> Callable[..., dict[str, Any]]:
        def callback(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            log.append((step, float(timestep)))
            return {"latents": values["latents"] * 0.5} if step == 1 else {}

        return callback

    ours: list[tuple[int, float]] = []
    theirs: list[tuple[int, float]] = []
    image = pipe(
        **PLAIN_CALL, generator=torch.Generator().manual_seed(1), callback_on_step_end=halve(ours)
    ).images
    oracle = rig.diffusers("sdxl")(
        **PLAIN_CALL, generator=torch.Generator().manual_seed(1), callback_on_step_end=halve(theirs)
    ).images
    assert ours == theirs
    assert np.abs(image - oracle).max() <= PIPELINE_EAGER


def test_a_callback_can_differentiate(pipe: latentrt.Pipeline) -> None:
    """As guidance by a gradient does, with diffusers' pipelines as here."""

    def guide(_: Any, __: int, ___: float, values: dict[str, Any]) -> dict[str, Any]:
        with torch.enable_grad():
            latents = values["latents"].requires_grad_()
            (gradient,) = torch.autograd.grad(latents.square().sum(), latents)
        return {"latents": latents - 0.5 * gradient}

    call = {**PLAIN_CALL, "num_inference_steps": 1, "output_type": "latent"}
    assert not pipe(**call, callback_on_step_end=guide).images.any()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (3, "callback_on_step_end returned 3; it can return"),
        ({"latent": 1}, "'latent': 1.*'latents' or 'interrupt'"),
        (
            {"latents": torch.zeros(1, 4, 8, 8)},
            r"returned latents \[1, 4, 8, 8\]; they are a tensor \[1, 4, 8, 6\]",
        ),
        ({"latents": np.zeros((1, 4, 8, 6))}, r"returned latents as a ndarray; they are a tensor"),
        (
            {"latents": torch.zeros(1, 4, 8, 6, device="meta")},
            "latents of callback_on_step_end is a tensor that cannot be read .* on meta",
        ),
        (torch.zeros(1, 4, 8, 6), r"callback_on_step_end returned tensor.* can return a mapping"),
        ("", "callback_on_step_end returned ''; it can return"),
        (
            {"interrupt": np.array([True, False])},
            r"interrupt is array\(\[ True, False\]\); it can be True or",
        ),
    ],
)
def test_what_a_callback_may_not_return(answer: Any, message: str, pipe: latentrt.Pipeline) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(**PLAIN_CALL, callback_on_step_end=lambda *_: answer)


def test_changing_the_latents_in_place_changes_nothing(pipe: latentrt.Pipeline) -> None:
    """They are a copy: whoever keeps them for a preview need not fear the next step."""

    def spoil(_: Any, __: int, ___: float, values: Mapping[str, Any]) -> None:
        values["latents"].zero_()

    assert np.array_equal(
        pipe(**PLAIN_CALL, seed=2, callback_on_step_end=spoil).images, pipe(**PLAIN_CALL, seed=2).images
    )


def test_progress_is_reported_with_previews(both: latentrt.Pipeline) -> None:
    previewer = Previewer.fit(both.vae, 64, 48, both.device)
    told: list[Any] = []
    made = both(
        **PLAIN_CALL,
        seed=6,
        callback_on_progress=lambda _, done, values: told.append((done, values["preview"].shape)),
        previewer=previewer,
    )
    assert told == [(k, (1, 8, 6, 3)) for k in range(1, 5)]
    assert np.array_equal(made.images, both(**PLAIN_CALL, seed=6).images)


def test_progress_can_interrupt(both: latentrt.Pipeline) -> None:
    told: list[Any] = []

    def callback(pipe: Any, done: int, values: Any) -> dict[str, Any]:
        told.append((done, values["preview"]))
        return {"interrupt": done == 2}

    assert both(**PLAIN_CALL, seed=6, callback_on_progress=callback).interrupted
    assert told == [(1, None), (2, None)]
    with pytest.raises(RequestError, match=r"discard is tensor\(\[1., 1.\]\); it can be True or False"):
        both(**PLAIN_CALL, callback_on_progress=lambda *_: {"discard": torch.ones(2)})
    with pytest.raises(RequestError, match=r"callback_on_progress returned 3; it can return"):
        both(**PLAIN_CALL, seed=6, callback_on_progress=lambda *_: 3)


@pytest.mark.parametrize("last", [2, 4])  # midway, and when nothing but the pixels is left
def test_a_discarded_image_is_not_decoded(
    last: int, both: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(VAE, "decode", decode)
        dropped = both(
            **PLAIN_CALL, seed=6, callback_on_progress=lambda _, done, __: {"discard": done == last}
        )
    assert dropped.images is None
    assert dropped.interrupted
    assert set(dropped.timings) >= {"base", "total"}
    assert both(**PLAIN_CALL, seed=6, callback_on_progress=lambda *_: {"discard": False}).images is not None


@pytest.mark.parametrize("output_type", ["pt", "latent"])
@pytest.mark.parametrize("lagging", [False, True])  # then only the wait at the end finds the last step done
def test_discarded_images_are_not_returned(
    output_type: str, lagging: bool, both: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = FakeStream()
    if lagging:
        monkeypatch.setattr("latentrt.runtime.progress.current_stream", lambda device: stream)
    call = {**PLAIN_CALL, "seed": 6, "output_type": output_type}
    dropped = both(**call, callback_on_progress=lambda _, done, __: {"discard": done == 4})
    assert dropped.images is None
    assert dropped.interrupted


def test_the_host_waits_for_the_device_between_steps_and_at_the_end_alone(
    both: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not between base and refiner, nor for a stage's time, nor for progress."""
    stream = FakeStream()
    monkeypatch.setattr("latentrt.runtime.progress.current_stream", lambda device: stream)
    timings = both(**PLAIN_CALL, seed=6, callback_on_progress=lambda *_: stream.log.append("told")).timings
    waits = [k for k, line in enumerate(stream.log) if line.startswith("wait")]
    told = [k for k, line in enumerate(stream.log) if line == "told"]
    assert len(told) == 4
    assert (
        sum(k < told[0] for k in waits) == 4 - 2
    )  # before the third and the fourth step; then the first is told of
    assert len(waits) <= 2 + 4  # the other steps, and the end
    assert timings["refiner"] > 0
