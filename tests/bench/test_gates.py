"""What a picture has to pass, so that its side's speed is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.planted_sides import planted
from latentrt.bench.cases import CASES
from latentrt.bench.features import MetricNetworks
from latentrt.bench.gates import GATES, Quality, likeness
from latentrt.bench.run import Plan
from latentrt.bench.suite import Settings, Suite
from latentrt.errors import RequestError
from latentrt.export import measures


def test_half_precision_may_be_as_far_off_as_eager_pytorch_is() -> None:
    judge = GATES["eager"].judge
    eager = Quality(4, psnr=30.0, ssim=0.9)
    assert judge(Quality(4, 28.0, 0.9), "float16", eager) == []
    assert judge(Quality(4, 26.0, 0.9), "float16", eager) == ["PSNR 26.0 dB, at least 27.0"]
    assert judge(Quality(4, 28.0, 0.9), "float32", eager) != []
    assert judge(Quality(4, float("nan"), 1.0), "float32", None) != []
    nonsense = Quality(4, psnr=float("-inf"), ssim=float("nan"))  # as from an eager run full of NaN
    assert judge(nonsense, "float16", nonsense) != []
    for psnr, passes in ((20.0, True), (19.9, False)):  # below, eager is nonsense too
        overflowing = Quality(4, psnr, 0.5)
        assert (judge(overflowing, "float16", overflowing) == []) is passes


def test_mlperfs_gate_wants_mlperfs_number_of_pictures() -> None:
    judge = GATES["mlperf"].judge
    whole = Quality(
        5000, 20, 0.5, clip=31.7, clip_by="CLIP ViT-B/32 (x)", fid=23.5, fid_by="Inception-v3 (y)"
    )
    assert judge(whole, "float16", None) == []
    assert judge(replace(whole, clip=31.6, fid=24.0), "float16", None) == [
        "CLIP score 31.600, 31.686 to 31.813",
        "FID 24.000, 23.011 to 23.950",
    ]
    assert judge(Quality(8, 20, 0.5), "float16", None) == [
        "cannot be judged: 8 pictures, MLPerf has 5000",
        "cannot be judged: CLIP score was not measured",
        "cannot be judged: FID was not measured",
    ]
    other = replace(whole, clip_by="the demo's image tower", fid_by="CLIP ViT-B/32 (x)")
    assert judge(other, "float16", None) == [
        "cannot be judged: CLIP score is by the demo's image tower, MLPerf's by CLIP ViT-B/32",
        "cannot be judged: FID is by CLIP ViT-B/32 (x), MLPerf's by Inception-v3",
    ]


def test_mlperfs_gate_refuses_what_it_could_not_judge(tmp_path: Path) -> None:
    gate, case = GATES["mlperf"], CASES["sdxl-mlperf"]
    clip, inception = SimpleNamespace(name="CLIP ViT-B/32 (x)"), SimpleNamespace(name="Inception-v3 (y)")
    networks = MetricNetworks(clip=clip, fid=inception)
    assert gate.refusal(case, networks) == ""
    assert gate.refusal(replace(case, steps=30), networks) == "steps is 30, and it judges 20"
    assert gate.refusal(replace(case, negative=None), networks).startswith(
        "negative is None, and it judges 'normal"
    )
    assert gate.refusal(CASES["sdxl"], networks) != ""
    other = replace(networks, clip=SimpleNamespace(name="CLIP ViT-L/14 (z)"))
    assert gate.refusal(case, other) == "clip would be by CLIP ViT-L/14 (z), and it judges CLIP ViT-B/32's"
    plan = Plan(["a"] * 5000, gate, pictures=5000)
    paths = dict.fromkeys(("clip", "inception", "truth"), tmp_path)
    for prompts in ([], ["a"] * 4999):
        settings = Settings(replace(plan, prompts=prompts), torch.device("cpu"), tmp_path, "", **paths)
        with pytest.raises(
            RequestError, match=f"of its own, and there are {len(prompts)} prompts; give them by"
        ):
            Suite([(case, [planted("a")])], settings)
    settings = Settings(plan, torch.device("cpu"), tmp_path, "", metrics=("psnr", "fid"), **paths)
    with pytest.raises(RequestError, match="gate 'mlperf' judges by clip; give --metric for it, or for none"):
        Suite([(case, [planted("a")])], settings)
    assert GATES["eager"].refusal(CASES["demo"], MetricNetworks()) == ""


def test_likeness_is_what_another_measures() -> None:
    """torchmetrics', which pads a picture by its reflection, where here the window stays inside."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    rng = np.random.default_rng(0)
    a = rng.random((2, 48, 40, 3), dtype=np.float32)
    b = np.clip(a + 0.05 * rng.standard_normal(a.shape), 0, 1).astype(np.float32)
    pairs = [tuple(torch.from_numpy(i[k : k + 1]).permute(0, 3, 1, 2) for i in (a, b)) for k in range(2)]
    ratio, similarity = likeness(a, b)
    assert ratio == pytest.approx(
        min(float(peak_signal_noise_ratio(x, y, data_range=1.0)) for x, y in pairs), abs=1e-3
    )
    theirs = [structural_similarity_index_measure(x, y, data_range=1.0) for x, y in pairs]
    assert similarity == pytest.approx(min(float(torch.as_tensor(value)) for value in theirs), abs=0.01)
    assert likeness(a, a) == (measures.MAX_PSNR, 1.0)
    for x, y in ((np.full_like(a, np.nan), a), (a, np.full_like(a, np.nan))):
        assert likeness(x, y) == (float("-inf"), -1.0)
