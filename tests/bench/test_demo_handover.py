"""`bench/demo_model/handover.py`: what the demo's base hands over, and the scene that its picture shows."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from latentrt.bench.demo_model import handover, train_unet
from latentrt.bench.demo_model.handover import (
    Handover,
    Request,
    encode_handovers,
    generate_batch,
    load_handovers,
    request_of,
    scene_shown,
    schedule_of,
)
from latentrt.bench.demo_model.kept import save_vae
from latentrt.bench.demo_model.latents import Encoded
from latentrt.bench.demo_model.loop import Run
from latentrt.bench.demo_model.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Scene,
    held_out,
    random_scene,
    render,
)
from latentrt.bench.demo_model.tokenizer import DEMO
from latentrt.bench.demo_model.train_unet import REFINER_BELOW, refiner_draws
from latentrt.bench.quality import as_input
from latentrt.runtime.pipeline import Pipeline
from scipy import ndimage
from torch import Tensor


def _scenes(count: int) -> list[Scene]:
    rng = random.Random(4)
    return [random_scene(rng, ((128, 128), (160, 96), (96, 160))[k % 3]) for k in range(count)]


def _misplaced(scene: Scene) -> Scene:
    """The same things elsewhere: what was asked for says nothing of where they are."""
    return replace(
        scene, tilt=(0.0, 0.0), things=tuple(replace(t, x=0.0, y=0.0, radius=1.0) for t in scene.things)
    )


def _assert_near(found: Scene | None, scene: Scene, pixels: float) -> None:
    assert found is not None
    assert found.background == scene.background
    assert found.tilt == pytest.approx(scene.tilt, abs=3)
    for a, b in zip(found.things, scene.things, strict=True):
        assert (a.shape, a.colour) == (b.shape, b.colour)
        assert (a.x, a.y, a.radius) == pytest.approx((b.x, b.y, b.radius), abs=pixels)


@pytest.mark.parametrize("scene", _scenes(6), ids=str)
def test_a_drawing_shows_its_scene(scene: Scene) -> None:
    picture = render(scene)
    _assert_near(scene_shown(picture, _misplaced(scene)), scene, 0.15)
    other = next(name for name in BACKGROUNDS if name != scene.background)
    _assert_near(scene_shown(picture, replace(_misplaced(scene), background=other)), scene, 0.15)


def test_a_picture_with_mistakes_shows_what_was_asked_for() -> None:
    """Blurred, rounded at its corners, with a wrong colour in places: the scene is drawn without any of it."""
    for scene in _scenes(6):
        picture = ndimage.gaussian_filter(render(scene).astype(float), (1.2, 1.2, 0))
        thing = scene.things[0]
        rows = slice(round(thing.y) - 4, round(thing.y) + 4)
        part = picture[rows, round(thing.x) - 16 : round(thing.x) - 8]
        inside = np.abs(part - np.array(COLOURS[thing.colour])).max(axis=2) < 60
        part[inside] = COLOURS["green"]
        _assert_near(scene_shown(picture.round().astype(np.uint8), _misplaced(scene)), scene, 1.0)


def test_one_wrong_colour_or_shape_is_drawn_right_and_two_are_another_scene() -> None:
    scene = next(s for s in _scenes(40) if len(s.things) == 2 and s.things[0].shape == "square")
    first, second = scene.things
    shape = replace(first, shape="circle")
    colour = replace(first, colour=next(c for c in COLOURS if c not in (first.colour, second.colour)))
    both = replace(colour, shape=next(s for s in SHAPES if s not in (first.shape, second.shape)))
    for wrong in (shape, colour):
        shown = scene_shown(render(replace(scene, things=(wrong, second))), scene)
        _assert_near(shown, scene, 2.5)
    assert scene_shown(render(replace(scene, things=(both, second))), scene) is None
    assert scene_shown(render(replace(scene, things=(second,))), scene) is None


def test_the_base_is_asked_for_every_kind_of_scene() -> None:
    asked = [request_of(handover.SEED + k) for k in range(200)]
    assert 0.1 < sum(held_out(row.scene) for row in asked) / 200 < 0.5
    assert not any(row.drawn for row in asked if held_out(row.scene))
    assert 0.05 < sum(not row.drawn and not held_out(row.scene) for row in asked) / 200 < 0.3
    assert all(row.aesthetic >= 5.5 if row.drawn else 4 <= row.aesthetic <= 5 for row in asked)
    assert len({row.caption for row in asked}) > 150
    assert {(row.scene.height, row.scene.width) for row in asked} == {(128, 128), (160, 96), (96, 160)}


def test_what_is_held_out_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the base's own picture is the target, where it is right."""
    monkeypatch.setattr(handover, "render", lambda *_: pytest.fail("drawn"))
    vae = AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32)
    rng = random.Random(1)
    torch.manual_seed(0)
    handed = []
    for k in range(4):
        scene = random_scene(rng, want_held_out=True)
        picture = render(scene) if k % 2 == 0 else render(random_scene(rng, want_held_out=True))
        asked = Request(scene, f"number {k}", k, 3.0, drawn=False, aesthetic=4.5)
        handed.append(Handover(asked, torch.randn(4, 16, 16), 0.5, torch.randn(4, 16, 16), picture))
    (table,) = encode_handovers(vae, handed, len(handed))
    assert table.captions == ["number 0", "number 2"]
    assert table.sizes[0].tolist() == [128, 128, 0, 0, 128, 128, 4.5]
    assert table.noise is not None
    for one, latents, noise in zip(handed[::2], table.latents.float(), table.noise.float(), strict=True):
        torch.testing.assert_close(latents, one.latents, atol=2e-3, rtol=0)
        torch.testing.assert_close(noise, one.noisy - one.latents / one.sigma, atol=5e-3, rtol=0)


