"""Two results compared: what is noise, what is a change, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.planted_reports import MACHINE, noisy, report, row, with_figures
from latentrt.bench.compare import TOLERANCE, compare, differences
from latentrt.bench.gates import Quality
from latentrt.bench.results import Report, write_report
from latentrt.cli import build_parser
from latentrt.errors import BenchmarkError, RequestError

Run = Callable[..., tuple[int, str, str]]


def verdicts(before: Report, after: Report) -> dict[str, str]:
    return {f"{c.side}, {c.what}": c.verdict for c in compare(before, after)}


def ours(before: Report, after: Report) -> dict[str, str]:
    """Of latentrt's row."""
    return {c.what: c.verdict for c in compare(before, after) if c.side == "latentrt-eager"}


def test_two_runs_of_the_same_are_the_same() -> None:
    assert set(verdicts(report(), report(seed=10)).values()) == {"same"}


def test_a_slower_side_is_worse_and_a_faster_one_better() -> None:
    assert verdicts(report(1.0), report(1.1))["latentrt-eager, batch 1, speedup"] == "worse"
    assert verdicts(report(1.0), report(0.9))["latentrt-eager, batch 1, speedup"] == "better"


def test_sides_that_were_not_interleaved_may_drift_apart() -> None:
    def apart(made: Report) -> Report:
        return replace(made, cases=[replace(made.cases[0], groups=[["diffusers"], ["latentrt-eager"]])])

    what = "latentrt-eager, batch 1, speedup"
    assert verdicts(apart(report(1.0)), report(1.1))[what] == "same"
    assert verdicts(report(1.0), apart(report(1.4)))[what] == "worse"


def test_a_machine_that_is_slower_altogether_is_no_regression_of_a_side() -> None:
    found = verdicts(report(1.0, 2.0), report(2.0, 4.0, machine={**MACHINE, "processor": "b"}))
    assert found["latentrt-eager, batch 1, speedup"] == "same"
    assert found["diffusers, batch 1, seconds"] == "other machine"


def test_a_change_within_noise_is_none() -> None:
    wide = report(1.0)
    base = noisy(2.0)
    loose = list(1.1 * np.random.default_rng(3).normal(1, 0.2, 15))
    rows = [wide.cases[0].rows[0], row("latentrt-eager", loose, base)]
    found = verdicts(wide, replace(wide, cases=[replace(wide.cases[0], rows=rows)]))
    assert found["latentrt-eager, batch 1, speedup"] == "same"


def test_seconds_of_the_first_side_may_drift() -> None:
    """As they did on one machine; the ratios are what counts."""
    drifted = verdicts(report(1.0, 2.0), report(1.1, 2.2))
    assert drifted["diffusers, batch 1, seconds"] == "same"
    assert drifted["latentrt-eager, batch 1, speedup"] == "same"
    assert verdicts(report(1.0, 2.0), report(1.5, 3.0))["diffusers, batch 1, seconds"] == "worse"


def test_intervals_of_few_rounds_decide_nothing() -> None:
    for rounds, verdict in ((1, "too few rounds"), (5, "too few rounds"), (6, "worse")):
        found = ours(report(rounds=rounds), report(1.5, rounds=rounds))
        assert found["batch 1, speedup"] == verdict
    assert ours(report(rounds=6), report(1.5, rounds=3))["batch 1, speedup"] == "too few rounds"


def test_a_tolerance_is_a_share() -> None:
    assert ours(report(), report(1.1))["batch 1, speedup"] == "worse"
    assert compare(report(), report(1.1), 0.2)[-1].verdict == "same"
    for wrong in (float("nan"), -0.1, float("inf")):
        with pytest.raises(RequestError, match=f"a tolerance of {wrong:g}; give a share such as 0.03"):
            compare(report(), report(), wrong)
    assert build_parser().parse_args(["bench", "compare", "a", "b"]).tolerance == TOLERANCE


def test_memory_is_compared() -> None:
    assert ours(report(), report(peak=6e8))["batch 1, resident memory"] == "worse"
    leaks = with_figures(report(), memory={"growths": {"resident": 32 * 2.0**20}})
    found = [c for c in compare(report(), leaks) if c.verdict != "same"]
    assert [(c.side, c.what, c.before, c.after, c.verdict) for c in found] == [
        ("latentrt-eager", "batch 1, resident memory left by a picture", "0.0 MiB", "32 MiB", "worse")
    ]
    tight, leaky = (
        with_figures(report(), memory={"growths": {"allocated": mib * 2.0**20}}) for mib in (0, 32)
    )
    assert ours(tight, leaky)["batch 1, allocated memory left by a picture"] == "worse"
    assert ours(tight, report())["batch 1, allocated memory left by a picture"] == "not measured"
    other_kind = with_figures(report(), memory={"peaks": {"allocated": 5e8}})
    assert ours(report(), other_kind)["batch 1, resident memory"] == "not measured"
    assert ours(report(), with_figures(report(), memory=None))["batch 1, memory"] == "not measured"


