"""Checks what the parts of `make gpu` have written.

`latentrt bench` ends well where anything was measured; a part is for one side. What is left of kernels is reported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError
from .full import Judged
from .kernel_timing import gpu_slug
from .machine import describe_machine
from .results import read_report

__all__ = ["is_left", "of_resumable", "of_side"]


def of_side(out: Path, side: str) -> Judged:
    """Of `latentrt bench`: whether it was through, and the side was measured; of the others what became of them.

    Args:
        out: folder of its report.
        side: that is judged.
    """
    try:
        found = read_report(out / "bench.json")
    except (OSError, BenchmarkError) as error:
        return Judged(False, str(error))
    rows = [row for case in found.cases for row in case.rows]
    good = [row.side for row in rows if row.status == "measured" and row.batches]
    bad = [row for row in rows if row.side not in good and row.status != "reference"]
    why = [f"{row.side} {row.status}: {row.reason}" for row in bad]
    why += [f"skipped: {case.skipped}" for case in found.cases if case.skipped]
    why += [] if found.complete else ["it was interrupted"]
    return Judged(found.complete and side in good, "; ".join(why))


def of_resumable(out: Path, what: str) -> Judged:
    """Of `latentrt kernels --measure` ("kernels") or `--tune` ("tuning"), which go on in another run: what is left.
    Where a kernel is wrong the command itself fails.

    Args:
        out: folder of its results.
    """
    found = _read(out / f"{what}-{gpu_slug(describe_machine())}.json")
    if isinstance(found, Judged):
        return found
    return Judged(True, f"{len(found['left'])} left" if found["left"] else "")


def is_left(out: Path, what: str) -> bool:
    """Whether anything is left of "kernels" (`--measure`) or "tuning" (`--tune`); all is where nothing was written.

    Args:
        out: folder of its results.
    """
    found = _read(out / f"{what}-{gpu_slug(describe_machine())}.json")
    return isinstance(found, Judged) or bool(found["left"])


def _read(path: Path) -> dict[str, Any] | Judged:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return Judged(False, str(error))
    return found
