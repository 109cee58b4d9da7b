"""The results of `latentrt bench`: dataclasses, and reading and writing them as JSON with a schema number."""

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

__all__ = [
    "SCHEMA",
    "BatchFigures",
    "CaseResult",
    "Memory",
    "Report",
    "Row",
    "read_json",
    "read_report",
    "write_report",
]

SCHEMA = 3
_READABLE_SCHEMAS = (2, 3)
"""Schema 2 has further fields that follow from others."""
BENCHMARK = "latentrt bench"


@dataclass(frozen=True)
class Memory:
    """Bytes of memory by kind (see `monitor.Series`).

    Attributes:
        peaks: the peak of each kind during a run. `allocated` and `reserved` are counted by the allocator, the others
            are sampled.
        by_stage: stage -> the same, all of it sampled.
        series: samples over the seconds of one run, thinned out.
        stages: (name, begin, end) in the series' seconds.
        at_rest: median of what the process holds between runs.
        growths: how much more the process holds after each picture.
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
        seconds: of each round's call, in order.
        speedup: the first side's seconds divided by this one's, round by round; above 1 is faster. None if the first
            side was not measured. See `CaseResult.are_interleaved`.
        images_per_second: by the median.
        stages: median seconds of each stage; `base_step` and `refiner_step` are those of one step.
        psnr, ssim: the lowest over all rounds, compared with the reference's pictures.
        memory: during the call and between calls.
        joules_per_image: median over the rounds; None unless the GPU's counter could be read in all of them.
        busy_elsewhere: for each round, how many cores other processes kept busy.
        gpu: medians of the GPU's clocks, power and temperature during the call of each round.
        beside: the first side's seconds that `speedup` compares with.
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
        """The median of the seconds, with its interval."""
        return median(self.seconds)


@dataclass(frozen=True)
class Row:
    """One side of a case.

    Attributes:
        status: one of
            `measured`;
            `invalid`: its pictures fail the gate, so it has no speed;
            `failed`: it keeps the batch sizes that were complete;
            `skipped`: it is not installed, or does not fit;
            `reference`: the others' pictures are compared with its own, and it is not timed.
        reason: why it is not measured, or not at some batch sizes.
        built_before: an earlier run had built it, so building was not timed.
        build_seconds: from starting the process to the first picture, with nothing exported or compiled yet.
        first_image_seconds: from starting the process to the first picture, with everything built. Another process has
            generated a picture before, so the files are in the page cache for every side.
        profile: of one picture, if it was requested.
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
        case: the fields of `cases.Case`.
        steps: that base and refiner took.
        gate: its name.
        reference: the side that the others' pictures were compared with.
        skipped: why the case was not run; empty if it was.
        prompts: digest of the prompts, in their order.
        seconds: for the whole case.
        groups: the sides that were resident together, in the order in which they were measured; if empty, all of them.
        builders: how many sides were built at the same time.
        group_batches: the batch sizes of each group; if empty, every group has all of them.
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
        """A side's figures at the case's first batch size, which tables show; None if it has none."""
        return next((b for b in row.batches if b.batch == self.case["batches"][0]), None)

    def is_interleaved(self, row: Row, batch: int) -> bool:
        """Whether a side's rounds alternated with the first side's at a batch size."""
        return self.are_interleaved({row.side, self.rows[0].side}, batch)

    def are_interleaved(self, sides: set[str], batch: int) -> bool:
        """Whether the rounds of these sides alternated at a batch size.

        If not, they did not fit in memory together, and their ratio includes how the machine changed meanwhile.
        """
        return not self.groups or any(
            sides <= set(group) and (not self.group_batches or batch in self.group_batches[k])
            for k, group in enumerate(self.groups)
        )


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        complete: false if it was interrupted.
        conditions: `load` is the machine's load at the start and at the end.
        seconds: for the whole run; older results do not have it.
    """

    command: str
    machine: dict[str, Any]
    seed: int
    cases: list[CaseResult]
    complete: bool = True
    conditions: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


def write_report(path: Path, report: Report) -> None:
    """Write a report atomically. Infinities and NaNs, which JSON does not have, become null."""
    write_json(path, {"schema": SCHEMA, "benchmark": BENCHMARK, **_finite(asdict(report))})


def read_json(path: Path) -> Any:
    """What a file of results holds.

    Raises:
        BenchmarkError: it is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from error


def read_report(path: Path) -> Report:
    """Read what `write_report` wrote.

    Raises:
        BenchmarkError: the file is something else, of another schema, or damaged.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("benchmark") != BENCHMARK:
        raise BenchmarkError(f"{path} holds no results of `latentrt bench`; give a file that it wrote")
    if content.get("schema") not in _READABLE_SCHEMAS:
        readable = " and ".join(map(str, _READABLE_SCHEMAS))
        raise BenchmarkError(
            f"{path} has schema {content.get('schema')!r} and this version reads {readable}; "
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
    """Build a dataclass from its dictionary, and the dataclasses in its fields; unknown keys are ignored."""
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
    """The dataclass in a type hint `X` or `X | None`, if there is one."""
    options = getattr(hint, "__args__", (hint,))
    return next((option for option in options if is_dataclass(option)), None)
