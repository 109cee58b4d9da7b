"""Whether a side was measured, by the report that a part of `make gpu` has written; kernels are in
test_kernel_tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.planted_reports import report
from latentrt.bench import verdicts
from latentrt.bench.results import write_report

SIDE = "latentrt-eager"


def written(folder: Path, **fields: Any) -> Path:
    write_report(folder / "bench.json", report(**fields))
    return folder


def test_a_side_that_was_measured_passes(tmp_path: Path) -> None:
    assert verdicts.side_verdict(written(tmp_path), SIDE) == (True, "")


@pytest.mark.parametrize("status", ["failed", "invalid", "skipped"])
def test_one_that_was_not_fails_whatever_was_measured_beside_it(status: str, tmp_path: Path) -> None:
    folder = written(tmp_path, status=status, reason="it broke", batches=[])
    assert verdicts.side_verdict(folder, SIDE) == (False, f"{SIDE} {status}: it broke")
    # The other's is told of, and does not keep this one from having passed.
    assert verdicts.side_verdict(folder, "diffusers") == (True, f"{SIDE} {status}: it broke")


def test_the_reference_side_gets_no_verdict(tmp_path: Path) -> None:
    folder = written(tmp_path, status="reference", reason="only its pictures are taken", batches=[])
    assert verdicts.side_verdict(folder, "diffusers") == (True, "")


def test_one_without_the_batch_that_was_asked_for_fails(tmp_path: Path) -> None:
    assert not verdicts.side_verdict(written(tmp_path, batches=[], reason="no memory"), SIDE).passed
    assert not verdicts.side_verdict(written(tmp_path), "latentrt-triton").passed


def test_an_interrupted_run_and_one_that_left_nothing_fail(tmp_path: Path) -> None:
    write_report(tmp_path / "bench.json", replace(report(), complete=False))
    assert verdicts.side_verdict(tmp_path, SIDE) == (False, "it was interrupted")
    empty = tmp_path / "empty"
    for found in (verdicts.resumable_verdict(empty, "kernels"), verdicts.side_verdict(empty, SIDE)):
        assert not found.passed
        assert "No such file" in found.why
