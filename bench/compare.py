"""What changed between two results, beyond noise.

- Speed: two runs are hours or machines apart, so a side's speed is compared as its ratio to the first side of its own
  run, if it has one. Seconds are compared only between runs on one machine, and with a wide tolerance, since the same
  code differs by a tenth from one hour to the next. A change counts if the intervals do not overlap and it exceeds a
  tolerance. With too few rounds for an interval nothing is concluded.
- Figures without an interval (building, the first picture, stages, energy, memory) have wide tolerances.
- Quality is compared if both runs generated the same pictures; PSNR, SSIM and LPIPS also need the same reference.
- A figure that only the first run has counts as worse. Exceptions are figures that depend on the machine's drivers, and
  FID of so few pictures that it is no longer reported.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, NamedTuple

from ..errors import BenchmarkError, RequestError
from .quality import pictures_for_fid
from .results import BatchFigures, CaseResult, Memory, Report, Row
from .stats import COVER, Interval

__all__ = ["SECONDS_TOLERANCE", "TOLERANCE", "Change", "compare", "differences"]

TOLERANCE = 0.03
"""For speedups: runs on one machine differ by so much beyond their intervals, from clocks and memory layout."""
SECONDS_TOLERANCE = 0.25
"""For seconds, and for speedups of sides that were not interleaved: eager diffusers took 1.18 and 1.07 s in two runs of
one machine."""
_STAGE_TOLERANCE, _MIN_STAGE_SHARE = 0.25, 0.02
"""For a stage's seconds. A change also has to exceed this share of its side's whole call."""
_JOULES_TOLERANCE = 0.1
_MEMORY_TOLERANCE = 0.05
_MIN_MEMORY_CHANGE = 16 << 20
_MIN_GROWTH_CHANGE = 4 << 20
"""Bytes a picture. Libraries' own allocations change a side without a leak by 0.3 MiB or more."""
_HAS_PICTURES = ("measured", "reference")
"""Statuses of rows with good pictures; a reference in float32 is not timed."""
_SAME_MACHINE = ("processor", "cores", "threads", "device", "gpu")
_TIMED_ONCE = {"build_seconds": ("build", 0.3, 5.0), "first_image_seconds": ("first image", 0.3, 2.0)}
"""Field that is timed only once -> (its name for people, tolerance, least change in seconds that counts)."""


class _Measure(NamedTuple):
    """A quality metric, and how much it may change.

    Attributes:
        what: its name.
        least, share: a change counts if it exceeds both `least` and this share of the earlier value.
        best: the value beyond which it cannot improve.
    """

    what: str
    more_is_better: bool
    least: float
    share: float
    best: float


_QUALITY = {
    # 3 dB is twice the squared error. From 60 dB on, pictures in bytes are equal.
    "psnr": _Measure("PSNR", more_is_better=True, least=3.0, share=0.0, best=60.0),
    "ssim": _Measure("SSIM", more_is_better=True, least=0.01, share=0.0, best=1.0),
    "lpips": _Measure("LPIPS", more_is_better=False, least=0.01, share=0.0, best=0.0),
    # The last two by ratio, since networks differ in scale: the demo's FID is 0.2, SDXL's 23.
    "clip": _Measure("CLIP score", more_is_better=True, least=0.0, share=0.01, best=100.0),
    "fid": _Measure("FID", more_is_better=False, least=0.0, share=0.02, best=0.0),
}
_RELATIVE_TO_REFERENCE = ("psnr", "ssim", "lpips")
"""The metrics that compare with the reference's pictures."""
_FID_PICTURES = pictures_for_fid(2048)
"""For Inception, the network with the most features: with fewer pictures, new results may have no FID where older ones
do."""
_NOT_SETTINGS = ("name", "summary", "batches")
"""Fields of a case that its figures do not depend on. Batch sizes have separate figures."""


@dataclass(frozen=True)
class Change:
    """One figure in both runs.

    Attributes:
        verdict: `better`, `worse` or `same`; or the reason why figures cannot be compared: `other machine`, `other
            judge`, `other pictures`, `other reference`, `too few rounds`, `not measured`. Differences between the
            machines, which figures may depend on, are `changed`.
    """

    case: str
    side: str
    what: str
    before: str
    after: str
    verdict: str

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.case, self.side, self.what) if part)
        return f"{self.verdict:<16}{place:<60}{self.before:>24} -> {self.after}"


