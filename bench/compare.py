"""What changed between two results, beyond noise.

Two runs are hours or machines apart, so a side's speed is compared as its ratio to the first side of its own run
where there is one; seconds only where both runs are of one machine. A change counts where the intervals do not touch
and it is larger than a tolerance. Building and the first picture are timed once, so that they have wide tolerances;
quality is of the same prompts and seeds. What is measured in the first and missing in the second is worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ..errors import BenchmarkError
from .results import BatchFigures, CaseResult, Report, Row
from .stats import Interval

__all__ = ["TOLERANCE", "Change", "compare"]

TOLERANCE = 0.03
"""Of a speed: what one machine's runs differ by, from clocks and memory layout, outside of their own intervals."""
_MEMORY_TOLERANCE = 0.05
_MEMORY_LEAST = 16 << 20
_SAME_MACHINE = ("processor", "cores", "threads", "device", "gpu")
_ONCE = {"build_seconds": ("build", 0.3, 5.0), "first_image_seconds": ("first image", 0.3, 2.0)}
"""What is timed once: (what, tolerance, least seconds that count)."""
_QUALITY = {
    "psnr": ("PSNR", True, 3.0, 60.0),  # 3 dB is twice the squared error; from 60 dB on bytes are equal
    "ssim": ("SSIM", True, 0.01, 1.0),
    "lpips": ("LPIPS", False, 0.01, 0.0),
    "clip": ("CLIP score", True, 0.3, 100.0),
    "fid": ("FID", False, 0.5, 0.0),
}
"""What is of the pictures: (what, more is better, what counts, where it is as good as it gets)."""


@dataclass(frozen=True)
class Change:
    """One figure in both runs.

    Attributes:
        verdict: `better`, `worse`, `same`, or `other machine` or `other judge` where they cannot be compared.
    """

    case: str
    side: str
    what: str
    before: str
    after: str
    verdict: str

    def __str__(self) -> str:
        place = f"{self.case}, {self.side}, {self.what}"
        return f"{self.verdict:<14}{place:<60}{self.before:>24} -> {self.after}"


def compare(before: Report, after: Report, tolerance: float = TOLERANCE) -> list[Change]:
    """Every figure of the first that can be compared, in its order.

    Raises:
        BenchmarkError: no case is in both, or one was measured with other settings.
    """
    theirs = {case.case["name"]: case for case in after.cases}
    if not any(case.case["name"] in theirs for case in before.cases):
        names = [
            ", ".join(case.case["name"] for case in report.cases) or "none" for report in (before, after)
        ]
        raise BenchmarkError(f"no case is in both: the first has {names[0]}, the second {names[1]}")
    same_machine = all(before.machine.get(key) == after.machine.get(key) for key in _SAME_MACHINE)
    return [
        change
        for case in before.cases
        for change in _case(case, theirs.get(case.case["name"]), same_machine, tolerance)
    ]


def _case(a: CaseResult, b: CaseResult | None, same_machine: bool, tolerance: float) -> Iterator[Change]:
    name = a.case["name"]
    if b is None or b.skipped:
        if not a.skipped:
            state = "not run" if b is None else f"skipped: {b.skipped}"
            yield Change(name, "every side", "runs", "measured", state, "worse")
        return
    other = {k: (v, b.case.get(k)) for k, v in a.case.items() if b.case.get(k) != v}
    if other:
        told = ", ".join(f"{key} {x!r} and {y!r}" for key, (x, y) in other.items())
        raise BenchmarkError(f"case {name} was measured with other settings: {told}")
    rows = {row.side: row for row in b.rows}
    for row in a.rows:
        if row.status != "measured":
            continue
        now = rows.get(row.side)
        if now is None or now.status != "measured":
            state = "not run" if now is None else f"{now.status}: {now.reason}"
            yield Change(name, row.side, "runs", "measured", state, "worse")
            continue
        paired = row.side not in (a.rows[0].side, b.rows[0].side) and a.rows[0].side == b.rows[0].side
        yield from _row(name, row, now, paired, same_machine, tolerance)


def _row(case: str, a: Row, b: Row, paired: bool, same_machine: bool, tolerance: float) -> Iterator[Change]:
    yield from _quality(case, a, b)
    for field, (what, share, least) in _ONCE.items():
        before, after = getattr(a, field), getattr(b, field)
        if before is None or after is None:
            continue  # nothing to build, or it was there
        change = after - before
        verdict = "other machine"
        if same_machine:
            verdict = (
                "same" if abs(change) <= max(share * before, least) else "worse" if change > 0 else "better"
            )
        yield Change(case, a.side, what, f"{before:.1f} s", f"{after:.1f} s", verdict)
    found: Mapping[int, BatchFigures] = {figures.batch: figures for figures in b.batches}
    for x in a.batches:
        y = found.get(x.batch)
        what = f"batch {x.batch}"
        if y is None:
            yield Change(case, a.side, what, "measured", "not run", "worse")
            continue
        if paired and x.speedup is not None and y.speedup is not None:
            verdict = _verdict(x.speedup, y.speedup, tolerance, more_is_better=True)
            yield Change(case, a.side, f"{what}, speedup", _told(x.speedup), _told(y.speedup), verdict)
        else:
            before, after = x.latency.median, y.latency.median
            verdict = (
                _verdict(before, after, tolerance, more_is_better=False) if same_machine else "other machine"
            )
            yield Change(case, a.side, f"{what}, seconds", _told(before), _told(after), verdict)
        if x.memory is not None and y.memory is not None:
            yield from _memory(case, a.side, what, x.memory.peaks, y.memory.peaks)


def _quality(case: str, a: Row, b: Row) -> Iterator[Change]:
    for field, (what, more_is_better, least, best) in _QUALITY.items():
        before, after = (getattr(row.quality, field, None) for row in (a, b))
        if before is None or not isfinite(before):
            continue
        if after is None:
            yield Change(case, a.side, what, f"{before:.4g}", "not measured", "worse")
            continue
        by = [getattr(row.quality, f"{field}_by", None) for row in (a, b)]
        if by[0] != by[1]:
            yield Change(case, a.side, what, f"{before:.4g}", f"{after:.4g} by {by[1]}", "other judge")
            continue
        limit = min if more_is_better else max
        change = limit(after, best) - limit(before, best)
        better = (change > 0) == more_is_better
        verdict = "same" if abs(change) < least else "better" if better else "worse"
        if not isfinite(after):
            verdict = "worse"
        yield Change(case, a.side, what, f"{before:.4g}", f"{after:.4g}", verdict)


def _memory(
    case: str, side: str, what: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[Change]:
    for kind in before:
        if kind not in after:
            continue
        limit = max(_MEMORY_TOLERANCE * before[kind], _MEMORY_LEAST)
        more = after[kind] - before[kind]
        verdict = "worse" if more > limit else "better" if -more > limit else "same"
        told, now_told = (f"{value / 2**20:,.0f} MiB" for value in (before[kind], after[kind]))
        yield Change(case, side, f"{what}, {kind} memory", told, now_told, verdict)


def _verdict(before: Interval, after: Interval, tolerance: float, *, more_is_better: bool) -> str:
    change = after.value / before.value
    apart = after.low > before.high or after.high < before.low
    if not apart or abs(change - 1) <= tolerance:
        return "same"
    return "better" if (change > 1) == more_is_better else "worse"


def _told(value: Interval) -> str:
    few = "" if value.cover >= 0.95 else f", {value.cover:.0%}"
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f}{few})"