def test_stages_and_energy_are_compared() -> None:
    stages = {"text": 0.1, "base": 0.6, "base_step": 0.02, "decode": 0.1}
    slow = ours(report(), with_figures(report(), stages={**stages, "text": 0.15}))
    assert (slow["batch 1, stage text"], slow["batch 1, stage base"]) == ("worse", "same")
    assert "batch 1, stage base_step" not in slow
    short = with_figures(report(), stages={"text": 0.004})
    assert ours(short, with_figures(report(), stages={"text": 0.008}))["batch 1, stage text"] == "same"
    gone = ours(report(), with_figures(report(), stages={"base": 0.6}))
    assert gone["batch 1, stage decode"] == "not measured"
    # A machine half as fast, and so is everything on it.
    halved = with_figures(
        report(2.0, 4.0, machine={**MACHINE, "processor": "b"}),
        stages={name: 2 * seconds for name, seconds in stages.items()},
    )
    assert ours(report(), halved)["batch 1, stage base"] == "same"
    frugal, greedy = (with_figures(report(), joules_per_image=joules) for joules in (300.0, 400.0))
    assert ours(frugal, greedy)["batch 1, energy of an image"] == "worse"
    assert ours(greedy, frugal)["batch 1, energy of an image"] == "better"
    assert ours(frugal, report())["batch 1, energy of an image"] == "not measured"


def test_versions_and_machines_of_both_runs_are_shown() -> None:
    newer = report(machine={**MACHINE, "driver": "570", "versions": {"torch": "3"}, "commit": "d"})
    told = [(c.side, c.before, c.after) for c in compare(report(), newer) if c.verdict == "changed"]
    assert told == [("driver", "none", "570"), ("commit", "c", "d"), ("torch", "2", "3")]
    assert str(compare(report(), newer)[0]).split() == ["changed", "driver", "none", "->", "570"]
    a, b = report(), replace(newer, seed=7)
    b.cases[0].case["steps"] = 20
    assert differences(a, a.cases[0], b, b.cases[0]) == [
        "steps 30 and 20",
        "driver none and 570",
        "commit c and d",
        "torch 2 and 3",
        "seed 0 and 7",
    ]


@pytest.mark.parametrize(("pictures", "verdict"), [(56, "not measured"), (5000, "worse")])
def test_a_fid_of_too_few_pictures_that_is_no_longer_measured_is_no_regression(
    pictures: int, verdict: str
) -> None:
    """Results of before the least number had one of 50 pictures."""
    before = Quality(pictures, 120.0, 1.0, fid=0.3, fid_by="a")
    found = ours(report(quality=before), report(quality=replace(before, fid=None, fid_by=None)))
    assert found["FID"] == verdict
    assert ours(report(quality=before), report(quality=None))["FID"] == "worse"


def test_quality_of_other_pictures_is_not_compared() -> None:
    good = Quality(500, 120.0, 1.0, fid=23.0, fid_by="a")
    a = report(quality=good)
    fewer = report(quality=replace(good, pictures=50, fid=40.0))
    assert ours(a, fewer)["FID"] == "other pictures"
    assert ours(a, replace(report(quality=good), seed=1))["FID"] == "other pictures"
    prompts = replace(a, cases=[replace(a.cases[0], prompts="0123")])
    assert ours(a, prompts)["PSNR"] == "other pictures"
    assert ours(prompts, prompts)["PSNR"] == "same"


def test_likeness_to_another_reference_is_not_compared() -> None:
    """As where diffusers in float32 is there in one run only."""
    near = Quality(4, 54.0, 0.9999, lpips=0.01, clip=31.7)
    far = Quality(4, 42.0, 0.985, lpips=0.1, clip=30.0)
    a, b = report(quality=near), report(quality=far)
    other = replace(b, cases=[replace(b.cases[0], reference="diffusers@float32")])
    found = ours(a, other)
    assert {found[what] for what in ("PSNR", "SSIM", "LPIPS")} == {"other reference"}
    assert found["CLIP score"] == "worse"
    assert ours(a, b)["PSNR"] == "worse"


def test_sizes_that_a_side_was_through_with_before_it_failed_are_compared() -> None:
    """As where memory runs out at a larger batch."""
    failed = {"status": "failed", "reason": "batch 8: OutOfMemoryError"}
    slow = ours(report(**failed), report(1.5, **failed))
    assert (slow["batch 1, speedup"], "runs" in slow) == ("worse", False)
    assert ours(report(**failed), report(1.5))["batch 1, speedup"] == "worse"
    lost = ours(report(), report(1.5, **failed))
    assert (lost["runs"], lost["batch 1, speedup"]) == ("worse", "worse")
    out = report(status="invalid", reason="PSNR 12 dB", batches=[])
    told = [(c.what, c.before, c.after) for c in compare(report(**failed), out) if c.verdict == "worse"]
    assert told == [("runs", "failed", "invalid: PSNR 12 dB")]
    gone = report()
    gone = replace(gone, cases=[replace(gone.cases[0], rows=gone.cases[0].rows[:1])])
    assert ours(report(**failed), gone) == {"runs": "worse"}
    assert ours(report(**failed, batches=[]), report()) == {}


