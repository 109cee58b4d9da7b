"""Whether what a part of `make gpu` has written says that it did its work.

`latentrt bench` ends well where anything was measured; a part is for one side. What is left of kernels is told.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError
from .full import Judged
from .kernel_timing import slug
from .kernels import failures
from .machine import describe_machine
from .results import read_report

__all__ = ["is_left", "of_kernels", "of_side", "of_tuning"]


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


def of_kernels(out: Path) -> Judged:
    """Of `latentrt kernels --measure`: each has a time, or its turn is still to come.

    Args:
        out: folder of its results.
    """
    found = _read(out / f"kernels-{slug(describe_machine())}.json")
    if isinstance(found, Judged):
        return found
    wrong = failures(found)
    why = [wrong] if wrong else []
    why += [f"{len(found['left'])} left"] if found["left"] else []
    return Judged(not wrong, "; ".join(why))


def of_tuning(out: Path) -> Judged:
    """Of `latentrt kernels --tune`, which goes on in another run, and which no candidate that is wrong can spoil.

    Args:
        out: folder of its results.
    """
    found = _read(out / f"tuning-{slug(describe_machine())}.json")
    if isinstance(found, Judged):
        return found
    return Judged(True, f"left: {', '.join(found['left'])}" if found["left"] else "")


def is_left(out: Path, what: str) -> bool:
    """Whether anything is left of "kernels" (`--measure`) or "tuning" (`--tune`); all is where nothing was written.

    Args:
        out: folder of its results.
    """
    found = _read(out / f"{what}-{slug(describe_machine())}.json")
    return isinstance(found, Judged) or bool(found["left"])


def _read(path: Path) -> dict[str, Any] | Judged:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        return Judged(False, str(error))
    return found