@dataclass(frozen=True)
class _Runs:
    """What both runs of a case have in common.

    Attributes:
        same_inputs: the same seed and prompts.
        same_reference: pictures were compared with the same side's.
        tolerance: of speedups.
        first: the first side's row in each run; None if the runs have different ones.
    """

    case: str
    same_machine: bool
    same_inputs: bool
    same_reference: bool
    tolerance: float
    first: tuple[Row, Row] | None


def compare(before: Report, after: Report, tolerance: float = TOLERANCE) -> list[Change]:
    """All differences between the machines, then all figures of the first run, in its order.

    Raises:
        BenchmarkError: the runs have no case in common, or a case was measured with other settings.
        RequestError: the tolerance is negative or not a number.
    """
    if not 0 <= tolerance < float("inf"):
        raise RequestError(f"a tolerance of {tolerance:g}; give a share such as {TOLERANCE:g}")
    later_cases = {case.case["name"]: case for case in after.cases}
    if not any(case.case["name"] in later_cases for case in before.cases):
        names = [
            ", ".join(case.case["name"] for case in report.cases) or "none" for report in (before, after)
        ]
        raise BenchmarkError(f"no case is in both: the first has {names[0]}, the second {names[1]}")
    changes = [
        Change("", name, "", str(x), str(y), "changed")
        for name, x, y in _machines(before.machine, after.machine)
    ]
    for case in before.cases:
        changes += _case(before, case, after, later_cases.get(case.case["name"]), tolerance)
    return changes


def differences(a: Report, x: CaseResult, b: Report, y: CaseResult) -> list[str]:
    """How the settings of a case differ between two results, except for the machine; for people to read."""
    changed = _settings(x, y)
    changed += [row for row in _machines(a.machine, b.machine) if row[0] not in _SAME_MACHINE]
    if a.seed != b.seed:
        changed.append(("seed", a.seed, b.seed))
    if x.prompts != y.prompts:
        changed.append(("prompts", x.prompts or "unknown", y.prompts or "unknown"))
    return [f"{name} {first} and {second}" for name, first, second in changed]


Differences = list[tuple[str, Any, Any]]


def _settings(a: CaseResult, b: CaseResult) -> Differences:
    names = [name for name in a.case if name not in _NOT_SETTINGS]
    return [(name, a.case[name], b.case.get(name)) for name in names if b.case.get(name) != a.case[name]]


def _machines(a: Mapping[str, Any], b: Mapping[str, Any]) -> Differences:
    """Differences in machine, driver, versions and commit."""
    first, second = (
        {name: machine.get(name) for name in (*_SAME_MACHINE, "driver", "cuda", "python", "commit")}
        | dict(machine.get("versions", {}))
        for machine in (a, b)
    )
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [(name, first.get(name) or "none", second.get(name) or "none") for name in names]


def _case(
    before: Report, a: CaseResult, after: Report, b: CaseResult | None, tolerance: float
) -> Iterator[Change]:
    name = a.case["name"]
    if b is None or b.skipped:
        if not a.skipped:
            state = "not run" if b is None else f"skipped: {b.skipped}"
            yield Change(name, "every side", "runs", "measured", state, "worse")
        return
    if other := _settings(a, b):
        described = ", ".join(f"{key} {x!r} and {y!r}" for key, x, y in other)
        raise BenchmarkError(f"case {name} was measured with other settings: {described}")
    shared_first = a.rows and b.rows and a.rows[0].side == b.rows[0].side
    runs = _Runs(
        name,
        same_machine=all(before.machine.get(key) == after.machine.get(key) for key in _SAME_MACHINE),
        same_inputs=(before.seed, a.prompts) == (after.seed, b.prompts),
        same_reference=a.reference == b.reference,
        tolerance=tolerance,
        first=(a.rows[0], b.rows[0]) if shared_first else None,
    )
    rows = {row.side: row for row in b.rows}
    for row in a.rows:
        if row.status not in _HAS_PICTURES and not row.batches:
            continue  # nothing of it was measured
        new_row = rows.get(row.side)
        if (
            new_row is not None
            and "reference" in (row.status, new_row.status)
            and new_row.status in _HAS_PICTURES
        ):
            continue
        no_longer_measured = new_row is None or (
            new_row.status != "measured" and (row.status in _HAS_PICTURES or not new_row.batches)
        )
        if no_longer_measured:
            state = "not run" if new_row is None else f"{new_row.status}: {new_row.reason}"
            yield Change(name, row.side, "runs", row.status, state, "worse")
        if new_row is not None and (new_row.batches or not no_longer_measured):
            sizes = {x.batch for x in row.batches}
            not_interleaved = {
                x for x in sizes if not (a.is_interleaved(row, x) and b.is_interleaved(new_row, x))
            }
            yield from _row(runs, row, new_row, not_interleaved)


