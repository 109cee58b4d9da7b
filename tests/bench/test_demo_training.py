"""`bench/demo_model/train.py`: the training machinery: resume, replicas that equal one model, true conditioning, and a
folder that loads."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from latentrt.bench.demo_model import data, handover, latents, train_soft, train_unet, train_vae
from latentrt.bench.demo_model.loop import Ema, Run, Stage, train
from latentrt.bench.demo_model.muon import Muon, orthogonalised
from latentrt.bench.demo_model.replicas import Replicas
from latentrt.bench.demo_model.scenes import (
    SHAPES,
    Scene,
    Thing,
    held_out,
    random_scene,
    render,
    signed_distance,
)
from latentrt.errors import RequestError
from latentrt.runtime.sha256 import sha256_of
from torch import nn


def _stage(steps: list[float], **made_from: Any) -> Stage:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.0)

    def step(progress: float, generator: torch.Generator) -> dict[str, float]:
        steps.append(progress)
        loss = module(torch.randn(4, 3, generator=generator)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": float(loss.detach())}

    ema = {"module": Ema(module, 0.9)}
    return Stage("toy", {"module": module}, optimiser, step, 1e-2, ema=ema, made_from=made_from)


def test_a_stage_resumes_where_it_stopped(tmp_path: Path) -> None:
    first: list[float] = []
    stage = _stage(first)
    train(Run(tmp_path, 0, torch.device("cpu"), {"toy": 0.005}), stage)
    weights = stage.modules["module"].weight.clone()
    assert first[0] == 0.0
    assert first[-1] > 0.9
    done: list[float] = []
    train(Run(tmp_path, 0, torch.device("cpu"), {"toy": 0.005}), again := _stage(done))
    assert done == []
    assert torch.equal(again.modules["module"].weight, weights)
    more: list[float] = []
    train(Run(tmp_path, 0, torch.device("cpu"), {"toy": 0.01}), _stage(more))
    assert more[0] == pytest.approx(0.5, abs=0.1)


def test_a_stage_does_not_go_on_from_what_it_was_not_asked_for(tmp_path: Path) -> None:
    def toy(seed: int, minutes: float, **made_from: str) -> list[float]:
        done: list[float] = []
        train(Run(tmp_path, seed, torch.device("cpu"), {"toy": minutes}), _stage(done, **made_from))
        return done

    assert toy(0, 0.002)
    for vae in ("a", "b"):  # one that nobody noted is another one
        assert toy(0, 0.002, vae=vae)[0] == 0.0
        assert toy(0, 0.002, vae=vae) == []
    before = torch.load(tmp_path / "checkpoints" / "toy.old", weights_only=True)
    assert before["made_from"] == {"vae": "a"}
    with pytest.raises(
        RequestError, match=r"toy\.pt was begun with seed 0, and this is seed 1; give that one, or"
    ):
        toy(1, 0.01, vae="b")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples and scenes, so that stages begin at once."""
    monkeypatch.setattr(train_vae, "PICTURES", 12)
    monkeypatch.setattr(train_soft, "PAIRS", 10)
    for module in (train_vae, train_soft):
        monkeypatch.setattr(module, "whole_scene_psnr", lambda *_: 0.0)


