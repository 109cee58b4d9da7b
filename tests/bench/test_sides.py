"""`bench/side.py` and the sides over it: every side that runs on a CPU makes the same pictures of the same
checkpoint, and reports the same stages."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.planted_sides import planted
from latentrt.bench import onnxruntime_side
from latentrt.bench.cases import Case, sides_named
from latentrt.bench.gates import GATES, likeness
from latentrt.bench.random_checkpoint import PUBLISHED, write_checkpoint
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import factory
from latentrt.bench.worker import Job, Worker

SMALL_UNET = {
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": 1,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
SMALL_VAE = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1}
SMALL_TEXT = {"num_hidden_layers": 2}


def measured(case: Case, names: list[str], folder: Path) -> CaseResult:
    run = CaseRun(
        case,
        sides_named(names),
        Plan(["a cat", "a red dog"], GATES["eager"], rounds=2, pictures=2),
        steps={"base": 1, "refiner": 1},
        device="cpu",
        folder=folder,
        open_host=Worker,
    )
    run.measure()
    return run.result()


def check(result: CaseResult, stages: set[str]) -> None:
    for row in result.rows:
        assert (row.status, row.reason) == ("measured", ""), row.side
        for figures in row.batches:
            assert figures.stages.keys() >= stages, row.side
            assert sum(s for k, s in figures.stages.items() if not k.endswith("_step")) <= max(
                figures.seconds
            )
            assert figures.psnr > 100, row.side
    assert result.reference == "diffusers"


@pytest.mark.parametrize(("share", "stages"), [(1.0, {"text", "base"}), (0.0, {"text", "refiner"})])
def test_diffusers_does_latentrts_work_where_one_expert_takes_all(
    share: float, stages: set[str], case: Case, tmp_path: Path
) -> None:
    """diffusers' own arguments would have the base take all steps at 0, and the refiner some at 1."""
    case = replace(case, high_noise_frac=share)
    prompts, seeds = ["a cat", "a red dog"], [3, 4]
    made = []
    for spec in sides_named(["diffusers", "latentrt-eager"]):
        side = factory(spec)(case, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
        assert side.settings.endswith(", VAE in float32")
        made.append(side(prompts, seeds))
    assert {span.name for span in made[0].spans} == {*stages, "decode"}
    assert likeness(made[0].images, made[1].images)[0] > 100


@pytest.mark.parametrize("name", ["diffusers", "latentrt-eager"])
def test_an_eager_side_is_laid_out_as_it_was_tuned_before(
    name: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the other layout would be quicker this time."""
    later = itertools.count()
    monkeypatch.setattr("latentrt.bench.side.now", lambda device: time.perf_counter() + 1000 * next(later))
    (spec,) = sides_named([name])
    side = factory(spec)(case, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
    before = side.settings
    side.tune("channels_last")
    assert side.settings == f"{before}, channels_last"
    assert side.memory_format == "channels_last"


def test_the_negative_prompt_reaches_every_side(case: Case, tmp_path: Path) -> None:
    case = replace(case, high_noise_frac=1.0, steps=1)
    made = {}
    for negative in (None, "a blurry dog"):
        for spec in sides_named(["diffusers", "latentrt-eager"]):
            asked = replace(case, negative=negative)
            side = factory(spec)(asked, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
            made[spec.name, negative] = side(["a cat"], [3]).images
    assert likeness(made["diffusers", "a blurry dog"], made["latentrt-eager", "a blurry dog"])[0] > 100
    assert likeness(made["diffusers", "a blurry dog"], made["diffusers", None])[0] < 100


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allowed, as far as PyTorch allows it by itself or a user may have."""
    places = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = True
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


@pytest.mark.usefixtures("tf32")
def test_float32_is_no_tf32_in_a_sides_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("planted", "", "none", steps=1)
    half, exact = (
        Worker(Job(case, planted("a").at(dtype), "cpu", tmp_path)) for dtype in ("float16", "float32")
    )
    half.open()
    assert torch.backends.cudnn.allow_tf32
    assert exact.open() == "planted"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    asked = []
    session = SimpleNamespace(get_inputs=list, get_outputs=list)
    monkeypatch.setattr(onnxruntime_side, "open_session", lambda *_, tf32: asked.append(tf32) or session)
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        onnxruntime_side._Exported(tmp_path, torch.device("cpu"))
    assert asked == [False, True]  # plain ONNX Runtime has what diffusers has
    half._device = exact._device = torch.device("cuda")
    assert [side.tune()[0] for side in (half, exact)] == ["planted and tuned", "planted and tuned, no TF32"]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["latentrt-eager", "latentrt-onnxruntime", "onnxruntime", "diffusers-compile"]
)
def test_every_side_makes_the_same_pictures(name: str, case: Case, tmp_path: Path) -> None:
    result = measured(case, ["diffusers", name], tmp_path)
    check(result, {"text", "base", "refiner", "base_step", "refiner_step", "decode"})
    begins = "eager, SDPA, VAE in float32, "
    assert result.rows[0].settings in (f"{begins}contiguous", f"{begins}channels_last")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_random_weights_of_published_anatomy_run_on_both(tmp_path: Path) -> None:
    """As `--model sdxl-random` does, in small."""
    changes = {
        "unet": SMALL_UNET,
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT,
        "text_encoder_2": SMALL_TEXT,
    }
    refiner_unet = {**SMALL_UNET, "block_out_channels": [32, 64, 64, 64], "attention_head_dim": [2, 4, 4, 4]}
    refiner_changes = {**changes, "unet": refiner_unet}
    del refiner_changes["text_encoder"]
    models = [
        write_checkpoint(tmp_path / "base", PUBLISHED / "sdxl_base", changes),
        write_checkpoint(tmp_path / "refiner", PUBLISHED / "sdxl_refiner", refiner_changes),
    ]
    case = Case("random", "random", *map(str, models), size=(64, 64), steps=2, high_noise_frac=0.5)
    check(
        measured(case, ["diffusers", "latentrt-eager"], tmp_path / "work"),
        {"text", "base", "refiner", "decode"},
    )
