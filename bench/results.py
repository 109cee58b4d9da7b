"""What `latentrt bench` found: the form it is kept in, as JSON with a schema number, and how it is read again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import BenchmarkError
from ..kernels.atomic_file import write_json
from .gates import Quality
from .profile import Profile
from .stats import Interval, median

__all__ = ["SCHEMA", "BatchFigures", "CaseResult", "Memory", "Report", "Row", "read_report", "write_report"]

SCHEMA = 3
_READ = (2, 3)
"""Schema 2 also held fields that follow from others."""
BENCHMARK = "latentrt bench"


@dataclass(frozen=True)
class Memory:
    """Bytes: `resident` on the host; on a GPU PyTorch's tensors, `allocated`, what is `reserved` for them and for
    recorded graphs, and `gpu` or `gpu by turns` in all.

    Attributes:
        peaks: the most of each during a run; of `allocated` and `reserved` by the allocator's own count, of the others
            sampled.
        by_stage: the same of each stage, all of it sampled.
        series: samples over the seconds of one run, thinned out.
        stages: (name, begin, end) in the series' seconds.
        at_rest: what is held between runs, of each kind; the median.
        growths: what the process holds more after each picture, of each kind.
    """

    peaks: dict[str, float]
    by_stage: dict[str, dict[str, float]]
    series: dict[str, list[float]]
    stages: list[tuple[str, float, float]]
    at_rest: dict[str, float]
    growths: dict[str, float]


@dataclass(frozen=True)
class BatchFigures:
    """One side at one batch size.

    Attributes:
        seconds: of the call of each round, in order.
        speedup: the first side's seconds by this one's, round by round; above 1 is faster. None where the first was
            not measured. See `CaseResult.are_interleaved`.
        images_per_second: of the median.
        stages: median seconds of each stage; `base_step` and `refiner_step` are of one step.
        psnr, ssim: the worst over all rounds, beside the reference's pictures.
        joules_per_image: median over the rounds; None unless the GPU's counter could be read in all of them.
        busy_elsewhere: cores that others kept busy, of each round.
        gpu: clocks, power and temperature of each round.
        beside: the first side's seconds that the speedup is of.
    """

    batch: int
    seconds: list[float]
    speedup: Interval | None
    images_per_second: float
    stages: dict[str, float]
    psnr: float
    ssim: float
    memory: Memory | None
    joules_per_image: float | None
    busy_elsewhere: list[float]
    gpu: list[dict[str, float]]
    beside: list[float]

    @property
    def median(self) -> Interval:
        """Of the seconds of a call."""
        return median(self.seconds)


@dataclass(frozen=True)
class Row:
    """One side of a case.

    Attributes:
        status: `measured`; `invalid`, whose pictures fail the gate, so that it has no speed; `failed`, which keeps the
            batch sizes that it was through with; `skipped`, which is not installed or does not fit; `reference`, whose
            pictures the others are compared with, and which is not timed.
        reason: why it is not measured, or not at some batch sizes.
        built_before: an earlier run had built it, so that what building takes was not measured.
        build_seconds: from a cold process to the first picture with nothing exported or compiled yet.
        profile: where the time of one picture goes, if that was asked for.
        first_image_seconds: the same once that is there, or where nothing is built. Another process has made a picture
            before, so that the files are in memory (the page cache is warm) for every side.
    """

    side: str
    dtype: str
    settings: str
    status: str
    reason: str
    built_before: bool
    build_seconds: float | None
    first_image_seconds: float | None
    quality: Quality | None
    batches: list[BatchFigures]
    profile: Profile | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Attributes:
        case: as it was run.
        steps: that base and refiner took.
        reference: the side whose pictures the others are held against.
        skipped: why nothing was run; empty where it was.
        prompts: digest of the prompts, in their order.
        seconds: that it took in all.
        groups: the sides that were resident together, in the order in which they were measured. Where empty, all were.
        group_batches: the batch sizes at which each group was; all of them where empty.
        builders: how many sides were built at the same time.
    """

    case: dict[str, Any]
    steps: dict[str, int]
    gate: str
    reference: str | None
    rows: list[Row]
    skipped: str = ""
    prompts: str = ""
    seconds: float | None = None
    groups: list[list[str]] = field(default_factory=list)
    builders: int = 1
    group_batches: list[list[int]] = field(default_factory=list)

    def first(self, row: Row) -> BatchFigures | None:
        """A side's figures at the first batch size that was asked for, which tables have; None where it has none."""
        return next((b for b in row.batches if b.batch == self.case["batches"][0]), None)

    def is_interleaved(self, row: Row, batch: int) -> bool:
        """Whether a side's rounds alternated with the first side's."""
        return self.are_interleaved({row.side, self.rows[0].side}, batch)

    def are_interleaved(self, sides: set[str], batch: int) -> bool:
        """Whether the rounds of these sides alternated at a batch size. Otherwise they did not fit together, and the
        machine's drift between their times is part of their ratio."""
        return not self.groups or any(
            sides <= set(group) and (not self.group_batches or batch in self.group_batches[k])
            for k, group in enumerate(self.groups)
        )


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        complete: false where it was interrupted.
        conditions: `load` of the machine when it began and when it ended.
        seconds: that the whole run took, where it was kept.
    """

    command: str
    machine: dict[str, Any]
    seed: int
    cases: list[CaseResult]
    complete: bool = True
    conditions: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


def write_report(path: Path, report: Report) -> None:
    """Write it whole or not at all; numbers that JSON lacks are null."""
    write_json(path, {"schema": SCHEMA, "benchmark": BENCHMARK, **_finite(asdict(report))})


def read_report(path: Path) -> Report:
    """Read what `write_report` wrote.

    Raises:
        BenchmarkError: it is no such file, of another schema, or damaged.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("benchmark") != BENCHMARK:
        raise BenchmarkError(f"{path} holds no results of `latentrt bench`; give a file that it wrote")
    if content.get("schema") not in _READ:
        raise BenchmarkError(
            f"{path} has schema {content.get('schema')!r} and this version reads {' and '.join(map(str, _READ))}; "
            "measure again, or read it with the version that wrote it"
        )
    try:
        report: Report = _build(
            Report, {k: v for k, v in content.items() if k not in ("schema", "benchmark")}
        )
    except (TypeError, KeyError, ValueError) as error:
        raise BenchmarkError(f"{path} is damaged: {error}") from error
    return report


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


_LISTS = {"cases": CaseResult, "rows": Row, "batches": BatchFigures}


def _build(kind: Any, content: Mapping[str, Any]) -> Any:
    """A dataclass from its dictionary, with those it holds."""
    hints = get_type_hints(kind)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in content]
    if missing:
        raise KeyError(f"{kind.__name__} lacks {', '.join(missing)}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            continue
        if name in _LISTS:
            values[name] = [_build(_LISTS[name], item) for item in value]
        elif isinstance(value, dict) and (inner := _dataclass_of(hints[name])) is not None:
            values[name] = _build(inner, value)
        elif value is None and hints[name] is float:
            values[name] = math.nan
        else:
            values[name] = value
    return kind(**values)


def _dataclass_of(hint: Any) -> Any | None:
    """The dataclass in `X` or `X | None`."""
    options = getattr(hint, "__args__", (hint,))
    return next((option for option in options if is_dataclass(option)), None)