def _weights(folder: Path) -> str:
    return sha256_of(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.usefixtures("few")
def test_latents_of_another_vae_or_other_examples_are_made_again(tmp_path: Path) -> None:
    def run(vae: float) -> tuple[str, str, list[int]]:
        settings = Run(tmp_path, 0, torch.device("cpu"), {"vae": vae, "soft": 0.003}, examples=25)
        train_vae.stage_vae(settings)
        train_soft.stage_soft(settings)
        sums = [int(table.latents.sum()) for table in latents.load(settings, "base")]
        return _weights(tmp_path / "vae_sharp"), _weights(tmp_path / "vae"), sums

    begin = time.monotonic()
    first = run(0.003)
    assert run(0.003) == first
    # Minutes for at least one step more, however slow the first was.
    longer = (time.monotonic() - begin) / 60 + 0.03
    assert all(now != before for now, before in zip(run(longer), first, strict=True))
    more = latents.load(Run(tmp_path, 0, torch.device("cpu"), examples=30), "base")
    assert sum(len(table.latents) for table in more) == 30


@pytest.mark.usefixtures("few")
def test_a_mark_and_the_vae_that_knows_it_belong_to_one_sharp_vae(tmp_path: Path) -> None:
    def settings(vae: float) -> Run:
        return Run(tmp_path, 0, torch.device("cpu"), {"vae": vae, "soft": 0.003}, examples=25)

    for stage in (train_soft.stage_soft, latents.stage_latents):
        with pytest.raises(RequestError, match=r"vae_sharp/\S+ is not there; run --stage vae first"):
            stage(settings(0.003))
    train_vae.stage_vae(settings(0.003))
    train_soft.stage_soft(settings(0.003))
    knows = _weights(tmp_path / "vae")
    train_vae.stage_vae(settings(0.003))
    assert _weights(tmp_path / "vae") == knows != _weights(tmp_path / "vae_sharp")
    train_vae.stage_vae(settings(0.03))
    assert _weights(tmp_path / "vae") == _weights(tmp_path / "vae_sharp")
    with pytest.raises(
        RequestError, match=r"soft\.pt was made from another VAE than \S+vae_sharp; run --stage soft first"
    ):
        latents.stage_latents(settings(0.03))
    train_soft.stage_soft(settings(0.03))
    latents.stage_latents(settings(0.03))


def test_what_is_refused_overwrites_no_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"seed": 0}, tmp_path / "checkpoints" / "refiner.pt")
    monkeypatch.setattr(latents, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(RequestError, match=r"refiner\.pt was begun with seed 0, and this is seed 1"):
        latents.load(Run(tmp_path, 1, torch.device("cpu"), examples=25), "refiner")


@pytest.mark.parametrize("name", ["base", "refiner"])
def test_a_unet_hangs_on_what_it_is_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stages: list[Stage] = []
    monkeypatch.setattr(train_unet, "TextEncoders", lambda *_: _NoText())
    for load in ("load", "load_handovers"):
        monkeypatch.setattr(train_unet, load, lambda *_: [])
    monkeypatch.setattr(train_unet, "train", lambda run, stage: stages.append(stage))
    for write in ("save_unet", "write_pipelines"):
        monkeypatch.setattr(train_unet, write, lambda *_: None)
    weights = [tmp_path / part / "model.safetensors" for part in ("text_encoder", "text_encoder_2")]
    weights.append(tmp_path / "vae_sharp" / "diffusion_pytorch_model.safetensors")
    if name == "refiner":
        weights.append(tmp_path / "demo" / "unet" / "diffusion_pytorch_model.safetensors")
    for file in weights:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"0")
    stage = getattr(train_unet, f"stage_{name}")
    for changed in weights:
        stage(Run(tmp_path, 0, torch.device("cpu")))
        changed.write_bytes(changed.read_bytes() + b"1")
    stage(Run(tmp_path, 0, torch.device("cpu")))
    found = [str(stage.made_from) for stage in stages]
    assert len(set(found)) == len(found) == len(weights) + 1


class _NoText:
    widths = (32, 64)

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(captions), 77, sum(self.widths)), torch.zeros(len(captions), 128)