def test_what_is_kept_is_what_the_base_hands_over() -> None:
    """Latents before step 16 of 20 are those that `denoising_end=0.8` gives, over their sigma."""
    pipe = Pipeline.from_pretrained("demo", backend="eager")
    rows = [replace(request_of(handover.SEED + 5 * k), guidance=2.0 + k) for k in range(2)]
    steps, step = 20, 16
    timestep, sigma = schedule_of(DEMO, steps)[step]
    assert timestep == 199
    handed = list(generate_batch(pipe, rows, steps, step, sigma))
    asked = {
        "prompt": [row.caption for row in rows],
        "seed": [row.seed for row in rows],
        "guidance_scale": [row.guidance for row in rows],
        "num_inference_steps": steps,
    }
    noisy = pipe(denoising_end=0.8, output_type="latent", **asked).images
    latents = pipe(output_type="latent", **asked).images
    pictures = pipe(**asked).images
    for k, one in enumerate(handed):
        torch.testing.assert_close(one.noisy * one.sigma, noisy[k])
        torch.testing.assert_close(one.latents, latents[k])
        assert np.array_equal(one.picture, np.asarray(pictures[k]))


def test_noise_is_what_latents_hold_beside_the_drawing() -> None:
    vae = AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32)
    scenes = [*_scenes(3), *_scenes(3)]
    torch.manual_seed(0)
    handed, noises = [], []
    for k, scene in enumerate(scenes):
        with torch.no_grad():
            clean = vae.encode(as_input([render(scene)])).latent_dist.mode()[0] * vae.config.scaling_factor
        noises.append(torch.randn(clean.shape))
        asked = Request(_misplaced(scene), f"number {k}", k, 3.0, drawn=True, aesthetic=6.0)
        picture = render(scene) if k != 4 else np.full((scene.height, scene.width, 3), 30, np.uint8)
        handed.append(Handover(asked, clean / 0.5 + noises[-1], 0.5, torch.zeros_like(clean), picture))
    tables = encode_handovers(vae, handed, len(handed))
    assert [table.captions for table in tables] == [
        ["number 0", "number 3"],
        ["number 1"],
        ["number 2", "number 5"],
    ]
    for table in tables:
        assert table.noise is not None
        assert (table.sizes[:, :2] == table.sizes[:, 4:6]).all()
        assert (table.sizes[:, 2:4] == 0).all()
        assert (table.sizes[:, 6] == 6).all()
        for caption, noise in zip(table.captions, table.noise, strict=True):
            # The fitted scene is a little beside the true one.
            error = (noise.float() - noises[int(caption.split()[1])]).square().mean().sqrt()
            assert error < 0.1, caption


def test_handovers_are_made_again_for_another_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = AutoencoderKL.from_pretrained(DEMO / "vae", torch_dtype=torch.float32)
    save_vae(vae, tmp_path / "vae_sharp")
    unet = tmp_path / "demo" / "unet" / "diffusion_pytorch_model.safetensors"
    unet.parent.mkdir(parents=True)
    unet.write_bytes(b"a")
    calls: list[range] = []

    def generated(run: Run, seeds: range) -> list[Handover]:
        calls.append(seeds)
        asked = [request_of(seed) for seed in seeds]
        zeros = [torch.zeros(4, row.scene.height // 8, row.scene.width // 8) for row in asked]
        return [
            Handover(row, zero, 1.0, zero, render(row.scene)) for row, zero in zip(asked, zeros, strict=True)
        ]

    monkeypatch.setattr(handover, "generate", generated)
    run = Run(tmp_path, 0, torch.device("cpu"), examples=40)
    first = load_handovers(run)
    assert sum(len(table.captions) for table in first) == len(calls[0]) == 10
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, load_handovers(run), strict=True))
    assert len(calls) == 1
    unet.write_bytes(b"b")
    load_handovers(run)
    assert len(calls) == 2


