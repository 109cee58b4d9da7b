"""`bench/side.py` and the sides over it: every side that runs on a CPU makes the same pictures of the same
checkpoint, and reports the same stages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.planted_sides import planted
from helpers.tf32 import allowing_tf32
from latentrt.bench import onnxruntime_side
from latentrt.bench.cases import Case, sides_named
from latentrt.bench.gates import GATES, likeness
from latentrt.bench.monitor import Span
from latentrt.bench.random_checkpoint import PUBLISHED, write_checkpoint
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import Layout, Side, SideOutput, choose_layout, factory
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


class TwoNetworks(Side):
    """An eager diffusers on an H200, as it might be: its UNet is quicker in channels_last, its VAE is not. The UNet's
    seconds are those of a step."""

    SECONDS: Mapping[str, Mapping[str, float]] = {
        "UNet": {"contiguous": 0.060, "channels_last": 0.055},
        "VAE": {"contiguous": 0.060, "channels_last": 0.100},
    }

    def __init__(self) -> None:
        self.laid_out: list[Layout] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
        unet, vae = (self.SECONDS[network][self.laid_out[-1][network]] for network in ("UNet", "VAE"))
        ends = list(itertools.accumulate([0.0, 0.5, 24 * unet, 6 * unet, vae]))
        names = ("text", "base", "refiner", "decode")
        spans = [Span(name, *ends[k : k + 2]) for k, name in enumerate(names)]
        return SideOutput(np.zeros((1, 8, 8, 3), np.float32), spans)


def test_each_network_has_the_layout_that_is_fastest_for_it() -> None:
    side = TwoNetworks()
    best = {"UNet": "channels_last", "VAE": "contiguous"}
    assert choose_layout(side, side.laid_out.append, torch.device("cpu")) == best
    assert side.laid_out == [
        {"UNet": "contiguous", "VAE": "contiguous"},
        {"UNet": "channels_last", "VAE": "channels_last"},
        best,
    ]


def test_a_slow_side_is_tried_once_in_each_layout() -> None:
    """Its pictures take minutes, and all of a trial is one answer, for which `--patience` waits."""
    calls = []

    class Slow(TwoNetworks):
        SECONDS: Mapping[str, Mapping[str, float]] = {
            network: {name: 10 * s for name, s in of.items()} for network, of in TwoNetworks.SECONDS.items()
        }

        def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
            calls.append(prompts)
            return super().__call__(prompts, seeds)

    side = Slow()
    assert choose_layout(side, side.laid_out.append, torch.device("cpu"))["UNet"] == "channels_last"
    assert len(calls) == 2


def test_what_a_gpu_does_once_for_a_layout_is_not_the_layouts() -> None:
    """cuDNN knows its algorithms for a contiguous UNet since the very first picture, and has yet to try the others."""

    class TriesAlgorithms(TwoNetworks):
        SECONDS: Mapping[str, Mapping[str, float]] = {
            **TwoNetworks.SECONDS,
            "UNet": {"contiguous": 0.060, "channels_last": 0.5},
        }

        def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
            output = super().__call__(prompts, seeds)
            if self.laid_out[-1]["UNet"] == "channels_last":
                self.SECONDS = TwoNetworks.SECONDS
            return output

    side = TriesAlgorithms()
    assert choose_layout(side, side.laid_out.append, torch.device("cuda"))["UNet"] == "channels_last"


@pytest.mark.parametrize("layout", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
@pytest.mark.parametrize("name", ["diffusers", "latentrt-eager"])
def test_an_eager_side_is_laid_out_as_it_was_tuned_before(
    name: str, layout: tuple[str, str], case: Case, tmp_path: Path
) -> None:
    (spec,) = sides_named([name])
    side: Any = factory(spec)(case, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
    before, unet, vae = side.settings, *layout
    side.tune({"UNet": unet, "VAE": vae})
    assert side.settings == f"{before}, UNet {unet}, VAE {vae}"
    assert side.layout == {"UNet": unet, "VAE": vae}
    side(["a cat"], [3])  # which loads latentrt's
    if name == "diffusers":
        modules = [side._base.unet, side._refiner.unet, side._base.vae]
    else:
        networks = [e for e in side._pipe._loader._engines if e.component.name in ("unet", "vae_decoder")]
        modules = [e.load()._module for e in sorted(networks, key=lambda e: e.component.name)]
    formats = []
    for module in modules:
        (weight,) = {w for w in module.parameters() if w.ndim == 4 and w.shape[1:] == (4, 3, 3)}
        formats.append(weight.is_contiguous(memory_format=torch.channels_last))
    assert formats == [name == "channels_last" for name in (unet, unet, vae)]


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


@allowing_tf32()
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
    layouts = "UNet (contiguous|channels_last), VAE (contiguous|channels_last)"
    assert re.fullmatch(f"eager, SDPA, VAE in float32, {layouts}", result.rows[0].settings)


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
