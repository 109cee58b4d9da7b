"""`bench/results.py`: what was measured, written and read again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers.planted_reports import report
from latentrt.bench.gates import Quality
from latentrt.bench.machine import RESULTS
from latentrt.bench.results import read_report, write_report
from latentrt.errors import BenchmarkError


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = report()
    write_report(tmp_path / "new" / "a.json", made)
    read = read_report(tmp_path / "new" / "a.json")
    again = json.loads(json.dumps(asdict(made)))
    assert json.loads(json.dumps(asdict(read))) == again
    assert isinstance(read.cases[0].rows[0].batches[0].median.value, float)
    assert json.loads((tmp_path / "new" / "a.json").read_text())["schema"] == 3


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
            "has schema 99 and this version reads 2 and 3; measure again",
        ),
        ('{"benchmark": "latentrt bench", "schema": 3}', "is damaged: .*Report lacks command"),
        (
            '{"benchmark": "latentrt bench", "schema": 3, "command": "", "machine": {}, "seed": 0, "cases": 3}',
            "is damaged",
        ),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_report(tmp_path / "x.json")


def test_published_results_of_schema_2_are_read() -> None:
    """Its other fields are of the same rounds."""
    path = RESULTS / "demo_bench_xeon.json"
    written, read = json.loads(path.read_text()), read_report(path)
    assert written["schema"] == 2
    for case, rows in zip(read.cases, (case["rows"] for case in written["cases"]), strict=True):
        for made, theirs in zip(case.rows, rows, strict=True):
            assert all(case.is_interleaved(made, figures.batch) for figures in made.batches)
            for figures, old in zip(made.batches, theirs["batches"], strict=True):
                assert asdict(figures.median) == pytest.approx(old["latency"]["median"])
                assert figures.memory.growths["resident"] == old["memory"]["growth"]
