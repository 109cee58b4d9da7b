"""`runtime/pipeline.py` and `calls.py`: what a call promises besides the right image: seeds, threads, forms of output,
what it reports."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import latentrt
import numpy as np
import PIL.Image
import pytest
import torch
from helpers.parity import Rig
from helpers.parity_cases import SEEDS, Case
from helpers.tiny_requests import PLAIN_CALL
from latentrt.errors import RequestError
from latentrt.runtime.record import records
from tolerances import PIPELINE_EAGER


def alone_and_together(rig: Rig, backend: str) -> tuple[list[Any], list[Any]]:
    """Three images of a stochastic sampler through base and refiner: each alone, and in one call."""
    case = Case("ensemble", "euler-a", "epsilon", 3, 7.5, 3, "a", backend)
    pipe = rig.pipeline("ensemble", backend)
    size = dict(zip(("height", "width"), case.size, strict=True))
    common = {**case.options(), **size, "sampler": case.sampler, "output_type": "np", "high_noise_frac": 0.5}
    alone = [pipe(**case.told(k), **common, seed=SEEDS[k]).images[0] for k in range(case.batch)]
    return alone, list(rig.ours(case))


@pytest.mark.timeout(900)
def test_a_seed_gives_the_same_bits_alone_and_in_a_batch_on_onnxruntime(rig: Rig) -> None:
    alone, together = alone_and_together(rig, "onnxruntime")
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)


def test_a_seed_gives_the_same_image_alone_and_in_a_batch_on_eager(rig: Rig) -> None:
    alone, together = alone_and_together(rig, "eager")
    for a, b in zip(alone, together, strict=True):
        assert np.abs(a - b).max() <= PIPELINE_EAGER
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "scales"), [("ensemble", (7.5, 3.0)), ("ensemble", (1.0, 0.5)), ("lcm", (9.0, 2.0))]
)
def test_each_image_has_its_own_guidance_scale(kind: str, scales: tuple[float, ...], rig: Rig) -> None:
    """LCM's UNet is told the scale, the others are guided by it."""
    pipe = rig.pipeline(kind, "eager")
    together = pipe(**PLAIN_CALL, num_images_per_prompt=2, seed=3, guidance_scale=list(scales))
    for k, scale in enumerate(scales):
        alone = pipe(**PLAIN_CALL, seed=3 + k, guidance_scale=scale)
        assert np.abs(together.images[k] - alone.images[0]).max() <= PIPELINE_EAGER
        assert together.parameters[k] == alone.parameters[0]
    other = pipe(**PLAIN_CALL, seed=4, guidance_scale=scales[0])
    differs = np.abs(together.images[1] - other.images[0]).max() > 10 * PIPELINE_EAGER
    assert differs == (scales[0] > 1)  # below, guidance is off whatever the scale


def test_a_call_is_checked_without_being_made(both: latentrt.Pipeline) -> None:
    request, steps = both.check(**PLAIN_CALL, seed=5, high_noise_frac=0.5, sampler="pndm")
    assert (request.height, request.width, request.seeds) == (64, 48, [5])
    seen: list[int] = []
    both(
        **PLAIN_CALL,
        seed=5,
        high_noise_frac=0.5,
        sampler="pndm",
        callback_on_step_end=lambda _, k, *__: seen.append(k),
    )
    assert steps == len(seen) > PLAIN_CALL["num_inference_steps"]
    for arguments, message in (({"seed": -1}, "seed is -1"), ({"sampler": "heun"}, "no sampler 'heun'")):
        with pytest.raises(RequestError, match=message):
            both.check(**PLAIN_CALL, **arguments)


def test_seeds_count_up_from_the_first(pipe: latentrt.Pipeline) -> None:
    four = pipe(**PLAIN_CALL, num_images_per_prompt=4, seed=41)
    assert [p["seed"] for p in four.parameters] == [41, 42, 43, 44]
    third = pipe(**PLAIN_CALL, seed=43).images[0]
    assert np.abs(four.images[2] - third).max() <= PIPELINE_EAGER


