"""README's figures are those of the committed results."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.planted_reports import MACHINE, report, with_figures
from latentrt.bench import readme
from latentrt.bench.machine import RESULTS
from latentrt.bench.profile import Profile
from latentrt.bench.proportions import BENCHMARK, SCHEMA, BlockTimes, estimate
from latentrt.bench.results import read_report, write_report
from latentrt.errors import BenchmarkError

DEMO = RESULTS / "demo_bench_cpu.json"


def table_row(text: str, begins: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {begins} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_readme_has_the_figures_of_the_committed_results() -> None:
    text = readme.README.read_text("utf-8")
    assert readme.refreshed(text, read_report(DEMO), RESULTS) == text


def test_the_committed_demo_is_whole_and_of_a_clean_commit() -> None:
    """Of `make bench` on a CPU: every side, measured beside diffusers, with the same pictures. No speed is required."""
    made = read_report(DEMO)
    assert made.complete
    assert re.fullmatch("[0-9a-f]+", made.machine["commit"])  # a + would be changes that nobody else has
    case = next(case for case in made.cases if case.case["name"] == "demo")
    rows = {row.side: row for row in case.rows}
    assert {"diffusers", "diffusers-compile", "onnxruntime"} <= rows.keys()
    ours = rows["latentrt-onnxruntime"]
    first = case.first(ours)
    assert case.rows[0].side == "diffusers"
    assert first is not None
    assert first.speedup is not None
    assert ours.quality is not None
    assert min(ours.quality.psnr, *(b.psnr for b in ours.batches)) >= 40


def test_a_new_result_takes_the_old_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.RESULTS.mkdir(parents=True)
    demo = readme.RESULTS / DEMO.name
    shutil.copyfile(DEMO, demo)
    begin, end = "<!-- figures: python -m latentrt.bench.readme -->", "<!-- end of figures -->"
    readme.README.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    text = DEMO.read_text().replace('"commit": "', '"commit": "new')
    (tmp_path / "new.json").write_text(text)
    assert readme.main([str(tmp_path / "new.json")]) == 0
    assert demo.read_text() == text
    written = readme.README.read_text("utf-8")
    assert "commit new" in written
    assert "old" not in written
    assert written.startswith(f"before\n{begin}\n")
    assert written.endswith(f" |\n{end}\nafter\n")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="holds no results"):
        readme.main([str(tmp_path / "bad.json")])
    write_report(tmp_path / "gpu.json", report(machine={**MACHINE, "gpu": "H200"}))
    with pytest.raises(BenchmarkError, match="the results are of H200, and the demo's place is a CPU's"):
        readme.main([str(tmp_path / "gpu.json")])
    for again in ([], [str(demo)]):  # that very file
        assert readme.main(again) == 0
        assert demo.read_text() == text
        assert readme.README.read_text("utf-8") == written


def test_speed_has_its_quality_beside_it(tmp_path: Path) -> None:
    made = replace(report(1.0, 2.0, rounds=1, build_seconds=149.9), seconds=560.0)
    text = readme.section(made, tmp_path)
    head, ours = table_row(text, "side"), table_row(text, "`latentrt-eager`")
    found = dict(zip(head, ours, strict=True))
    assert found["against diffusers"].startswith(("1.9", "2.0"))  # of one round, whose interval is a point
    assert table_row(text, "`diffusers`")[head.index("against diffusers")] == "1"
    assert (found["PSNR"], found["built in"], found["peak MiB"]) == ("120 dB", "150 s", "477")
    assert "FID" not in head  # nobody has it
    assert "an interval that covers 0 %" in " ".join(text.split())
    assert "The whole run took 9 minutes." in " ".join(text.split())
    alone = replace(made, cases=[replace(made.cases[0], rows=made.cases[0].rows[:1])])
    assert "`latentrt-eager`" not in readme.section(alone, tmp_path)


def test_rounds_are_those_of_the_side_with_the_fewest(tmp_path: Path) -> None:
    """The first one is timed in each group of sides that fit beside each other."""
    pooled, single = report(rounds=15).cases[0].rows[0], report(rounds=7).cases[0].rows[1]
    made = report()
    made = replace(made, cases=[replace(made.cases[0], rows=[pooled, single])])
    text = " ".join(readme.section(made, tmp_path).split())
    assert "medians of 7 rounds, ratios of each round with an interval that covers 98 %" in text


def test_sides_that_do_not_fit_together_are_not_said_to_take_turns(tmp_path: Path) -> None:
    made = report()
    assert "the sides taking turns on the same noise" in " ".join(readme.section(made, tmp_path).split())
    apart = replace(made.cases[0], groups=[[row.side] for row in made.cases[0].rows])
    text = " ".join(readme.section(replace(made, cases=[apart]), tmp_path).split())
    assert ", sides that fit together taking turns on the same noise" in text
    assert "they ran at another time" in text


def test_a_side_without_a_speed_shows_its_reason(tmp_path: Path) -> None:
    gone = report(status="failed", reason="not loaded after 200 s", batches=[], quality=None)
    text = readme.section(gone, tmp_path)
    assert table_row(text, "`latentrt-eager`")[2:5] == ["failed: not loaded after 200 s", "-", "-"]
    large = with_figures(report(reason="batch 1 needs about 40.0 GiB"), batch=4)
    told = table_row(readme.section(large, tmp_path), "`latentrt-eager`")[2:4]
    assert told == ["measured: batch 1 needs about 40.0 GiB", "-"]
    with pytest.raises(BenchmarkError, match="no demo measured beside diffusers"):
        readme.section(replace(gone, cases=[]), tmp_path)
    with pytest.raises(BenchmarkError, match="README has no lines"):
        readme.refreshed("# latentrt", gone, tmp_path)


def test_where_the_time_goes_is_shown_for_eager_and_latentrt(tmp_path: Path) -> None:
    made = report()
    diffusers, eager = made.cases[0].rows
    profile = Profile(1.2, {"convolutions": 0.4, "between operators": 0.8}, 89120)
    quick = Profile(0.9, {"convolutions": 0.2, "between operators": 0.7}, 33027)
    rows = [
        replace(diffusers, profile=profile),
        replace(eager, profile=profile),
        replace(eager, side="latentrt-onnxruntime", profile=quick),
    ]
    text = readme.section(replace(made, cases=[replace(made.cases[0], rows=rows)]), tmp_path)
    assert table_row(text, "ms") == ["ms", "diffusers", "latentrt-onnxruntime"]
    assert table_row(text, "convolutions") == ["convolutions", "400.0", "200.0"]
    assert table_row(text, "without profilers")[1] == f"{1e3 * diffusers.batches[0].median.value:.1f}"
    assert "Where that comes from." in text


def test_other_results_are_shown_where_there_are_any(tmp_path: Path) -> None:
    results = tmp_path / "bench" / "results"
    before = readme.section(report(), results)
    blocks = [
        BlockTimes(name, calls, 6e10, "contiguous", [2.0], [1.0], [0.5], 0.0)
        for name, calls in (("a", 10), ("b", None))
    ]
    content = {"benchmark": BENCHMARK, "schema": SCHEMA, "machine": MACHINE, "rounds": 1}
    content |= {"blocks": [asdict(m) for m in blocks], "forward": estimate(blocks)}
    results.mkdir(parents=True)
    (results / "sdxl_blocks_cpu.json").write_text(json.dumps(content))
    gpu = report(0.5, 2.0, machine={**MACHINE, "gpu": "H200", "driver": "570"})
    gpu.cases[0].case.update(name="sdxl", summary="SDXL base at 1024x1024, random weights", dtype="float16")
    write_report(results / "gpu-sdxl-1" / "latentrt-triton" / "bench.json", gpu)
    text = readme.section(report(), results)
    write_report(results / "gpu-sdxl-1" / "no-gpu" / "bench.json", report())
    assert readme.section(report(), results) == text
    assert text.startswith(before)
    words = " ".join(text[len(before) :].split())
    assert "SDXL's own blocks at the shapes of 1024x1024, 1 rounds on a, 2 threads, commit c." in words
    assert "by latentrt (4.00 x, 4.00 to 4.00)" in words
    assert (
        "H200, driver 570, PyTorch 2, commit c (`bench/results/gpu-sdxl-1/latentrt-triton/bench.json`): SDXL base at"
        in words
    )
    on_gpu = text[len(before) :]
    shown = dict(zip(table_row(on_gpu, "side"), table_row(on_gpu, "`latentrt-eager`"), strict=True))
    figures = gpu.cases[0].rows[1].batches[0]
    assert shown["seconds"] == f"{figures.median.value:.2f}"
    assert shown["against diffusers"].startswith(f"{figures.speedup.value:.2f} x")
    (results / "sdxl_blocks_cpu.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="holds no blocks of SDXL"):
        readme.section(report(), results)
