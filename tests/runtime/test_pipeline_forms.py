"""`runtime/pipeline.py`: the other ways to call a pipeline, each against what diffusers makes of it: ends of the
schedule, pictures to start from, defaults, batches and generators."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import latentrt
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from helpers.parity import Rig
from helpers.parity_cases import Case
from helpers.tiny_checkpoints import save_beside
from tolerances import PIPELINE_EAGER, PIPELINE_ONNXRUNTIME

SIZE = {"height": 64, "width": 48}
STEPS = {"num_inference_steps": 4, "guidance_scale": 6.0}
TEXT = {"prompt": "a red cat on the hill", "negative_prompt": "blurry"}
SIZES = {"original_size": (96, 80), "crops_coords_top_left": (16, 24), "target_size": (64, 56)}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours, np.float64) - np.asarray(theirs)).max() <= PIPELINE_EAGER


def picture(height: int = 64, width: int = 48) -> PIL.Image.Image:
    noise = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


@pytest.fixture(scope="module")
def base(rig: Rig) -> latentrt.Pipeline:
    return rig.pipeline("sdxl", "eager")


@pytest.fixture(scope="module")
def refiner(rig: Rig) -> latentrt.Pipeline:
    return rig.pipeline("refiner", "eager")


def test_at_a_split_of_one_the_refiner_does_nothing(
    rig: Rig, base: latentrt.Pipeline, refiner: latentrt.Pipeline, both: latentrt.Pipeline
) -> None:
    call = {**TEXT, **SIZE, **STEPS}
    alone = rig.diffusers("sdxl")(**call, generator=seeded(), output_type="np").images
    one_call = both(**call, generator=seeded(), high_noise_frac=1.0, output_type="np")
    assert_same(one_call.images, alone)
    assert "refiner" not in one_call.timings

    latents = base(**call, generator=seeded(), denoising_end=1.0, output_type="latent").images
    refined = refiner(**TEXT, **STEPS, image=latents, denoising_start=1.0, output_type="np").images
    assert_same(refined, alone)


def test_at_a_split_of_zero_the_refiner_does_everything(rig: Rig, both: latentrt.Pipeline) -> None:
    pipe = rig.diffusers("refiner")
    pipe.scheduler.set_timesteps(4)
    noise = torch.randn((1, 4, 8, 6), generator=seeded()) * pipe.scheduler.init_noise_sigma
    # diffusers takes 0 for "not given"; just above it, no step is cut off either.
    theirs = pipe(**TEXT, **STEPS, image=noise, denoising_start=0.001, output_type="np").images
    ours = both(**TEXT, **SIZE, **STEPS, generator=seeded(), high_noise_frac=0.0, output_type="np")
    assert_same(ours.images, theirs)
    assert "base" not in ours.timings


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_either_side_may_get_no_step(steps: int, rig: Rig, both: latentrt.Pipeline) -> None:
    """Few steps at 0.8: the base or the refiner gets none. The negative crop is the default, which the two of
    diffusers' pipelines have differently."""
    call = {**TEXT, **SIZES, "num_inference_steps": steps, "guidance_scale": 6.0}
    latents = rig.diffusers("sdxl")(
        **call, **SIZE, generator=seeded(), denoising_end=0.8, output_type="latent"
    ).images
    theirs = rig.diffusers("refiner")(**call, image=latents, denoising_start=0.8, output_type="np").images
    ours = both(**call, **SIZE, generator=seeded(), high_noise_frac=0.8, output_type="np").images
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", ["sdxl", "ensemble"])
def test_fields_of_the_scheduler_can_be_overridden(
    kind: str, rig: Rig, tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """As few-step models ask for it; a refiner goes on with the base's schedule."""
    fields = {"timestep_spacing": "trailing"}
    call = {**TEXT, "num_inference_steps": 4, "guidance_scale": 6.0}
    pair = kind == "ensemble"
    theirs, pipe = rig.diffusers("sdxl"), rig.diffusers("refiner")
    for one in (theirs, pipe):
        one.scheduler = type(one.scheduler).from_config(one.scheduler.config, **fields)
    expected = theirs(
        **call,
        **SIZE,
        generator=seeded(),
        denoising_end=0.5 if pair else None,
        output_type="latent" if pair else "np",
    ).images
    if pair:
        expected = pipe(**call, image=expected, denoising_start=0.5, output_type="np").images
    refiner = tiny("refiner") if pair else None
    ours = latentrt.Pipeline.from_pretrained(tiny("sdxl"), refiner, backend="eager", scheduler=fields)
    made = ours(**call, **SIZE, generator=seeded(), high_noise_frac=0.5, output_type="np")
    assert_same(made.images, expected)
    assert made.parameters[0]["timestep_spacing"] == "trailing"
    assert "timestep" not in caplog.text


@pytest.mark.parametrize(
    ("steps", "told"),
    [(1, "1, where the model expects 100 %"), (4, "751, where the model expects 24 %"), (5, "")],
)
def test_too_few_steps_of_leading_spacing_are_warned_of(
    steps: int, told: str, base: latentrt.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    base("storm", num_inference_steps=steps, output_type="latent", **SIZE)
    assert told in caplog.text
    assert ('scheduler={"timestep_spacing": "trailing"}' in caplog.text) == bool(told)


def test_denoising_end_without_a_refiner(rig: Rig, base: latentrt.Pipeline) -> None:
    call = {**TEXT, **SIZE, **STEPS, "denoising_end": 0.6, "output_type": "np"}
    assert_same(
        base(**call, generator=seeded()).images, rig.diffusers("sdxl")(**call, generator=seeded()).images
    )


def test_defaults_are_those_of_diffusers(rig: Rig, base: latentrt.Pipeline) -> None:
    call = {"prompt": "storm", "num_inference_steps": 2, "output_type": "np"}
    ours = base(**call, generator=seeded()).images
    assert ours.shape == (1, 128, 128, 3)
    assert_same(ours, rig.diffusers("sdxl")(**call, generator=seeded()).images)


@pytest.mark.parametrize(
    ("kind", "version", "size"),
    [
        ("sd15", "0.8.0.dev0", 64),
        ("sd15", "0.9.0.dev0", 32),
        ("sd15", "0.10.2", 32),
        ("sd15", None, 32),
        ("sdxl", "0.8.0", 32),
    ],
)
def test_old_files_of_sd_1_are_of_512_pixels(
    kind: str, version: str | None, size: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(tiny(kind), folder)
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text("utf-8")) | {"sample_size": 32, "_diffusers_version": version}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}), "utf-8")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert theirs.unet.config.sample_size == size
    ours = latentrt.Pipeline.from_pretrained(folder, backend="eager")
    request, _ = ours.check("storm", planned=False)
    assert (request.height, request.width) == (8 * size, 8 * size)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_defaults_of_stable_diffusion(kind: str, rig: Rig) -> None:
    call = {"prompt": "storm", "num_inference_steps": 2, "output_type": "np"}
    ours = rig.pipeline(kind, "eager")(**call, generator=seeded()).images
    assert_same(ours, rig.diffusers(kind)(**call, generator=seeded()).images)


