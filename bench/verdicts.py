"""Checks the results that the parts of `make gpu` have written.

Exit statuses do not suffice: `latentrt bench` succeeds if any side was measured, but a part is for one side, and
`latentrt kernels` succeeds when its time is up, with cases left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError
from .full import PartVerdict
from .kernel_timing import gpu_slug
from .machine import describe_machine
from .results import read_report

__all__ = ["is_unfinished", "resumable_verdict", "side_verdict"]


def side_verdict(out: Path, side: str) -> PartVerdict:
    """The verdict on `latentrt bench`: it passes if it was complete and measured a side.

    Reasons why other sides were not measured are reported too.

    Args:
        out: folder of its report.
        side: the side that has to be measured.
    """
    try:
        report = read_report(out / "bench.json")
    except (OSError, BenchmarkError) as error:
        return PartVerdict(False, str(error))
    rows = [row for case in report.cases for row in case.rows]
    measured = [row.side for row in rows if row.status == "measured" and row.batches]
    others = [row for row in rows if row.side not in measured and row.status != "reference"]
    why = [f"{row.side} {row.status}: {row.reason}" for row in others]
    why += [f"skipped: {case.skipped}" for case in report.cases if case.skipped]
    why += [] if report.complete else ["it was interrupted"]
    return PartVerdict(report.complete and side in measured, "; ".join(why))


def resumable_verdict(out: Path, what: str) -> PartVerdict:
    """The verdict on `latentrt kernels --measure` or `--tune`: it passes if it wrote results, even with cases left for
    another run, or with tables of which no candidate runs. If a kernel is wrong, the command itself fails.

    Args:
        out: folder of its results.
        what: "kernels" for `--measure`, "tuning" for `--tune`.
    """
    result = _read(out / f"{what}-{gpu_slug(describe_machine())}.json")
    if isinstance(result, PartVerdict):
        return result
    why = [f"{len(result['left'])} left"] if result["left"] else []
    why += [f"no candidate runs: {table}" for table in result.get("failed", [])]
    return PartVerdict(True, "; ".join(why))


def is_unfinished(out: Path, what: str) -> bool:
    """Whether `latentrt kernels --measure` or `--tune` has cases left, or has not written anything.

    Args:
        out: folder of its results.
        what: "kernels" for `--measure`, "tuning" for `--tune`.
    """
    result = _read(out / f"{what}-{gpu_slug(describe_machine())}.json")
    return isinstance(result, PartVerdict) or bool(result["left"])


def _read(path: Path) -> dict[str, Any] | PartVerdict:
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return PartVerdict(False, str(error))
    return result
