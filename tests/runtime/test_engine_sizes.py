"""`runtime/engines/sizes.py`: sizes as users write them, as profiles of a component, and found again by a call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from latentrt.errors import BackendError, EngineSizeError, RequestError
from latentrt.runtime.engines.base import Component, TensorSpec
from latentrt.runtime.engines.sizes import Axis, Profile, SizePolicy, profile_index, profiles_for
from latentrt.runtime.loading import load_components
from latentrt.runtime.weights import open_checkpoint
from torch import nn


def component(name: str, *dims: int | str, native: int = 1024) -> Component:
    spec = TensorSpec("x", dims, torch.float16)
    return Component(
        name, nn.Identity, torch.float16, (spec,), (), "", {}, native_size=native, latent_scale=8
    )


UNET = component("unet", "batch", 4, "height", "width")
DECODER = component("vae_decoder", "batch", 4, "height", "width")
ENCODER = component("vae_encoder", "batch", 3, "image_height", "image_width")
TEXT = component("text_encoder", "batch", 77)


def only(component: Component, *sizes: str, batch: str = "1") -> Profile:
    (profile,) = profiles_for(component, SizePolicy.parse(sizes, batch))
    return profile


def test_one_size() -> None:
    profile = only(UNET, "1024x768")
    assert str(profile) == "batch 1..2, height 96, width 128"
    assert profile.shapes(UNET.inputs[0]) == [[1, 4, 96, 128], [2, 4, 96, 128], [2, 4, 96, 128]]


def test_a_range_of_both_sides() -> None:
    profile = only(UNET, "512..1280 step 64", batch="1..4")
    assert str(profile) == "batch 1..8, height 64..160 step 8, width 64..160 step 8"
    assert profile.shapes(UNET.inputs[0]) == [[1, 4, 64, 64], [2, 4, 128, 128], [8, 4, 160, 160]]


def test_each_side_of_its_own_and_no_step() -> None:
    assert str(only(DECODER, "768..1024x1152")) == "batch 1, height 144, width 96..128"
    assert str(only(UNET, " 1024 ")) == "batch 1..2, height 128, width 128"


def test_pixels_stay_pixels() -> None:
    profile = only(ENCODER, "512..1024 step 64", batch="2")
    assert str(profile) == "batch 1..2, image_height 512..1024 step 64, image_width 512..1024 step 64"


def test_batches() -> None:
    """Guidance doubles what the UNet and the text encoders see; the VAE sees one image at a time."""
    assert only(UNET, "64", batch="2..3").axes["batch"] == Axis(2, 4, 6)
    assert only(TEXT, "64", batch="2..3").axes["batch"] == Axis(1, 4, 6)
    assert only(DECODER, "64", batch="2..3").axes["batch"] == Axis(1, 1, 3)


def test_text_encoders_have_one_profile_whatever_the_sizes() -> None:
    policy = SizePolicy.parse(["512", "768x1024", "1024"])
    assert len(profiles_for(TEXT, policy)) == 1
    assert len(profiles_for(UNET, policy)) == 3


@pytest.mark.parametrize(
    ("size", "native", "best"),
    [
        ("512..1280", 1024, 128),
        ("256..512", 1024, 64),
        ("1280..1536", 1024, 160),
        ("512..1280 step 384", 1024, 112),
    ],
    ids=["inside", "below", "above", "between two steps"],
)
def test_tuned_for_the_models_own_size(size: str, native: int, best: int) -> None:
    axis = only(component("unet", "batch", 4, "height", "width", native=native), size).axes["height"]
    assert axis.best == best
    assert best in axis


def test_the_default_is_around_the_models_own_size() -> None:
    (profile,) = profiles_for(UNET, SizePolicy.around(UNET))
    assert str(profile) == "batch 1..8, height 64..160 step 8, width 64..160 step 8"
    demo = component("unet", "batch", 4, "height", "width", native=128)
    (profile,) = profiles_for(demo, SizePolicy.around(demo))
    assert str(profile) == "batch 1..8, height 8..20, width 8..20"


@pytest.mark.parametrize(
    ("native", "sides"),
    [
        (8, "1"),
        (320, "20..50 step 2"),
        (576, "36..88 step 4"),
        (704, "48..108 step 5"),
        (832, "56..128 step 6"),
    ],
)
def test_the_default_has_every_native_size(native: int, sides: str) -> None:
    unet = component("unet", "batch", 4, "height", "width", native=native)
    (profile,) = profiles_for(unet, SizePolicy.around(unet))
    assert str(profile) == f"batch 1..8, height {sides}, width {sides}"
    assert profile.takes({"batch": 2, "height": native // 8, "width": native // 8})


@pytest.mark.parametrize(("unet", "latents"), [(24, 24), (None, 128)], ids=["told", "untold"])
def test_a_vae_s_default_is_that_of_its_unet(
    unet: int | None, latents: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Whatever it was trained at itself: together they make a picture of the default size."""
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "model")
    for name, side in (("unet", unet), ("vae", 16)):
        file = folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": side}))
    found = load_components(open_checkpoint(folder), torch.float32)
    for name in ("unet", "vae_decoder", "vae_encoder"):
        pixels = latents * found[name].latent_scale
        assert found[name].native_size == pixels
    sides = [
        profiles_for(found[name], SizePolicy.around(found[name]))[0].axes["height"]
        for name in ("unet", "vae_decoder")
    ]
    assert sides[0] == sides[1]