@pytest.mark.parametrize("kind", ["sdxl", "refiner"])
@pytest.mark.parametrize("strength", [None, 0.55, 1.0])
def test_image_to_image(kind: str, strength: float | None, rig: Rig) -> None:
    """With the default strength, negative crop and aesthetic scores, and a PIL image to be cut to whole latents."""
    parts = rig.diffusers(kind).components
    theirs = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=kind == "refiner")
    theirs.set_progress_bar_config(disable=True)
    call = {**TEXT, **SIZES, "image": picture(67, 50), "num_inference_steps": 6, "output_type": "np"}
    if strength is not None:
        call |= {"strength": strength, "negative_original_size": (40, 48), "negative_target_size": (8, 8)}
    ours = rig.pipeline(kind, "eager")(**call, generator=seeded()).images
    assert_same(ours, theirs(**call, generator=seeded()).images)


@pytest.mark.parametrize("sampler", [None, "euler", "ddim"])
def test_image_to_image_of_stable_diffusion(sampler: str | None, rig: Rig) -> None:
    name = {None: "pndm"}.get(sampler, sampler)
    case = Case("sd15", str(name), "epsilon", 5, 7.5, 1, "a", "eager")
    theirs = StableDiffusionImg2ImgPipeline(
        **rig.diffusers("sd15", case).components, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    call = {**TEXT, "image": picture(), "num_inference_steps": 5, "output_type": "np"}
    ours = rig.pipeline("sd15", "eager")(**call, sampler=sampler, generator=seeded()).images
    assert_same(ours, theirs(**call, generator=seeded()).images)


@pytest.mark.parametrize("generators", [1, 4])
@pytest.mark.parametrize(("prompts", "per_prompt", "pictures"), [(1, 4, 1), (4, 1, 1), (4, 1, 2), (4, 1, 4)])
def test_pictures_for_several_images(
    prompts: int, per_prompt: int, pictures: int, generators: int, rig: Rig, base: latentrt.Pipeline
) -> None:
    """From one generator of all images each picture is drawn once; from generators of their own, for each image."""
    theirs = StableDiffusionXLImg2ImgPipeline(**rig.diffusers("sdxl").components)
    theirs.set_progress_bar_config(disable=True)
    images = torch.rand((pictures, 3, 64, 48), generator=seeded(9))
    call = {"prompt": ["a cat", "a dog", "storm", "hill"][:prompts], "num_images_per_prompt": per_prompt}
    call |= {"image": images, "strength": 0.5, "num_inference_steps": 4, "output_type": "np"}

    def drawn() -> Any:
        return seeded() if generators == 1 else [seeded(k) for k in range(generators)]

    assert_same(base(**call, generator=drawn()).images, theirs(**call, generator=drawn()).images)


def test_image_to_image_through_base_and_refiner(rig: Rig, both: latentrt.Pipeline) -> None:
    base = StableDiffusionXLImg2ImgPipeline(
        **rig.diffusers("sdxl").components, requires_aesthetics_score=False
    )
    base.set_progress_bar_config(disable=True)
    generator = seeded()
    call = {**TEXT, "num_inference_steps": 10, "generator": generator}
    latents = base(**call, image=picture(), strength=0.6, denoising_end=0.8, output_type="latent").images
    theirs = rig.diffusers("refiner")(**call, image=latents, denoising_start=0.8, output_type="np").images
    call["generator"] = seeded()
    ours = both(**call, image=picture(), strength=0.6, high_noise_frac=0.8, output_type="np").images
    assert_same(ours, theirs)


def test_the_refiners_older_use(rig: Rig, base: latentrt.Pipeline, refiner: latentrt.Pipeline) -> None:
    """Finished latents as the image: noise is added to them, at the default strength."""
    call, late = {**TEXT, **SIZE, **STEPS, "output_type": "latent"}, {**TEXT, "num_inference_steps": 10}
    latents = rig.diffusers("sdxl")(**call, generator=seeded()).images[0][None, :]
    theirs = rig.diffusers("refiner")(**late, image=latents, generator=seeded(1), output_type="np").images
    latents = base(**call, generator=seeded()).images[0][None, :]
    ours = refiner(**late, image=latents, generator=seeded(1), output_type="np").images
    assert_same(ours, theirs)


@pytest.mark.parametrize("clip", [True, False])
def test_a_predicted_variance_on_cosine_betas(clip: bool, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As Improved DDPM: a UNet with eight channels out. diffusers guides all eight of them."""
    scheduler = {
        **{"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"},
        **{"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "clip_sample": clip},
    }
    folder = save_beside(tmp_path / "ddpm", tiny("sdxl"), {"out_channels": 8}, scheduler)
    theirs = StableDiffusionXLPipeline.from_pretrained(folder)
    ours = latentrt.Pipeline.from_pretrained(folder, backend="eager")
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    call = {**TEXT, **SIZE, "num_inference_steps": 5, "guidance_scale": 7.5, "output_type": "np"}
    images = ours(**call, generator=seeded()).images
    assert_same(images, theirs(**call, generator=seeded()).images)
    assert images.std() > 0.01


def test_several_pictures_each_with_its_generator(rig: Rig, refiner: latentrt.Pipeline) -> None:
    pictures = [picture(), picture().rotate(180)]
    call = {"num_inference_steps": 5, "strength": 0.5, "output_type": "np"}
    ours = refiner(prompt=["storm", "a dog"], image=pictures, seed=[3, 4], **call).images
    for k, text in enumerate(("storm", "a dog")):
        alone = rig.diffusers("refiner")(
            prompt=text, image=pictures[k], generator=seeded(3 + k), **call
        ).images
        assert_same(ours[k : k + 1], alone)


@pytest.mark.parametrize("sampler", ["euler", "euler-a"])
def test_images_of_a_prompt_lie_next_to_each_other(sampler: str, rig: Rig, base: latentrt.Pipeline) -> None:
    case = Case("sdxl", sampler, "epsilon", 3, 6.0, 1, "a", "eager")
    call = {"prompt": ["storm", "a dog"], "num_images_per_prompt": 2, **SIZE, **STEPS, "output_type": "np"}
    theirs = rig.diffusers("sdxl", case)(**call, generator=[seeded(k) for k in range(4)]).images
    assert_same(base(**call, sampler=sampler, seed=0).images, theirs)
    # One generator for all of them is drawn from for the whole batch at once, as in diffusers.
    theirs = rig.diffusers("sdxl", case)(**call, generator=seeded()).images
    assert_same(base(**call, sampler=sampler, generator=seeded()).images, theirs)


def test_latents_in_place_of_noise(rig: Rig, base: latentrt.Pipeline) -> None:
    noise = torch.randn((1, 4, 8, 6), generator=seeded(1))
    call = {**TEXT, **STEPS, "latents": noise, "output_type": "np"}
    theirs = rig.diffusers("sdxl")(**call, **SIZE).images
    assert_same(base(**call).images, theirs)


def test_an_empty_negative_is_not_an_absent_one(rig: Rig, base: latentrt.Pipeline) -> None:
    images = []
    for negative in (None, ""):
        call = {"prompt": "storm", "negative_prompt": negative, **SIZE, **STEPS, "output_type": "np"}
        images.append(base(**call, generator=seeded()).images)
        assert_same(images[-1], rig.diffusers("sdxl")(**call, generator=seeded()).images)
    assert np.abs(images[0] - images[1]).max() > 100 * PIPELINE_EAGER


@pytest.mark.parametrize("second", ["", "green"])
def test_texts_for_the_second_encoder(second: str, rig: Rig, base: latentrt.Pipeline) -> None:
    """An empty one stands for none, as in diffusers."""
    call = {**TEXT, "prompt_2": second, "negative_prompt_2": second, **SIZE, **STEPS, "output_type": "np"}
    ours = base(**call, generator=seeded()).images
    assert_same(ours, rig.diffusers("sdxl")(**call, generator=seeded()).images)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [(8, 8), (8, 72), (104, 24)])
def test_any_size_of_whole_latents_on_onnxruntime(size: tuple[int, int], rig: Rig) -> None:
    """Down to one latent, where levels of the UNet have nothing left to halve; with five images, and from a picture."""
    call = {
        "prompt": "storm",
        "num_inference_steps": 2,
        "num_images_per_prompt": 5,
        "seed": 1,
        "output_type": "np",
    }
    height, width = size
    images = [
        rig.pipeline("sdxl", backend)(**call, height=height, width=width).images
        for backend in ("eager", "onnxruntime")
    ]
    assert images[0].shape == (5, *size, 3)
    assert np.abs(images[0] - images[1]).max() <= PIPELINE_ONNXRUNTIME
    refined = [
        rig.pipeline("refiner", backend)(**call, image=picture(*size), strength=0.6).images
        for backend in ("eager", "onnxruntime")
    ]
    assert refined[0].shape == (5, *size, 3)
    assert np.abs(refined[0] - refined[1]).max() <= PIPELINE_ONNXRUNTIME