def test_the_refiner_learns_from_the_noise_handed_over() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(400, 4, 16, 16)
    handed = torch.full_like(x0, 1.0)
    noise, timesteps = refiner_draws(x0, handed, generator)
    share = noise.mean(dim=(1, 2, 3))
    assert share.max() < 1.06
    assert share.min() > 0.65
    assert noise.square().mean(dim=(1, 2, 3)) == pytest.approx(torch.ones(400), abs=0.2)
    assert timesteps.min() >= 0
    assert timesteps.max() == REFINER_BELOW - 1
    drawn, _ = refiner_draws(x0, None, generator)
    assert float(drawn.mean().abs()) < 0.02


class _Words:
    """Text embeddings of ones, and of zeros where there is no caption."""

    widths = (3, 5)
    device = torch.device("cpu")

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        said = torch.tensor([float(bool(words)) for words in captions])
        return said.view(-1, 1, 1).expand(-1, 77, 8), said.view(-1, 1).expand(-1, 2)


def _examples(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, handed: bool
) -> tuple[train_unet.Examples, Tensor]:
    """Examples of one canvas, all handed over or none; and their latents."""
    x0 = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32, 6.0]] * len(x0))
    table = Encoded(x0, ["a star"] * len(x0), sizes, torch.zeros_like(x0) if handed else None)
    monkeypatch.setattr(train_unet, "load", lambda *_: [] if handed else [table])
    monkeypatch.setattr(train_unet, "load_handovers", lambda *_: [table] if handed else [])
    monkeypatch.setattr(train_unet, "HANDED_OVER", float(handed))
    run = Run(folder, 0, torch.device("cpu"), batch=2000)
    return train_unet.Examples(run, "refiner", _Words()), x0.float()


@pytest.mark.parametrize("handed", [True, False])
def test_what_a_refiner_is_trained_on(handed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    examples, x0 = _examples(monkeypatch, tmp_path, handed=handed)
    x, v, timesteps, sequence, pooled, time_ids, *guided = examples.batch(torch.Generator().manual_seed(0))
    alpha_bar = examples.alpha_bar[timesteps].view(-1, 1, 1, 1)
    restored = alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v
    assert float((restored.flatten(1)[:, None] - x0.flatten(1)).abs().amax(-1).amin(-1).max()) < 1e-4
    dropped = pooled[:, 0] == 0
    assert torch.equal(dropped, (sequence == 0).all(dim=(1, 2)))
    assert (time_ids[:, -1] == 6).all()
    if not handed:
        assert not guided
        assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
        return
    assert len(x) == 1000
    assert not dropped.any()
    guidance, no_sequence, no_pooled, negative = guided
    assert float(guidance.min()) == pytest.approx(1, abs=0.05)
    assert float(guidance.max()) == pytest.approx(6, abs=0.05)
    assert not no_sequence.any()
    assert not no_pooled.any()
    assert torch.equal(negative[:, :-1], time_ids[:, :-1])
    assert float(negative[:, -1].min()) == pytest.approx(1, abs=0.05)
    assert float(negative[:, -1].max()) == pytest.approx(7, abs=0.05)


def test_the_loss_is_that_of_the_guided_prediction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a network that answers x plus what its conditioning says."""

    def unet(x: Tensor, timesteps: Tensor, sequence: Tensor, **more: Any) -> tuple[Tensor]:
        words = more["added_cond_kwargs"]
        said = sequence.mean(dim=(1, 2)) + words["text_embeds"][:, 0] + words["time_ids"][:, -1] + timesteps
        return (x + said.view(-1, 1, 1, 1),)

    examples, _ = _examples(monkeypatch, tmp_path, handed=True)
    batch = examples.batch(torch.Generator().manual_seed(0))
    x, v, timesteps, _, _, _, guidance, _, _, negative = batch
    with_caption, without = (timesteps + said for said in (1 + 1 + 6.0, negative[:, -1]))
    guided = x + without.view(-1, 1, 1, 1) + guidance * (with_caption - without).view(-1, 1, 1, 1)
    expected = (guided - v).square().mean()
    assert float(train_unet.v_loss(unet, *batch)) == pytest.approx(float(expected), rel=1e-5)
    plain = (x + with_caption.view(-1, 1, 1, 1) - v).square().mean()
    assert float(train_unet.v_loss(unet, *batch[:6])) == pytest.approx(float(plain), rel=1e-5)