def test_seed_zero_is_a_seed(pipe: latentrt.Pipeline) -> None:
    zero = pipe(**PLAIN_CALL, seed=0)
    assert zero.parameters[0]["seed"] == 0
    again = pipe(**PLAIN_CALL, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(zero.images, again.images)
    assert again.parameters[0]["seed"] == 0


def test_without_a_seed_one_is_drawn_and_reported(pipe: latentrt.Pipeline) -> None:
    first, second = pipe(**PLAIN_CALL), pipe(**PLAIN_CALL)
    assert first.parameters[0]["seed"] != second.parameters[0]["seed"]
    assert not np.array_equal(first.images, second.images)
    assert np.array_equal(first.images, pipe(**PLAIN_CALL, seed=first.parameters[0]["seed"]).images)


def test_a_used_generator_has_no_seed_to_tell(pipe: latentrt.Pipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    first = pipe(**PLAIN_CALL, generator=generator)
    second = pipe(**PLAIN_CALL, generator=generator)
    assert [p.parameters[0]["seed"] for p in (first, second)] == [5, None]
    twice = {**PLAIN_CALL, "prompt": ["storm", "storm"], "negative_prompt": "blurry"}
    fresh = torch.Generator().manual_seed(5)
    assert [p["seed"] for p in pipe(**twice, generator=[fresh, fresh]).parameters] == [5, None]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_threads_each_get_their_own_image(
    backend: str, tiny: Callable[..., Path], shared_export_cache: Path
) -> None:
    """On a pipeline nothing of which is loaded yet, with other samplers, steps and sizes in each thread."""
    pipe = latentrt.Pipeline.from_pretrained(
        tiny("sdxl"), tiny("refiner"), backend=backend, cache_dir=shared_export_cache
    )
    pipe.set_progress_bar_config(disable=True)
    calls = [
        {**PLAIN_CALL, "seed": 1, "sampler": "euler-a"},
        {**PLAIN_CALL, "seed": 2, "num_inference_steps": 6, "sampler": "dpm++2m"},
        {**PLAIN_CALL, "seed": 3, "height": 48, "width": 64, "guidance_scale": 1.0},
        {**PLAIN_CALL, "seed": 4, "prompt": ["storm", "green"], "high_noise_frac": 0.5},
    ]
    start = threading.Barrier(len(calls))

    def run(call: dict[str, Any]) -> Any:
        start.wait()
        return pipe(**call).images

    with ThreadPoolExecutor(len(calls)) as pool:
        together = list(pool.map(run, calls))
    for call, images in zip(calls, together, strict=True):
        assert np.array_equal(images, pipe(**call).images)


def test_a_pipeline_does_not_move_under_a_call(
    both: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.runtime.pipeline.parse_device", torch.device)
    said: list[str] = []

    def callback(pipe: Any, step: int, timestep: float, tensors: Any) -> None:
        with pytest.raises(RequestError, match="cannot move to 'meta' while a call runs") as error:
            pipe.to("meta")
        said.append(str(error.value))

    assert not both(**PLAIN_CALL, seed=6, callback_on_step_end=callback).interrupted
    assert len(said) == 4
    assert both.device.type == "cpu"


def test_forms_of_output(pipe: latentrt.Pipeline) -> None:
    made = {
        kind: pipe(**{**PLAIN_CALL, "output_type": kind}, seed=8).images
        for kind in ("pil", "np", "pt", "latent")
    }
    array = made["np"]
    assert (array.shape, array.dtype) == ((1, 64, 48, 3), np.float32)
    assert array.min() >= 0
    assert array.max() <= 1
    assert (tuple(made["pt"].shape), made["pt"].dtype) == ((1, 3, 64, 48), torch.float32)
    assert np.array_equal(made["pt"].permute(0, 2, 3, 1).numpy(), array)
    (image,) = made["pil"]
    assert isinstance(image, PIL.Image.Image)
    assert (image.size, image.mode) == ((48, 64), "RGB")
    assert np.array_equal(np.asarray(image), (array[0] * 255).round().astype(np.uint8))
    assert (tuple(made["latent"].shape), made["latent"].dtype) == ((1, 4, 8, 6), torch.float32)
    for kind in ("pt", "latent"):  # ordinary tensors, to change and to differentiate by
        made[kind].mul_(2)
        (made[kind] * torch.ones(1, requires_grad=True)).sum().backward()


def test_parameters_reproduce_the_image(both: latentrt.Pipeline) -> None:
    call = {**PLAIN_CALL, "prompt": ["storm", "green"], "negative_prompt": ["blurry", ""], "seed": [9, 4]}
    first, second = both(
        **call, num_images_per_prompt=1, guidance_scale=3, sampler="ddim", clip_skip=1, high_noise_frac=0.5
    ).parameters
    assert first == {
        "prompt": "storm",
        "negative_prompt": "blurry",
        "steps": 4,
        "sampler": "ddim",
        "guidance_scale": 3.0,
        "size": "48x64",
        "seed": 9,
        "model": both._parts.base.source.rsplit("/", 1)[-1],
        "refiner": both._parts.refiner.source.rsplit("/", 1)[-1],
        "high_noise_frac": 0.5,
        "clip_skip": 1,
        "backend": "eager",
        "dtype": "float32",
        "version": f"latentrt {latentrt.__version__}",
    }
    assert (second["prompt"], second["seed"]) == ("green", 4)
    assert "negative_prompt" not in second


def test_parameters_hold_every_argument(both: latentrt.Pipeline) -> None:
    """A record that leaves something out cannot make the image again."""
    asked: dict[str, Any] = {
        "prompt_2": "green",
        "negative_prompt_2": "dark",
        "guidance_rescale": 0.5,
        "eta": 0.25,
        "aesthetic_score": 7.0,
        "negative_aesthetic_score": 2.0,
    }
    sizes = {
        "original_size": (32, 40),
        "target_size": (56, 24),
        "negative_original_size": (8, 16),
        "negative_target_size": (24, 32),
    }
    crops = {"crops_coords_top_left": (3, 5), "negative_crops_coords_top_left": (0, 0)}
    (told,) = both(**PLAIN_CALL, seed=1, sampler="ddim", **asked, **sizes, **crops).parameters
    assert {name: told[name] for name in asked} == asked
    assert {name: told[name] for name in sizes} == {name: f"{w}x{h}" for name, (h, w) in sizes.items()}
    assert {name: told[name] for name in crops} == {
        name: f"{top},{left}" for name, (top, left) in crops.items()
    }


def test_the_vae_decodes_in_tiles_where_asked(
    pipe: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.runtime.request.TILE", 8)
    call = {**PLAIN_CALL, "seed": 2, "width": 96}
    tiled = pipe(**{**call, "output_type": "pt"}, tiled_vae=True)
    latents = pipe(**{**call, "output_type": "latent"}, tiled_vae=True)
    with torch.no_grad():
        assert tiled.images.equal(pipe.vae.decode(latents.images, tile=8))
        assert not tiled.images.equal(pipe.vae.decode(latents.images))
    assert tiled.parameters[0]["tiled_vae"] is True
    assert "tiled_vae" not in latents.parameters[0]
    one_tile = pipe(**{**call, "width": 64, "height": 64}, tiled_vae=True)
    assert "tiled_vae" not in one_tile.parameters[0]


def test_a_vae_s_dtype_is_in_the_record_where_it_is_another(tiny: Callable[..., Path]) -> None:
    """The tiny SDXL's would overflow in half precision, as the published one."""
    for dtype, wanted in (("float16", ("float16", "float32")), ("float32", ("float32", None))):
        pipe = latentrt.Pipeline.from_pretrained(tiny("sdxl"), backend="eager", dtype=dtype)
        (record,) = records(pipe._request("storm"), pipe._parts)
        assert (record["dtype"], record.get("vae_dtype")) == wanted


def test_parameters_hold_schedule_ends_and_given_latents(pipe: latentrt.Pipeline) -> None:
    call = {**PLAIN_CALL, "output_type": "latent", "seed": 1}
    first = pipe(**call, denoising_end=0.5, latents=torch.zeros(1, 4, 8, 6))
    assert first.parameters[0]["denoising_end"] == 0.5
    assert first.parameters[0]["latents"] == "given"
    second = pipe(**call, denoising_start=0.5, image=first.images).parameters[0]
    assert second["denoising_start"] == 0.5
    assert "strength" not in second


def test_ignored_scheduler_fields_are_logged_once_per_sampler(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """Not once per request, nor once per place that looks at the sampler."""
    pipe = rig.pipeline("sdxl", "eager", scheduler={"shift": 3.0})
    for sampler in (None, None, "ddim", "ddim"):
        pipe(**PLAIN_CALL, seed=1, sampler=sampler)
    assert caplog.text.count("ignored: shift") == 2


def test_stages_are_timed(both: latentrt.Pipeline) -> None:
    timings = both(**PLAIN_CALL).timings
    assert list(timings) == ["prepare", "text", "start", "base", "refiner", "decode", "total"]
    assert all(seconds >= 0 for seconds in timings.values())
    assert timings["total"] == pytest.approx(sum(timings.values()) / 2)
    assert "decode" not in both(**{**PLAIN_CALL, "output_type": "latent"}).timings


def test_two_checkpoints_of_a_kind_are_timed_apart(tiny: Callable[..., Path]) -> None:
    """A second base in the refiner's place, as communities use them."""
    pipe = latentrt.Pipeline.from_pretrained(tiny("sdxl"), tiny("sdxl"), backend="eager")
    assert list(pipe(**PLAIN_CALL).timings) == [
        "prepare",
        "text",
        "start",
        "base",
        "refiner",
        "decode",
        "total",
    ]


def test_progress_shows_only_where_it_is_wanted(
    both: latentrt.Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        both.set_progress_bar_config()
        both(**PLAIN_CALL)
        assert capsys.readouterr() == ("", "")  # not a terminal
        shown = io.StringIO()
        both.set_progress_bar_config(disable=False, file=shown, leave=True)
        both(**PLAIN_CALL)
        assert "4/4" in shown.getvalue()
    finally:
        both.set_progress_bar_config(disable=True)


def test_without_a_stderr_no_bar_is_shown(both: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pythonw leaves it, and some service managers."""
    monkeypatch.setattr(sys, "stderr", None)
    for options in ({}, {"disable": False}):
        both.set_progress_bar_config(**options)
        try:
            both(**PLAIN_CALL)
        finally:
            both.set_progress_bar_config(disable=True)


def test_a_warm_up_shows_no_bar_and_takes_none_from_calls_meanwhile(
    both: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.StringIO()
    admit = both._budget.admit

    def first_another_call(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(both._budget, "admit", admit)
        both(**PLAIN_CALL)
        return admit(*args, **options)

    monkeypatch.setattr(both._budget, "admit", first_another_call)
    both.set_progress_bar_config(disable=False, file=shown, leave=True)
    try:
        both.warmup()
    finally:
        both.set_progress_bar_config(disable=True)
    assert "4/4" in shown.getvalue()
    assert "/5" not in shown.getvalue()


def test_moving_where_it_is_already_keeps_what_is_loaded(pipe: latentrt.Pipeline) -> None:
    pipe(**PLAIN_CALL)
    engine = pipe._parts.base.unet.load()
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.device("cpu")) is pipe
    assert pipe._parts.base.unet.load() is engine


def test_a_pipeline_takes_no_other_dtype(pipe: latentrt.Pipeline) -> None:
    for arguments in (("cpu", torch.float16), (torch.float16,)):
        with pytest.raises(RequestError, match=r"dtype cannot be changed to torch.float.*from_pretrained\("):
            pipe.to(*arguments)
    with pytest.raises(RequestError, match=r"to torch.bfloat16; load it so: from_pretrained\(\.\.\., dtype="):
        pipe.to(dtype=torch.bfloat16)
    assert pipe.to("cpu", torch.float32) is pipe.to(torch.float32) is pipe.to("cpu", "float32") is pipe


def test_to_nowhere_stays(pipe: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU, which a new pipeline would be on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pipe.to() is pipe.to(None) is pipe.to(torch.float32) is pipe
    assert pipe.device == torch.device("cpu")


def test_images_are_found_where_diffusers_outputs_have_them(pipe: latentrt.Pipeline) -> None:
    made = pipe(**PLAIN_CALL, seed=1)
    assert made[0] is made["images"] is made.images
    assert made["timings"] is made.timings
    (images,) = made
    assert images is made.images
    for error, key in ((IndexError, 1), (KeyError, "nsfw_content_detected")):
        with pytest.raises(error):
            made[key]