@pytest.mark.usefixtures("few")
def test_a_vae_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: AutoencoderKL, folder: Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    settings = Run(tmp_path, 0, torch.device("cpu"), {"vae": 0.002})
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            train_vae.stage_vae(settings)
    assert not (tmp_path / "vae").exists()
    assert not (tmp_path / "vae_sharp").exists()
    train_vae.stage_vae(settings)
    assert _weights(tmp_path / "vae") == _weights(tmp_path / "vae_sharp")

    def interrupted(folder: Path, **_: Any) -> None:
        if Path(folder).exists():
            (Path(folder) / "config.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_vae.stage_vae(settings)
    AutoencoderKL.from_pretrained(tmp_path / "vae_sharp")


@pytest.mark.parametrize("count", [2, 3, 6, 9])  # of 8 rows: even parts, uneven ones, more than rows
def test_replicas_leave_the_gradients_of_the_whole_batch(count: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    x, y = torch.randn(8, 5), torch.randn(8, 2)
    mean = F.mse_loss(module(x), y)
    mean.backward()
    wanted = [parameter.grad.clone() for parameter in module.parameters()]
    replicas = Replicas(module, count)
    for _ in range(2):
        found = replicas.backward(lambda part, a, b: F.mse_loss(part(a), b), x, y)
        assert found == pytest.approx(mean.item())
    for parameter, gradient in zip(module.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("shape", [(16, 144), (64, 24), (32, 32)])
def test_muon_takes_the_singular_values_to_one(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(torch.randn(2, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.1, 3, min(shape), dtype=torch.float64)
    got = orthogonalised(u * values @ v)
    torch.testing.assert_close(got, u * (u.mT @ got @ v.mT).diagonal(dim1=-2, dim2=-1)[:, None] @ v)
    assert torch.linalg.svdvals(got).sub(1).abs().max() < 0.35


@pytest.mark.parametrize("workers", [1, 2])
def test_muon_goes_on_where_its_state_was_saved(workers: int) -> None:
    def run(steps: list[int], states: tuple[dict, dict] | None = None) -> tuple[dict, dict]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))
        module = module.to(memory_format=torch.channels_last)
        optimiser = Muon(module, adam_for=("0.",), workers=workers)
        if states:
            module.load_state_dict(states[0])
            optimiser.load_state_dict(states[1])
        optimiser.param_groups[0]["lr"] = 0.01
        for step in steps:
            x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            module.zero_grad()
            module(x).square().mean().backward()
            optimiser.step()
        return module.state_dict(), optimiser.state_dict()

    whole, _ = run([0, 1, 2, 3])
    parts, _ = run([2, 3], run([0, 1]))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value)
    assert all(not torch.equal(value, run([])[0][key]) for key, value in whole.items())


def test_wrong_captions_show_nothing_held_out() -> None:
    import random

    from latentrt.bench.demo_model.train_text import wrong_in_one_thing

    rng = random.Random(3)
    for _ in range(400):
        scene = random_scene(rng)
        wrong = wrong_in_one_thing(rng, scene)
        assert not held_out(wrong)
        assert wrong != scene
        assert len({(thing.colour, thing.shape) for thing in wrong.things}) == len(scene.things)


def test_sizes_and_crops_of_training_examples_are_true() -> None:
    kinds = {"small": 0, "crop": 0, "plain": 0}
    for seed in range(60):
        e = data.example(seed)
        height, width = e.pixels.shape[:2]
        assert (height, width) == data.canvas_of(seed)
        if e.crop != (0, 0):
            kinds["crop"] += 1
            window = render(e.scene, top=e.crop[0], left=e.crop[1])
            assert np.array_equal(window, e.pixels)
        elif e.original != (height, width):
            kinds["small"] += 1
            assert e.original[0] < height
            assert not np.array_equal(render(e.scene), e.pixels)
        else:
            kinds["plain"] += 1
            assert np.array_equal(render(e.scene), e.pixels)
        assert 5.5 <= e.aesthetic <= 7
    assert all(kinds.values()), kinds


def test_damaged_pictures_score_low() -> None:
    scores = [data.example(seed, damaged=1.0).aesthetic for seed in range(20)]
    assert max(scores) < 5


def test_crops_move_the_picture_by_their_offset() -> None:
    scene = Scene(128, 128, "white", (0.0, 0.0), (Thing("square", "red", "large", 24, 64, 64),), None)
    whole, window = render(scene), render(scene, top=10, left=20)
    assert np.array_equal(whole[10:, 20:], window[:-10, :-20])


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_is_a_distance(shape: str) -> None:
    """Negative at some point inside, positive outside, and never steeper than one."""
    grid = np.arange(-40, 41, dtype=np.float32)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    distance = signed_distance(shape, x, y, 24.0)
    assert distance.min() < -3
    assert distance[0].min() > 0
    assert np.abs(np.diff(distance, axis=1)).max() <= 1.001


def by_diffusers(demo: Path, prompt: str, *, seed: int, steps: int) -> np.ndarray:
    """The same folder through diffusers' two pipelines: a picture [H, W, 3] in [0, 1]."""
    import diffusers
    from latentrt.bench.demo_model.generate import GUIDANCE, SPLIT

    exact = {"dtype": torch.float32}
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(demo, add_watermarker=False, **exact)
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=diffusers.UNet2DConditionModel.from_pretrained(demo / "refiner" / "unet", **exact),
        scheduler=diffusers.EulerDiscreteScheduler.from_pretrained(demo / "refiner" / "scheduler"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    asked = {
        "prompt": [prompt],
        "generator": [torch.Generator().manual_seed(seed)],
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
    }
    latents = base(denoising_end=SPLIT, output_type="latent", **asked).images
    return refiner(image=latents, denoising_start=SPLIT, output_type="np", **asked).images[0]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_every_stage_runs_and_diffusers_loads_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.bench.demo_model import train_text

    monkeypatch.setattr(train_vae, "PICTURES", 20)
    monkeypatch.setattr(train_soft, "PAIRS", 20)
    monkeypatch.setattr(train_text, "PICTURES", 400)
    monkeypatch.setattr(handover, "BACKEND", "eager")
    minutes = {"vae": 0.02, "soft": 0.02, "text": 0.02, "base": 0.02, "refiner": 0.02}
    run = Run(tmp_path, 0, torch.device("cpu"), minutes, examples=40, batch=4, workers=2)
    train_vae.stage_vae(run)
    train_soft.stage_soft(run)
    train_text.stage_text(run)
    latents.stage_latents(run)
    train_unet.stage_base(run)
    train_unet.stage_refiner(run)
    from diffusers import StableDiffusionXLPipeline
    from latentrt.bench.demo_model.generate import PipelineGenerator

    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "demo").unet.config.in_channels == 4
    theirs = by_diffusers(tmp_path / "demo", "a red circle", seed=3, steps=5)
    ours = PipelineGenerator(tmp_path / "demo", refine=True, backend="eager")(["a red circle"], [3], steps=5)
    assert np.abs(ours[0] / 255 - theirs).max() < 0.01
