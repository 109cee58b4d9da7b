"""Results: written, read again, shown, and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from latentrt.bench import report as reports
from latentrt.bench.cases import Case
from latentrt.bench.compare import compare
from latentrt.bench.gates import GATES, Quality
from latentrt.bench.plots import bars, lines
from latentrt.bench.results import (
    BatchFigures,
    CaseResult,
    Memory,
    Report,
    Row,
    read_report,
    write_report,
)
from latentrt.bench.stats import growth, ratio, spread
from latentrt.errors import BenchmarkError

Run = Callable[..., tuple[int, str, str]]
MACHINE = {
    "processor": "a",
    "cores": 2,
    "threads": 2,
    "memory_gib": 8,
    "versions": {"torch": "2"},
    "commit": "c",
}


def noisy(median: float, count: int = 15, seed: int = 0) -> list[float]:
    return list(median * np.random.default_rng(seed).normal(1, 0.01, count))


def row(side: str, seconds: list[float], base: list[float], peak: float = 5e8, **fields: Any) -> Row:
    memory = Memory(
        {"resident": peak},
        {"base": {"resident": peak}},
        0.0,
        {"seconds": [0.0, 1.0], "resident": [1e8, peak]},
        [],
    )
    figures = BatchFigures(
        batch=1,
        seconds=seconds,
        latency=spread(seconds),
        speedup=ratio(base, seconds),
        images_per_second=1 / float(np.median(seconds)),
        stages={"text": 0.1, "base": 0.6, "base_step": 0.02, "decode": 0.1},
        psnr=120.0,
        ssim=1.0,
        memory=memory,
        joules_per_image=None,
        busy_elsewhere=[0.0],
        gpu=[],
    )
    whole = Row(
        side, "float32", "as it is", "measured", "", False, 30.0, 10.0, Quality(4, 120.0, 1.0), [figures]
    )
    return replace(whole, **fields)


def report(
    ours: float = 1.0, theirs: float = 2.0, *, machine: dict[str, Any] = MACHINE, seed: int = 0, **fields: Any
) -> Report:
    """diffusers in `theirs` seconds and latentrt in `ours`, with 1 % of noise."""
    base, fast = noisy(theirs, seed=seed), noisy(ours, seed=seed + 1)
    rows = [row("diffusers", base, base), row("latentrt-eager", fast, base, **fields)]
    case = Case("demo", "the <demo>", "demo")
    return Report(
        "latentrt bench", machine, 0, [CaseResult(asdict(case), {"base": 30}, "eager", "diffusers", rows)]
    )


def verdicts(before: Report, after: Report) -> dict[str, str]:
    return {f"{c.side}, {c.what}": c.verdict for c in compare(before, after)}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = report()
    write_report(tmp_path / "new" / "a.json", made)
    read = read_report(tmp_path / "new" / "a.json")
    again = json.loads(json.dumps(asdict(made)))
    assert json.loads(json.dumps(asdict(read))) == again
    assert isinstance(read.cases[0].rows[0].batches[0].latency.median.value, float)
    assert json.loads((tmp_path / "new" / "a.json").read_text())["schema"] == 2


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    write_report(tmp_path / "a.json", report(quality=Quality(1, float("-inf"), -1.0)))
    assert "Infinity" not in (tmp_path / "a.json").read_text()
    assert np.isnan(read_report(tmp_path / "a.json").cases[0].rows[1].quality.psnr)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no results of `latentrt bench`"),
        ('{"schema": 1, "rows": []}', "holds no results of `latentrt bench`"),
        (
            '{"benchmark": "latentrt bench", "schema": 99}',
            "has schema 99 and this version reads 2; measure again",
        ),
        ('{"benchmark": "latentrt bench", "schema": 2}', "is damaged: .*Report lacks command"),
        (
            '{"benchmark": "latentrt bench", "schema": 2, "command": "", "machine": {}, "seed": 0, "cases": 3}',
            "is damaged",
        ),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_report(tmp_path / "x.json")


def test_two_runs_of_the_same_are_the_same() -> None:
    assert set(verdicts(report(), report(seed=10)).values()) == {"same"}


def test_a_slower_side_is_worse_and_a_faster_one_better() -> None:
    assert verdicts(report(1.0), report(1.1))["latentrt-eager, batch 1, speedup"] == "worse"
    assert verdicts(report(1.0), report(0.9))["latentrt-eager, batch 1, speedup"] == "better"


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


def test_more_memory_is_worse() -> None:
    found = verdicts(report(), report(peak=6e8))
    assert found["latentrt-eager, batch 1, resident memory"] == "worse"


def test_a_side_that_is_invalid_now_is_worse() -> None:
    found = verdicts(report(), report(status="invalid", reason="PSNR 12 dB", batches=[]))
    assert found["latentrt-eager, runs"] == "worse"


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
    b.cases[0].case["name"] = "sdxl"
    with pytest.raises(BenchmarkError, match="no case is in both: the first has demo, the second sdxl"):
        compare(a, b)


def test_the_command_ends_with_1_on_a_regression(run: Run) -> None:
    for name, made in (("a", report()), ("same", report(seed=5)), ("slow", report(1.2))):
        write_report(Path(f"{name}.json"), made)
    code, out, err = run("bench", "compare", "a.json", "same.json")
    assert (code, err) == (0, "")
    assert out.count("same") == 12
    code, out, err = run("bench", "compare", "a.json", "slow.json")
    assert code == 1
    assert "worse         demo, latentrt-eager, batch 1, speedup" in out
    assert err == "latentrt: 1 of 12 figures got worse: demo, latentrt-eager, batch 1, speedup\n"
    assert run("bench", "compare", "a.json", "none.json")[0] == 1


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_beside_it() -> None:
    made = report(status="invalid", reason="PSNR <12> dB", batches=[])
    page = reports.html(made, {"demo": {"diffusers": [b"png"], "latentrt-eager": [b"png"]}}, [report()])
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert len(tags.links) == 2
    assert page.count("<svg") == 3
    assert "PSNR &lt;12&gt; dB" in page
    assert "the &lt;demo&gt;" in page
    assert "<code>latentrt bench</code>" in page
    assert "Quickest" not in page  # what is invalid is not
    assert re.search(r"Quickest: latentrt-eager, (1\.9|2\.0)", reports.html(report(), {}))
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", page)


def test_tables_tell_what_was_found_and_what_was_withheld() -> None:
    text = reports.markdown(report())
    lines = [line for line in text.splitlines() if line.startswith(("| side", "| latentrt-eager"))]
    names, values = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[:2])
    cells = dict(zip(names, values, strict=True))
    assert float(cells["seconds"].split()[0]) == pytest.approx(1.0, rel=0.02)
    assert float(cells["against diffusers"].split()[0]) == pytest.approx(2.0, rel=0.02)
    assert (cells["text ms"], cells["base step ms"], cells["VAE ms"]) == ("100.0", "20.0", "100.0")
    assert (cells["build s"], cells["first image s"]) == ("30.0", "10.0")
    assert (cells["PSNR dB"], cells["SSIM"]) == ("120.0", "1.0000")
    assert not {"LPIPS", "FID", "J/image", "refiner step ms"} & cells.keys()  # nobody has them
    assert "the interval of its median (96.5 %)." in text
    assert "| kept |" in reports.markdown(report(built_before=True, build_seconds=None))
    hidden = reports.markdown(report(status="invalid", reason="PSNR 12 dB", batches=[]))
    line = next(line for line in hidden.splitlines() if line.startswith("| latentrt-eager"))
    assert "invalid" in line
    assert " x (" not in line
    assert "- **latentrt-eager** invalid: PSNR 12 dB" in hidden
    assert "Beside it" in reports.markdown(report(), [report()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "demos"), "no case 'demos'; there are demo, demo-base, sdxl"),
        (("--side", "pytorch"), "no side 'pytorch'; there are diffusers, diffusers-compile"),
        (("--side", "diffusers@int8"), "no dtype 'int8'; there are float32, float16, bfloat16"),
        (("--side", "diffusers", "--side", "diffusers"), "a side is named twice"),
        (("--metric", "mse"), "no metric 'mse'; there are psnr, ssim, lpips, clip, fid"),
        (("--metric", "lpips"), "metric 'lpips' of case 'demo' needs AlexNet's weights: --lpips FILE"),
        (("--inception", "empty.txt"), "--inception is for FID, which needs true pictures: give --truth"),
        (("--gate", "mlperf"), "gate 'mlperf' cannot judge without --clip, --inception, --truth"),
        (
            ("--gate", "mlperf", "--clip", "a", "--inception", "b", "--truth", "c"),
            "gate 'mlperf' judges 5000 pictures, and --pictures is 4",
        ),
        (("--steps", "0"), "case demo: 0 steps; at least 1 is needed"),
        (("--high-noise-frac", "1.5"), "case demo: high_noise_frac is 1.5; it can be 0 to 1"),
        (("--guidance", "nan"), "case demo: guidance is nan"),
        (("--patience", "0"), "patience of 0 s; each must be above 0"),
        (("--gate", "none"), "no gate 'none'; there are eager, mlperf"),
        (("--device", "cuda"), "sees no CUDA device"),
        (("--device", "tpu"), "device is 'tpu'; it can be 'cpu', 'cuda'"),
        (("--rounds", "0"), "0 rounds of 4 pictures"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompts; write one a line"),
        (("--beside", "empty.txt"), "empty.txt is not JSON"),
        (("--case", "sdxl"), "sdxl: diffusers needs about 11.5 GiB and 4.0 GiB are free on cpu"),
    ],
)
def test_refusals_are_one_line(
    arguments: tuple[str, ...], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.bench.room._free_memory", lambda device: 4 << 30)
    Path("empty.txt").touch()
    code, _, err = run("bench", *arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_what_there_is_is_listed(run: Run) -> None:
    code, out, _ = run("bench", "list")
    assert code == 0
    for name in ("demo", "sdxl-refiner", "diffusers-max-autotune", "latentrt-onnxruntime", "mlperf", *GATES):
        assert re.search(rf"^    {name} ", out, re.MULTILINE)


def test_statistics() -> None:
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 21)  # of the machine, which meets both sides
    found = ratio(list(2 * drift * rng.normal(1, 0.01, 21)), list(drift * rng.normal(1, 0.01, 21)))
    assert 1.97 < found.low < 2 < found.high < 2.03
    assert spread([1.0]).median.low == spread([1.0]).p99 == 1.0
    whole = spread(list(map(float, range(101))))
    assert (whole.p10, whole.median.value, whole.p90, whole.p99) == (10, 50, 90, 99)
    assert growth([5, 7, 9, 400, 13]) == pytest.approx(2.0)
    assert growth([5]) == 0
    with pytest.raises(ValueError, match="3 rounds beside 2"):
        ratio([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("rounds", "cover"),
    [(3, 0.75), (5, 0.9375), (6, 0.96875), (7, 0.984375), (9, 0.9609375), (15, 0.96484375)],
)
def test_intervals_cover_what_they_say(rounds: int, cover: float) -> None:
    """The true ratio lies in the interval as often as it tells, by simulation of times with a long tail."""
    rng = np.random.default_rng(rounds)
    inside = 0
    for times in rng.lognormal(0, 0.3, (2000, 2, rounds)):
        found = ratio(list(2 * times[0]), list(times[1]))
        inside += found.low <= 2 <= found.high
    assert found.cover == cover
    assert inside / 2000 == pytest.approx(cover, abs=3 * (cover * (1 - cover) / 2000) ** 0.5)


def test_plots_draw_what_they_are_given() -> None:
    svg = ElementTree.fromstring(bars({"a <b>": {"x": 1.0, "y": 3.0}, "c": {"x": 2.0}}, "ms"))
    drawn = [r for r in svg.iter("rect") if r.find("title") is not None]
    widths = [float(r.get("width")) for r in drawn]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(2 * widths[0], rel=0.01)
    assert float(drawn[1].get("x")) == pytest.approx(float(drawn[0].get("x")) + widths[0], abs=0.2)
    assert "4 ms" in [t.text for t in svg.iter("text")]
    svg = ElementTree.fromstring(lines([("a", [1, 2, 4], [0.5, 1.0, 2.0]), ("none", [], [])], "images", "s"))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.01)
    assert slopes[0] < 0  # up is less in SVG
    ElementTree.fromstring(bars({}, "ms"))
    ElementTree.fromstring(lines([], "x", "y"))
