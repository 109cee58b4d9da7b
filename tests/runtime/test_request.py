"""Requests: every form an argument can have becomes one entry per image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from latentrt.errors import RequestError
from latentrt.runtime.request import GenerationRequest

DEFAULTS: dict[str, Any] = {
    "prompt": "a cat",
    "prompt_2": None,
    "image": None,
    "strength": 0.3,
    "height": None,
    "width": None,
    "num_inference_steps": 30,
    "denoising_start": None,
    "denoising_end": None,
    "high_noise_frac": 0.8,
    "guidance_scale": 5.0,
    "guidance_rescale": 0.0,
    "negative_prompt": None,
    "negative_prompt_2": None,
    "num_images_per_prompt": 1,
    "eta": 0.0,
    "seed": 0,
    "generator": None,
    "latents": None,
    "clip_skip": None,
    "original_size": None,
    "crops_coords_top_left": (0, 0),
    "target_size": None,
    "negative_original_size": None,
    "negative_crops_coords_top_left": None,
    "negative_target_size": None,
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
    "output_type": "pil",
    "sampler": None,
    "tiled_vae": False,
}
TWO = ["a cat", "a dog"]


def request(**arguments: Any) -> GenerationRequest:
    return GenerationRequest.create(
        {**DEFAULTS, **arguments}, default_size=(96, 128), latent_scale=8, latent_channels=4
    )


def test_one_prompt() -> None:
    r = request()
    assert (r.prompts, r.prompts_2, r.negatives, r.negatives_2) == (["a cat"], ["a cat"], [None], [None])
    assert (r.height, r.width, r.batch) == (96, 128, 1)
    assert (r.original_sizes, r.crops, r.target_sizes) == ([(96, 128)], [(0, 0)], [(96, 128)])
    assert r.negative_original_sizes is r.negative_crops is r.negative_target_sizes is None


def test_prompts_spread_over_the_batch() -> None:
    r = request(prompt=TWO, prompt_2="x", negative_prompt=["dark", ""], num_images_per_prompt=2)
    assert (r.prompts, r.prompts_2, r.negatives) == (TWO, ["x", "x"], ["dark", ""])
    assert r.negatives_2 == ["dark", ""]
    assert r.batch == 4
    assert r.seeds == [0, 1, 2, 3]


def test_a_second_negative_alone_makes_the_first_empty() -> None:
    r = request(negative_prompt_2="dark")
    assert (r.negatives, r.negatives_2) == ([""], ["dark"])


def test_sizes_for_all_or_for_each_prompt() -> None:
    r = request(
        prompt=TWO,
        num_images_per_prompt=2,
        original_size=[(8, 16), (24, 32)],
        crops_coords_top_left=(1, 2),
        target_size=[[40, 48], [56, 64]],
        negative_original_size=(5, 6),
        negative_crops_coords_top_left=[(7, 8), (9, 10)],
    )
    assert r.original_sizes == [(8, 16), (8, 16), (24, 32), (24, 32)]
    assert r.crops == [(1, 2)] * 4
    assert r.target_sizes == [(40, 48), (40, 48), (56, 64), (56, 64)]
    assert r.negative_original_sizes == [(5, 6)] * 4
    assert r.negative_crops == [(7, 8), (7, 8), (9, 10), (9, 10)]
    assert r.negative_target_sizes is None


@pytest.mark.parametrize("pair", [(64, 48), [64, 48], (np.int64(64), np.int32(48))])
def test_a_pair_of_sizes_for_two_prompts_is_one_pair(pair: Any) -> None:
    """(64, 48) means height and width of both, not one number for each."""
    assert request(prompt=TWO, original_size=pair).original_sizes == [(64, 48)] * 2


def test_numbers_of_numpy_are_numbers() -> None:
    r = request(
        num_inference_steps=np.int64(3),
        guidance_scale=np.float32(2.5),
        seed=np.uint32(7),
        height=np.int16(64),
    )
    assert (r.steps, r.guidance_scales, r.seeds, r.height) == (3, [2.5], [7], 64)
    assert all(type(v) is int for v in (r.steps, r.seeds[0], r.height))
    assert request(guidance_scale=np.float64(3), seed=[np.int64(2)]).seeds == [2]


def test_the_size_comes_from_what_is_given() -> None:
    assert (
        request(latents=torch.zeros(1, 4, 7, 9)).height,
        request(latents=torch.zeros(1, 4, 7, 9)).width,
    ) == (56, 72)
    pixels = request(image=torch.zeros(3, 40, 24))
    assert (pixels.height, pixels.width) == (40, 24)
    assert pixels.original_sizes == [(40, 24)]
    assert request(image=torch.zeros(4, 5, 3), height=40).width == 24


@pytest.mark.parametrize("name", ["latents", "image"])
@pytest.mark.parametrize(
    ("prompts", "wanted"), [(TWO, [0, 0, 1, 1]), (["one"], [0, 1, 0, 1]), (["p"] * 4, [0, 1, 0, 1])]
)
def test_a_picture_for_each_prompt_stays_with_it(prompts: list[str], wanted: list[float], name: str) -> None:
    """diffusers gives the second image of the first prompt the second prompt's picture."""
    rows = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 4, 2, 2)
    r = request(prompt=prompts, num_images_per_prompt=4 // len(prompts), **{name: rows})
    found = r.latents if r.image is None else r.image[r.image_rows]
    assert found[:, 0, 0, 0].tolist() == wanted


def test_what_is_refused_is_quoted_in_short() -> None:
    for wrong in ({"prompt": [3] * 10_000}, {"latents": [torch.zeros(1, 4, 8, 8)]}):
        with pytest.raises(RequestError) as caught:
            request(**wrong)
        assert len(str(caught.value)) < 200


def test_seeds() -> None:
    assert request(prompt=TWO, seed=[9, 3]).seeds == [9, 3]
    assert request(prompt=TWO, seed=range(5, 7)).seeds == [5, 6]
    drawn = request(seed=None).seeds[0]
    assert drawn is not None
    assert 0 <= drawn < 2**32
    assert drawn != request(seed=None).seeds[0]


def test_seeds_of_fresh_generators_are_known() -> None:
    fresh, used = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    torch.randn(1, generator=used)
    r = request(prompt=TWO, seed=None, generator=[fresh, used])
    assert r.seeds == [5, None]
    assert isinstance(r.generators, list)
    assert r.generators[0] is fresh
    shared = request(prompt=TWO, seed=None, generator=fresh)
    assert shared.generators is fresh
    assert shared.seeds == [None, None]


def test_seeded_generators_draw_what_torch_does() -> None:
    (generator,) = request(seed=0).generators
    assert torch.equal(
        torch.randn(8, generator=generator), torch.randn(8, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("bad", [True, 1.0, "3", None, float("nan"), [3], 3j])
@pytest.mark.parametrize("name", ["num_inference_steps", "num_images_per_prompt"])
def test_whole_numbers_only(name: str, bad: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} must be a whole number; got"):
        request(**{name: bad})


@pytest.mark.parametrize("bad", [True, "3", None, float("nan"), float("-inf"), np.float32("nan"), [[3]], 3j])
@pytest.mark.parametrize("name", ["guidance_scale", "eta", "strength", "high_noise_frac", "aesthetic_score"])
def test_finite_numbers_only(name: str, bad: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} must be a finite number; got"):
        request(**{name: bad})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 100}, "height is 100; it must be a multiple of 8, such as 96"),
        ({"width": 20_000}, "width is 20000; it must be 8 to 16384"),
        ({"latents": torch.zeros(4, 8, 8)}, r"latents must be a tensor \[B, C, h, w\]; got \[4, 8, 8\]"),
        ({"latents": "noise"}, r"latents must be a tensor \[B, C, h, w\]; got 'noise'"),
        ({"latents": torch.zeros(1, 4, 8, 0)}, r"latents has the shape \[1, 4, 8, 0\]; no side can be 0"),
        ({"latents": torch.zeros(0, 4, 8, 8)}, "latents has 0 rows for 1 images"),
        (
            {"latents": torch.ones(1, 4, 8, 8) * 1j},
            r"latents is a tensor that cannot be read .*complex64.*x.to_dense\(\).float\(\)",
        ),
        ({"latents": torch.zeros(1, 4, 3000, 8)}, "the image is 64x24000 pixels; sides may be at most 16384"),
        (
            {"image": torch.zeros(1, 4, 8, 8), "height": 72},
            "height is 72, but the image or latents given are 64",
        ),
        ({"denoising_start": 0.8, "latents": torch.zeros(1, 4, 8, 8)}, "pass them as image="),
        (
            {"denoising_start": 0.8, "denoising_end": 0.8, "image": torch.zeros(1, 4, 8, 8)},
            "denoising_start is 0.8 and denoising_end 0.8; the start must come before the end",
        ),
        ({"prompt_2": np.array(["a", "b"])}, "prompt_2 must be a string or a list of strings; got ndarray"),
        (
            {"negative_prompt_2": np.array(["a", "b"])},
            "negative_prompt_2 must be a string or a list of strings",
        ),
        ({"denoising_end": 0.0}, "denoising_end is 0.0, before the first step; give a larger fraction"),
        ({"original_size": 64}, "original_size must be a pair of whole numbers .* got 64"),
        ({"original_size": "ab"}, "original_size must be a pair of whole numbers .* got 'ab'"),
        ({"target_size": (True, 1)}, "target_size must be a whole number; got True"),
        ({"generator": "x", "seed": None}, "generator must be a torch.Generator or a list of them; got 'x'"),
        ({"seed": [1, "2"]}, "seed must be a whole number; got '2'"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be 0 to"),
        ({"prompt": ["a", "\ud800"]}, "prompt is not text"),
        ({"negative_prompt": "\ud800"}, "negative_prompt is not text"),
    ],
)
def test_refusals_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request(**arguments)