def _row(runs: _Runs, a: Row, b: Row, not_interleaved: Container[int]) -> Iterator[Change]:
    """`not_interleaved` has the batch sizes at which the side and the first one were not interleaved in some run."""
    wider = replace(runs, tolerance=max(SECONDS_TOLERANCE, runs.tolerance))
    yield from _quality(runs, a, b)
    for field, (what, share, least) in _TIMED_ONCE.items():
        before, after = getattr(a, field), getattr(b, field)
        if before is None or after is None:
            continue  # there was nothing to build, or it was built before
        verdict = (
            _verdict_without_interval(after - before, max(share * before, least))
            if runs.same_machine
            else "other machine"
        )
        yield Change(runs.case, a.side, what, f"{before:.1f} s", f"{after:.1f} s", verdict)
    new_figures: Mapping[int, BatchFigures] = {figures.batch: figures for figures in b.batches}
    for x in a.batches:
        y = new_figures.get(x.batch)
        if y is None:
            yield Change(runs.case, a.side, f"batch {x.batch}", "measured", "not run", "worse")
            continue
        yield from _speed(wider if x.batch in not_interleaved else runs, a.side, x, y)
        yield from _stages(runs, a.side, x, y)
        yield from _joules(runs, a.side, x, y)
        yield from _memory(runs, a.side, f"batch {x.batch}", x.memory, y.memory)


def _speed(runs: _Runs, side: str, x: BatchFigures, y: BatchFigures) -> Iterator[Change]:
    what = f"batch {x.batch}"
    is_first = runs.first is None or runs.first[0].side == side
    if not is_first and x.speedup is not None and y.speedup is not None:
        verdict = _verdict(x.speedup, y.speedup, runs.tolerance, more_is_better=True)
        yield Change(
            runs.case, side, f"{what}, speedup", _interval_text(x.speedup), _interval_text(y.speedup), verdict
        )
        return
    before, after = x.median, y.median
    tolerance = max(SECONDS_TOLERANCE, runs.tolerance)
    verdict = (
        _verdict(before, after, tolerance, more_is_better=False) if runs.same_machine else "other machine"
    )
    yield Change(runs.case, side, f"{what}, seconds", _interval_text(before), _interval_text(after), verdict)


def _stages(runs: _Runs, side: str, x: BatchFigures, y: BatchFigures) -> Iterator[Change]:
    """Seconds of each stage, as shares of the first side's whole call in the same run if both runs have the same first
    side."""
    wholes = [1.0, 1.0]
    if runs.first is not None and runs.first[0].side != side:
        calls = [[b.median.value for b in row.batches if b.batch == x.batch] for row in runs.first]
        if all(calls):
            wholes = [call[0] for call in calls]
    comparable = runs.same_machine or wholes != [1.0, 1.0]
    for name, before in x.stages.items():
        what = f"batch {x.batch}, stage {name}"
        after = y.stages.get(name)
        if name.endswith("_step"):
            continue  # follows from the whole stage
        if after is None:
            yield Change(runs.case, side, what, f"{1e3 * before:.1f} ms", "missing", "not measured")
            continue
        least = max(_STAGE_TOLERANCE * before, _MIN_STAGE_SHARE * x.median.value) / wholes[0]
        change = after / wholes[1] - before / wholes[0]
        verdict = _verdict_without_interval(change, least) if comparable else "other machine"
        yield Change(runs.case, side, what, f"{1e3 * before:.1f} ms", f"{1e3 * after:.1f} ms", verdict)