def test_a_side_that_is_invalid_now_is_worse() -> None:
    found = verdicts(report(), report(status="invalid", reason="PSNR 12 dB", batches=[]))
    assert found["latentrt-eager, runs"] == "worse"


def test_a_reference_has_pictures_to_lose_and_no_speed() -> None:
    """Measured once and a reference later, or the other way round, is no regression; failing is."""

    def of(status: str) -> Report:
        return report() if status == "measured" else report(status=status, reason="so", batches=[])

    for before, after in (("reference", "measured"), ("measured", "reference"), ("reference", "reference")):
        assert "latentrt-eager, runs" not in verdicts(of(before), of(after))
    assert verdicts(of("reference"), of("failed"))["latentrt-eager, runs"] == "worse"


def test_a_case_that_is_not_run_any_more_is_worse() -> None:
    both = report()
    other = replace(both.cases[0], case={**both.cases[0].case, "name": "sdxl"})
    both = replace(both, cases=[*both.cases, other])
    assert verdicts(both, report())["every side, runs"] == "worse"
    skipped = replace(other, rows=[], skipped="too little memory")
    found = [c for c in compare(both, replace(both, cases=[both.cases[0], skipped])) if c.verdict == "worse"]
    assert [(c.case, c.what, c.after) for c in found] == [("sdxl", "runs", "skipped: too little memory")]
    assert "worse" not in verdicts(report(), both).values()  # more than before is no loss


@pytest.mark.parametrize(
    ("before", "after", "what", "verdict"),
    [
        ({"psnr": 50.0}, {"psnr": 40.0}, "PSNR", "worse"),
        ({"psnr": 130.0}, {"psnr": 90.0}, "PSNR", "same"),  # both the same in bytes
        ({"psnr": 30.0}, {"psnr": 40.0}, "PSNR", "better"),
        ({"psnr": 120.0}, {"psnr": float("nan")}, "PSNR", "worse"),
        ({"ssim": 0.99}, {"ssim": 0.9}, "SSIM", "worse"),
        ({"lpips": 0.01}, {"lpips": 0.2}, "LPIPS", "worse"),
        ({"clip": 31.7, "clip_by": "a"}, {"clip": 31.0, "clip_by": "a"}, "CLIP score", "worse"),
        ({"clip": 31.7, "clip_by": "a"}, {"clip": 31.0, "clip_by": "b"}, "CLIP score", "other judge"),
        ({"clip": 31.7, "clip_by": "a"}, {}, "CLIP score", "worse"),
        ({"fid": 23.0}, {"fid": 20.0}, "FID", "better"),
        ({"fid": 23.0}, {"fid": 23.3}, "FID", "same"),
        ({"fid": 0.19}, {"fid": 0.30}, "FID", "worse"),  # the demo's world is small
    ],
)
def test_quality_is_compared(before: dict[str, Any], after: dict[str, Any], what: str, verdict: str) -> None:
    good = Quality(4, 120.0, 1.0)
    found = verdicts(report(quality=replace(good, **before)), report(quality=replace(good, **after)))
    assert found[f"latentrt-eager, {what}"] == verdict


def test_building_and_the_first_picture_are_compared_on_one_machine() -> None:
    slower = report(build_seconds=60.0, first_image_seconds=14.0)
    assert verdicts(report(), slower)["latentrt-eager, build"] == "worse"
    assert verdicts(report(), slower)["latentrt-eager, first image"] == "worse"
    assert verdicts(slower, report())["latentrt-eager, build"] == "better"
    assert verdicts(report(), report(build_seconds=36.0))["latentrt-eager, build"] == "same"
    kept = report(built_before=True, build_seconds=None)
    assert "latentrt-eager, build" not in verdicts(report(), kept)
    elsewhere = replace(slower, machine={**MACHINE, "device": "cuda"})
    assert verdicts(report(), elsewhere)["latentrt-eager, build"] == "other machine"


def test_other_settings_are_not_compared() -> None:
    a, b = report(), report()
    b.cases[0].case["steps"] = 20
    with pytest.raises(BenchmarkError, match="case demo was measured with other settings: steps 30 and 20"):
        compare(a, b)
    b.cases[0].case.update(steps=30, summary="in other words", batches=(1, 2))
    assert set(verdicts(a, b).values()) == {"same"}
    b.cases[0].case["name"] = "sdxl"
    with pytest.raises(BenchmarkError, match="no case is in both: the first has demo, the second sdxl"):
        compare(a, b)


def test_the_command_ends_with_1_on_a_regression(run_cli: Run) -> None:
    for name, made in (("a", report()), ("same", report(seed=5)), ("slow", report(1.2))):
        write_report(Path(f"{name}.json"), made)
    code, out, err = run_cli("bench", "compare", "a.json", "same.json")
    assert (code, err) == (0, "")
    assert out.count("same") == 20
    code, out, err = run_cli("bench", "compare", "a.json", "slow.json")
    assert code == 1
    assert "worse           demo, latentrt-eager, batch 1, speedup" in out
    assert err == "latentrt: 1 of 20 figures got worse: demo, latentrt-eager, batch 1, speedup\n"
    assert run_cli("bench", "compare", "a.json", "none.json")[0] == 1
