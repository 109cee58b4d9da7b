"""The instrument on the demo: planted faults in a real pipeline, and measures of quality that mean what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.fake_clock import FakeClock
from latentrt.bench.cases import CASES, SideSpec, sides_named
from latentrt.bench.demo_model.scenes import caption, random_scene, render
from latentrt.bench.features import (
    ClipFeatures,
    DemoFeatures,
    MetricNetworks,
    demo_prompts,
    read_pictures,
    read_truth,
)
from latentrt.bench.gates import GATES, measure_quality
from latentrt.bench.quality import Features, Moments, fid_features, frechet_distance
from latentrt.bench.results import Row
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import Picture
from latentrt.bench.worker import Worker
from latentrt.errors import RequestError
from latentrt.runtime.engines import registry

BASE = replace(CASES["demo-base"], size=(64, 64), steps=4, batches=(1,))
LATENTRT = "latentrt.bench.latentrt_side:open_side"


@pytest.fixture(scope="module")
def features() -> DemoFeatures:
    return DemoFeatures()


def measured(sides: Sequence[SideSpec], folder: Path, rounds: int) -> dict[str, Row]:
    plan = Plan(demo_prompts(4), GATES["eager"], rounds=rounds, pictures=2)
    steps = {"base": BASE.steps}
    run = CaseRun(BASE, sides, plan, steps=steps, device="cpu", folder=folder, open_host=Worker)
    run.measure()
    return {row.side: row for row in run.result().rows}


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_back_end_that_sleeps_20_ms_a_step(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not real:
        FakeClock().install(monkeypatch)
    known = {
        "quick": ("helpers.planted_sides", "QuickBackend"),
        "slow": ("helpers.planted_sides", "SlowBackend"),
    }
    monkeypatch.setattr(registry, "_BACKENDS", known)
    sides = [SideSpec(name, "", LATENTRT, {"backend": name}) for name in known]
    found = measured(sides, tmp_path, rounds=7)
    quick, slow = (found[name].batches[0].stages["base_step"] for name in known)
    assert slow - quick == pytest.approx(0.020, abs=0.005 if real else 1e-4)


def test_a_wrong_sampler_has_no_speed(tmp_path: Path) -> None:
    eager = sides_named(["latentrt-eager"])[0]
    wrong = replace(eager, name="wrong", factory="helpers.planted_sides:open_wrong_sampler")
    found = measured([eager, wrong], tmp_path, rounds=1)
    assert found["wrong"].status == "invalid"
    assert found["wrong"].batches == []
    assert found["wrong"].reason.startswith("PSNR ")
    assert found["latentrt-eager"].status == "measured"
    assert found["latentrt-eager"].batches[0].stages.keys() >= {"text", "base", "base_step", "decode"}


@pytest.mark.full
def test_the_same_run_twice_differs_by_less_than_its_interval(tmp_path: Path) -> None:
    sides = sides_named(["diffusers", "latentrt-eager"])
    first, second = (
        measured(sides, tmp_path / str(k), rounds=9)["latentrt-eager"].batches[0].speedup for k in range(2)
    )
    print(first, second)
    assert abs(first.value - second.value) < max(first.high - first.low, second.high - second.low)


def test_fid_of_true_scenes_to_themselves_is_0_and_rises_with_noise(features: DemoFeatures) -> None:
    def measure(pictures: Sequence[Picture]) -> Features:
        return fid_features(features._tower, pictures)

    rng = random.Random(5)
    scenes = [render(random_scene(rng)) for _ in range(60)]
    noise = np.random.default_rng(0).normal(size=(60, *scenes[0].shape))
    truth = measure(scenes)
    fids = []
    for level in (0, 6, 15, 40, 90):
        noisy = [np.clip(s + level * n, 0, 255).astype(np.uint8) for s, n in zip(scenes, noise, strict=True)]
        fids.append(frechet_distance(truth, measure(noisy)))
    print(fids)
    assert fids[0] == pytest.approx(0, abs=1e-4)  # fewer pictures than features: rounding
    assert all(later > 1.5 * earlier for earlier, later in pairwise(fids[1:]))
    assert fids[1] > 1e-3


def test_clip_score_orders_right_captions_above_wrong_ones(features: DemoFeatures) -> None:
    rng = random.Random(7)
    scenes = [random_scene(rng) for _ in range(40)]
    captions = [caption(rng, scene, say_relation=True) for scene in scenes]
    pictures = [render(scene) for scene in scenes]
    right = features.scores(pictures, captions)
    wrong = features.scores(pictures, captions[1:] + captions[:1])
    print(right.mean(), wrong.mean())
    assert (right > wrong).mean() > 0.9
    assert right.mean() > wrong.mean() + 10


class Colours:
    """Three features of a picture, for FID: its mean red, green and blue."""

    name = "mean colours"

    def features(self, pictures: Sequence[Picture]) -> Features:
        return np.stack([picture.mean((0, 1)) for picture in pictures]).astype(np.float64)


def test_quality_of_pictures_beside_the_references(features: DemoFeatures) -> None:
    rng = random.Random(9)
    scenes = [random_scene(rng) for _ in range(6)]
    captions = [caption(rng, scene) for scene in scenes]
    clean = np.stack([render(scene) for scene in scenes]).astype(np.float32) / 255
    damaged = np.clip(clean + 0.2 * np.random.default_rng(0).standard_normal(clean.shape), 0, 1).astype(
        np.float32
    )
    truth = Moments.of(Colours().features([render(random_scene(rng)) for _ in range(30)]))
    networks = MetricNetworks(clip=features, fid=Colours(), truth=truth)
    same, other = (measure_quality(x, clean, captions, networks) for x in (clean, damaged))
    assert (same.psnr, same.pictures) == (200.0, 6)
    assert same.ssim == pytest.approx(1, abs=1e-9)
    assert same.clip == same.clip_reference
    assert other.fid > 0
    assert same.fid == other.fid_reference != other.fid
    few = measure_quality(clean[:3], clean[:3], captions[:3], networks)
    assert few.fid is None  # three pictures for three features
    assert other.psnr == pytest.approx(14, abs=3)
    assert other.ssim < 0.7
    assert other.clip < same.clip
    assert other.clip_by == "the demo's image tower"


def test_clip_from_a_folder_sees_as_transformers_does(tmp_path: Path) -> None:
    from helpers.tiny_checkpoints import MERGES, save_tokenizer
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids = {"vocab_size": 514 + MERGES, "bos_token_id": 512 + MERGES, "eos_token_id": 513 + MERGES}
    torch.manual_seed(0)
    width = 16
    config = CLIPConfig(
        projection_dim=width,
        text_config={**small, **ids},
        vision_config={**small, "image_size": 32, "patch_size": 8},
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    save_tokenizer(tmp_path / "clip", pad_token="<|endoftext|>")
    pictures = [render(random_scene(random.Random(k)))[:, :96] for k in range(3)]
    for k, picture in enumerate(pictures):
        (tmp_path / "truth").mkdir(exist_ok=True)
        PIL.Image.fromarray(picture).save(tmp_path / "truth" / f"{k}.png")
    clip = ClipFeatures(tmp_path / "clip")
    assert clip.name == "CLIP of another size/8 (clip)"

    size = {"shortest_edge": 32}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    prepared = processor([PIL.Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    prompts = ["a red cat", "two blue dogs", "green"]
    tokens = clip._tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=prepared)
    wanted = 100 * (out.image_embeds * out.text_embeds).sum(-1)
    # They resize bytes and round; PyTorch resizes numbers.
    assert clip.scores(pictures, prompts) == pytest.approx(wanted.numpy(), abs=0.5)
    with pytest.raises(
        RequestError, match=rf"has 3 pictures; FID over the {width} features of .* needs {width + 1}"
    ):
        read_truth(tmp_path / "truth", clip)
    for k in range(3, width + 1):
        PIL.Image.fromarray(render(random_scene(random.Random(k)))[:, :96]).save(
            tmp_path / "truth" / f"{k}.png"
        )
    truth = read_truth(tmp_path / "truth", clip)
    assert np.allclose(truth.mean, clip.features(read_pictures(tmp_path / "truth")).mean(0))
    np.savez(tmp_path / "truth.npz", mu=truth.mean, sigma=truth.covariance)
    again = read_truth(tmp_path / "truth.npz", clip)
    assert np.array_equal(again.mean, truth.mean)
    assert np.array_equal(again.covariance, truth.covariance)
    with pytest.raises(RequestError, match=r"has no config\.json; --clip takes a CLIP model"):
        ClipFeatures(tmp_path / "truth")
    with pytest.raises(RequestError, match="has no PNG or JPEG pictures"):
        read_truth(tmp_path / "clip", clip)
    (tmp_path / "bad.npz").write_text("no")
    with pytest.raises(RequestError, match=r"bad\.npz cannot be read as FID's mu and sigma"):
        read_truth(tmp_path / "bad.npz", clip)
    (tmp_path / "clip" / "model.safetensors").write_text("damaged")
    with pytest.raises(RequestError, match="cannot be read as a CLIP model"):
        ClipFeatures(tmp_path / "clip")