def _joules(runs: _Runs, side: str, x: BatchFigures, y: BatchFigures) -> Iterator[Change]:
    before, after = x.joules_per_image, y.joules_per_image
    if before is None:
        return
    what = f"batch {x.batch}, energy of an image"
    if after is None:
        yield Change(runs.case, side, what, f"{before:.0f} J", "missing", "not measured")
        return
    verdict = (
        _verdict_without_interval(after - before, _JOULES_TOLERANCE * before)
        if runs.same_machine
        else "other machine"
    )
    yield Change(runs.case, side, what, f"{before:.0f} J", f"{after:.0f} J", verdict)


def _memory(runs: _Runs, side: str, what: str, a: Memory | None, b: Memory | None) -> Iterator[Change]:
    if a is None:
        return
    if b is None:
        yield Change(runs.case, side, f"{what}, memory", "measured", "missing", "not measured")
        return
    for kind, before in a.peaks.items():
        place = f"{what}, {kind} memory"
        after = b.peaks.get(kind)
        if after is None:
            yield Change(runs.case, side, place, _mib(before), "missing", "not measured")
            continue
        verdict = _verdict_without_interval(
            after - before, max(_MEMORY_TOLERANCE * before, _MIN_MEMORY_CHANGE)
        )
        yield Change(runs.case, side, place, _mib(before), _mib(after), verdict)
    for kind, before in a.growths.items():
        place = f"{what}, {kind} memory left by a picture"
        if kind not in b.growths:
            yield Change(runs.case, side, place, _mib(before), "missing", "not measured")
            continue
        verdict = _verdict_without_interval(b.growths[kind] - before, _MIN_GROWTH_CHANGE)
        yield Change(runs.case, side, place, _mib(before), _mib(b.growths[kind]), verdict)


def _quality(runs: _Runs, a: Row, b: Row) -> Iterator[Change]:
    if a.quality is None:
        return
    same_pictures = runs.same_inputs and b.quality is not None and a.quality.pictures == b.quality.pictures
    for field, measure in _QUALITY.items():
        before, after = (getattr(row.quality, field, None) for row in (a, b))
        if before is None or not isfinite(before):
            continue
        if after is None:
            few = field == "fid" and b.quality is not None and b.quality.pictures < _FID_PICTURES
            verdict = "not measured" if few else "worse"
            yield Change(runs.case, a.side, measure.what, f"{before:.4g}", "not measured", verdict)
            continue
        by = [getattr(row.quality, f"{field}_by", None) for row in (a, b)]
        if by[0] != by[1]:
            described = f"{after:.4g} by {by[1]}"
            yield Change(runs.case, a.side, measure.what, f"{before:.4g}", described, "other judge")
            continue
        limit = min if measure.more_is_better else max
        change = limit(after, measure.best) - limit(before, measure.best)
        worse = -change if measure.more_is_better else change
        verdict = _verdict_without_interval(worse, max(measure.least, measure.share * before))
        if not isfinite(after):
            verdict = "worse"
        elif not same_pictures:
            verdict = "other pictures"
        elif field in _RELATIVE_TO_REFERENCE and not runs.same_reference:
            verdict = "other reference"
        yield Change(runs.case, a.side, measure.what, f"{before:.4g}", f"{after:.4g}", verdict)


def _verdict_without_interval(more: float, least: float) -> str:
    """The verdict on a figure without an interval that has grown by `more`, if more is worse."""
    return "same" if abs(more) <= least else "worse" if more > 0 else "better"


def _verdict(before: Interval, after: Interval, tolerance: float, *, more_is_better: bool) -> str:
    change = after.value / before.value
    disjoint = after.low > before.high or after.high < before.low
    if not disjoint or abs(change - 1) <= tolerance:
        return "same"
    if min(before.cover, after.cover) < COVER:
        return "too few rounds"
    return "better" if (change > 1) == more_is_better else "worse"


def _interval_text(value: Interval) -> str:
    few = "" if value.cover >= COVER else f", {value.cover:.0%}"
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f}{few})"


def _mib(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB" if abs(value) >= 10 * 2**20 else f"{value / 2**20:.1f} MiB"