def test_profiles_survive_json() -> None:
    profile = only(UNET, "512..1280 step 64")
    assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize("text", ["", "big", "512x", "512..", "512...1024", "512 step", "-8", "1024x1024x3"])
def test_what_cannot_be_read_says_how_to_write_it(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"cannot be read; write such as 1024x1024, 1024 or '512\.\.1280 step 64'"
    ):
        SizePolicy.parse([text])


@pytest.mark.parametrize(
    ("sizes", "batch", "why"),
    [
        ([], "1", "no sizes are given"),
        (["64"], "many", "the batch 'many' cannot be read; write such as 1 or 1..4"),
        (["1024..512"], "1", r"'1024\.\.512' goes from 1024 to 512; write the smaller first"),
        (["64"], "4..1", "goes from 4 to 1"),
        (["0"], "1", "goes from 0 to 0; .* at least 1"),
        (["512..1000 step 64"], "1", "does not reach 1000 from 512 in steps of 64"),
        (["512..1024 step 0"], "1", "has a step of 0; leave it out"),
        (["64"], "9" * 20, "'9{20}' has a number of more than 5 digits"),
        (["64x" + "1" * 5000], "1", "'64x1{77}' has a number of more than 5 digits"),
        (["64..128 step 100000"], "1", "has a number of more than 5 digits"),
    ],
)
def test_what_makes_no_sense_is_refused(sizes: list[str], batch: str, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        SizePolicy.parse(sizes, batch)


@pytest.mark.parametrize("size", ["1020x1024", "512..1028", "512..536 step 12"])
def test_sizes_between_latents_are_refused(size: str) -> None:
    with pytest.raises(
        RequestError, match=r"are no whole number of latents; unet takes multiples of 8 pixels"
    ):
        profiles_for(UNET, SizePolicy.parse([size]))


def test_a_dimension_that_is_no_size() -> None:
    with pytest.raises(BackendError, match="unet has a dimension 'tokens', which no size speaks of"):
        profiles_for(component("unet", "batch", "tokens", 24), SizePolicy.parse(["64"]))


def test_a_call_takes_the_narrowest_profile() -> None:
    profiles = profiles_for(UNET, SizePolicy.parse(["512..1280 step 64", "1024x1024", "512..1024 step 64"]))
    assert profile_index(UNET, profiles, {"batch": 2, "height": 128, "width": 128}) == 1
    assert profile_index(UNET, profiles, {"batch": 2, "height": 64, "width": 128}) == 2
    assert profile_index(UNET, profiles, {"batch": 1, "height": 160, "width": 128}) == 0


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 2, "height": 192, "width": 128},  # too high
        {"batch": 3, "height": 64, "width": 64},  # too many
        {"batch": 2, "height": 65, "width": 64},  # between two steps
    ],
)
def test_a_size_outside_every_profile_lists_them(sizes: dict[str, int]) -> None:
    profiles = profiles_for(UNET, SizePolicy.parse(["512..1280 step 64", "2048x2048"]))
    asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
    with pytest.raises(EngineSizeError) as caught:
        profile_index(UNET, profiles, sizes)
    assert str(caught.value) == (
        f"the engine of unet was built for other sizes than {asked}: it takes batch 1..2, height 64..160 step 8, "
        "width 64..160 step 8; batch 1..2, height 256, width 256 (a latent is 8 pixels); ask for one of these, or "
        "build another with `latentrt build --sizes --batch`"
    )
