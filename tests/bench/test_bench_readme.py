"""README's figures are those of the committed results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from latentrt.bench import readme
from latentrt.bench.results import read_report
from latentrt.errors import BenchmarkError


def test_readme_has_the_figures_of_the_committed_results() -> None:
    text = readme.README.read_text("utf-8")
    assert readme.refreshed(text, read_report(readme.RESULT)) == text


def test_a_new_result_takes_the_old_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("README", "RESULT"):
        here = tmp_path / getattr(readme, name).name
        here.write_bytes(getattr(readme, name).read_bytes())
        monkeypatch.setattr(readme, name, here)
    text = readme.RESULT.read_text().replace('"commit": "', '"commit": "new')
    (tmp_path / "new.json").write_text(text)
    assert readme.main([str(tmp_path / "new.json")]) == 0
    assert readme.RESULT.read_text() == text
    assert "commit new" in readme.README.read_text("utf-8")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="holds no results"):
        readme.main([str(tmp_path / "bad.json")])
    assert readme.RESULT.read_text() == text


def test_a_side_without_a_speed_is_told_with_its_reason() -> None:
    report = read_report(readme.RESULT)
    case = report.cases[0]
    out = replace(case.rows[1], status="failed", reason="not loaded after 200 s", batches=[])
    changed = replace(report, cases=[replace(case, rows=[case.rows[0], out, *case.rows[2:]])])
    assert "failed: not loaded after 200 s | - | - | - |" in readme.section(changed)
    with pytest.raises(BenchmarkError, match="no demo measured beside diffusers"):
        readme.section(replace(report, cases=[]))
    with pytest.raises(BenchmarkError, match="README has no lines"):
        readme.refreshed("# latentrt", report)
