"""`bench/kernel_candidates.py`: what tuning tries, and which cases decide."""

from __future__ import annotations

import pytest
from helpers.dry_timing import ATTENTION
from latentrt.bench.kernel_candidates import table_uses, tuning_requests
from latentrt.kernels import _geglu_triton, aot
from latentrt.kernels.registry import specs


def test_operators_that_share_a_table_are_tuned_together() -> None:
    uses = table_uses(specs(["group_norm", "group_norm_silu"]), 90)["group_norm"]
    assert {use.spec.name for use in uses} == {"group_norm", "group_norm_silu"}
    assert {(use.spec.name, use.key) for use in uses} == {
        ("group_norm", "16/channels_last"),
        ("group_norm_silu", "16/channels_last"),
        ("group_norm_silu", "16/channels_last-large"),
    }


def test_the_vae_does_not_choose_for_the_unet() -> None:
    """A decode's group norms move six times as much as a forward's, but there is one decode to many forwards."""
    uses = table_uses(specs(["group_norm", "group_norm_silu"]), 90)["group_norm"]
    large = {use.case.name for use in uses if use.key.endswith("-large")}
    assert large == {
        *("VAE 128 x 1024 x 1024", "VAE 256 x 1024 x 1024", "VAE 256 x 512 x 512"),
        *("VAE 512 x 512 x 512", "VAE 512 x 256 x 256"),
    }
    work = dict.fromkeys((False, True), 0)
    for use in uses:
        if use.case.name not in large:
            work[use.case.name.startswith("VAE")] += use.case.calls * use.case.elements
    assert 3 * work[True] < work[False]


def test_levels_of_the_unet_are_tuned_apart() -> None:
    """Of 4,096 tokens and of 1,024, and a text's keys: each chooses its own block sizes."""
    uses = table_uses(specs(["attention"]), 90)["attention"]
    keys = {use.case.name.partition(",")[0]: use.key for use in uses}
    assert keys == {
        "self 4096 x 10 heads": "16/d64-long",
        "self 1024 x 20 heads": "16/d64",
        "cross 4096 x 77": "16/d64-short",
        "cross 1024 x 77": "16/d64-short",
    }


def test_blocks_of_four_warps_are_copied_too() -> None:
    sizes = [
        c for c in ATTENTION.candidates["attention"] if c.get("num_warps") == 4 and "SPECIALIZE" not in c
    ]
    plain, copied = (
        {(c["BLOCK_M"], c["BLOCK_N"]) for c in sizes if c.get("TMA", 0) == tma} for tma in (0, 1)
    )
    assert copied == plain - {(128, 32)} == {(128, 64), (64, 64), (64, 128)}


def test_both_variants_of_a_kernel_are_tried() -> None:
    tried = {
        launch.kernel.name
        for r in tuning_requests(table_uses(specs(["attention", "linear_geglu"]), 90), 90)
        for launch in aot.launches(r)
    }
    assert tried == {
        "_attention",
        "_attention_wide",
        "_attention_tma",
        "_exponentials",
        "_geglu_kernel",
        "_linear_geglu_kernel",
        "_linear_geglu_tma_kernel",
    }


@pytest.mark.parametrize("specializes", [True, False])
def test_warps_are_specialised_only_where_triton_can(
    specializes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Triton 3.7 not in `linear_geglu`: its other candidates need the time."""
    monkeypatch.setattr(_geglu_triton, "specializes_wide_sums", lambda arch: specializes)
    tried = [
        (r.op, launch.constants.get("SPECIALIZE", False))
        for r in tuning_requests(table_uses(specs(["attention", "linear_geglu"]), 90), 90)
        if r.trial and r.trial[1].get("SPECIALIZE")
        for launch in aot.launches(r)
    ]
    assert set(tried) == {("attention", True)} | ({("linear_geglu", True)} if specializes else set())


@pytest.mark.parametrize("arch", [80, 86, 89, 120])
def test_warps_are_specialised_on_no_other_gpu(arch: int) -> None:
    requests = tuning_requests(table_uses(specs(["attention", "linear_geglu"]), arch), arch)
    assert not [r for r in requests if r.trial and r.trial[1].get("SPECIALIZE")]
