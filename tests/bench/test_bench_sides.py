"""Every side that runs on a CPU makes the same pictures of the same checkpoint, and tells the same stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latentrt.bench.cases import Case, sides_named
from latentrt.bench.diffusers_side import load_pipelines
from latentrt.bench.gates import GATES, likeness
from latentrt.bench.host import Worker
from latentrt.bench.random_checkpoint import PUBLISHED, write_checkpoint
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import factory

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


@pytest.fixture
def case(tiny: Callable[..., Path]) -> Case:
    model, refiner = (str(tiny(kind)) for kind in ("sdxl", "refiner"))
    return Case("tiny", "random", model, refiner, size=(64, 64), batches=(1, 2), steps=2, high_noise_frac=0.5)


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
        made.append(side(prompts, seeds))
    assert {span.name for span in made[0].spans} == {*stages, "decode"}
    assert likeness(made[0].images, made[1].images)[0] > 100


def test_a_vae_that_float16_would_overflow_stays_in_float32(case: Case) -> None:
    base, refiner = load_pipelines(case, torch.device("cpu"), torch.float16)
    assert base.vae.config.force_upcast
    assert (base.unet.dtype, base.vae.dtype) == (torch.float16, torch.float32)
    assert refiner.vae is base.vae
    latents = torch.zeros((1, base.vae.config.latent_channels, 8, 8), dtype=torch.float16)
    with torch.no_grad():
        assert base.vae.decode(latents, return_dict=False)[0].dtype == torch.float32
    # What the pipelines ask before they move it for a picture.
    assert not (base.vae.dtype == torch.float16 and base.vae.config.force_upcast)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["latentrt-eager", "latentrt-onnxruntime", "onnxruntime", "diffusers-compile"]
)
def test_every_side_makes_the_same_pictures(name: str, case: Case, tmp_path: Path) -> None:
    result = measured(case, ["diffusers", name], tmp_path)
    check(result, {"text", "base", "refiner", "base_step", "refiner_step", "decode"})
    assert result.rows[0].settings in ("eager, SDPA, contiguous", "eager, SDPA, channels_last")


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
