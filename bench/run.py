"""How a case is measured: every side's pictures first, and then, in turns, the times of those that pass.

    each side alone     cold process -> what it builds -> first picture -> its best setting; its process stays open
    pictures            the same prompts and seeds from each, one by one, held against the reference; the gate
    each batch size     a warm-up, a run with memory sampled, then rounds: A B C, B C A, C A B, ...; timed pictures are
                        held against what the reference made of the same seeds one by one

A side that fails anywhere is told with its reason, and the others go on. What was measured is there at any time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from .cases import Case, SideSpec
from .features import Judges
from .gates import Gate, Quality, likeness, measure_quality
from .host import Host, Job, Run, Trace, build_name
from .profile import Profile
from .results import BatchFigures, CaseResult, Memory, Row
from .side import Images
from .stats import growth, ratio, spread

__all__ = ["CaseRun", "Plan"]

_log = logging.getLogger(__name__)

_POINTS = 240
"""Of a memory series, at most, in the results."""


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        prompts: taken in turn.
        rounds: timed calls of each side at each batch size.
        pictures: of each side for the gate, and at least as many as the largest batch.
        seed: of the first picture.
        profile: tell where the time of a picture goes, after everything else.
    """

    prompts: Sequence[str]
    gate: Gate
    rounds: int = 9
    pictures: int = 4
    seed: int = 0
    profile: bool = False

    def work(self, first: int, count: int) -> tuple[list[str], list[int]]:
        """Prompts and seeds of pictures `first` and on."""
        at = range(first, first + count)
        return [self.prompts[k % len(self.prompts)] for k in at], [self.seed + k for k in at]


@dataclass
class _Lane:
    """What is known of one side so far."""

    spec: SideSpec
    job: Job
    host: Host | None = None
    settings: str = ""
    status: str = "measured"
    reason: str = ""
    built_before: bool = False
    build_seconds: float | None = None
    first_image_seconds: float | None = None
    images: Images | None = None
    quality: Quality | None = None
    runs: dict[int, list[Run]] = field(default_factory=dict)
    worst: dict[int, tuple[float, float]] = field(default_factory=dict)
    traces: dict[int, Trace] = field(default_factory=dict)
    profile: Profile | None = None

    def end(self, status: str, reason: str) -> None:
        """It is out; a second reason does not replace the first."""
        if self.status == "measured":
            self.status, self.reason = status, reason
        self.close()

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
            self.host = None


Tell = Callable[[str, str], None]
"""(side, what it is at), for a live table."""


class CaseRun:
    """One case. `measure` fills it; `result` may be asked for at any time, after an interruption too."""

    def __init__(
        self,
        case: Case,
        sides: Sequence[SideSpec],
        plan: Plan,
        *,
        steps: dict[str, int],
        device: str,
        folder: Path,
        open_host: Callable[[Job], Host],
        judges: Judges | None = None,
        tell: Tell = lambda side, state: None,
    ) -> None:
        """
        Args:
            sides: the first is what speed is compared with.
            steps: that base and refiner take.
            folder: for what sides build; what an earlier run built there is taken as it is, and no time is told for it.
            open_host: where a side is to run.
        """
        self._case = case
        self._plan = plan
        self._steps = steps
        self._open_host = open_host
        self._judges = judges or Judges()
        self._count = max(plan.pictures, *case.batches)
        self._tell = tell
        self._reference: _Lane | None = None
        self._eager: dict[str, Quality] = {}  # what eager diffusers reaches, by dtype
        self._lanes = [
            _Lane(spec, Job(case, spec, device, folder / build_name(case, spec, device))) for spec in sides
        ]

    def measure(self) -> None:
        """Everything; sides are closed when it ends, however it ends."""
        try:
            for lane in self._lanes:
                self._attempt(lane, self._begin)
            self._choose_reference()
            for lane in self._lanes:
                self._attempt(lane, self._judge)
            for batch in self._case.batches:
                self._measure_batch(batch)
            for lane in self._lanes if self._plan.profile else ():
                self._profile(lane)
        finally:
            for lane in self._lanes:
                lane.close()

    @property
    def pictures(self) -> dict[str, Images]:
        """Of each side that made some, for the report."""
        return {lane.spec.name: lane.images for lane in self._lanes if lane.images is not None}

    def _attempt(self, lane: _Lane, work: Callable[[_Lane], None]) -> None:
        """A side's failure is its own, and one that is out is not asked again."""
        if lane.status != "measured":
            return
        try:
            work(lane)
        except Exception as error:
            lane.end("failed", _first_line(error))
            self._tell(lane.spec.name, f"failed: {lane.reason}")

    def _begin(self, lane: _Lane) -> None:
        name = lane.spec.name
        lane.built_before = lane.spec.builds and lane.job.is_built()
        if lane.spec.builds and not lane.built_before:
            self._tell(name, "building")
            lane.build_seconds, _ = self._first_image(lane)
            lane.close()
            lane.job.note_built()
        self._tell(name, "first image")
        lane.first_image_seconds, first = self._first_image(lane)
        self._tell(name, "its best setting")
        lane.settings = self._host(lane).tune()
        rest = []
        for k in range(1, self._count):
            self._tell(name, f"picture {k + 1} of {self._count}")
            rest.append(self._host(lane).run(*self._plan.work(k, 1)).images)
        lane.images = np.concatenate([first, *rest])

    def _first_image(self, lane: _Lane) -> tuple[float, Images]:
        """Seconds from before the process begins, and the picture."""
        begun = time.perf_counter()
        lane.host = self._open_host(lane.job)
        lane.settings = lane.host.open()
        first = lane.host.run(*self._plan.work(0, 1)).images
        return time.perf_counter() - begun, first

    def _choose_reference(self) -> None:
        """Eager diffusers in float32 where it ran, else eager diffusers, else the first side that did."""
        alive = [lane for lane in self._lanes if lane.images is not None]
        eager = [lane for lane in alive if lane.spec.is_eager_diffusers]
        exact = [lane for lane in eager if lane.job.dtype == "float32"]
        self._reference = next(iter([*exact, *eager, *alive]), None)
        for lane in eager:
            if lane.images is not None and self._reference is not None and self._reference.images is not None:
                found = likeness(lane.images, self._reference.images)
                self._eager[lane.job.dtype] = Quality(len(lane.images), *found)

    def _judge(self, lane: _Lane) -> None:
        reference = self._reference
        if lane.images is None or reference is None or reference.images is None:
            return
        self._tell(lane.spec.name, "quality")
        prompts, _ = self._plan.work(0, self._count)
        lane.quality = measure_quality(lane.images, reference.images, prompts, self._judges)
        self._require(lane, lane.quality, "")

    def _require(self, lane: _Lane, quality: Quality, where: str) -> None:
        failures = self._plan.gate.judge(quality, lane.job.dtype, self._eager.get(lane.job.dtype))
        if failures:
            lane.end("invalid", where + ", ".join(failures))
            self._tell(lane.spec.name, f"invalid: {lane.reason}")

    def _measure_batch(self, batch: int) -> None:
        lanes = [lane for lane in self._lanes if self._takes(lane, batch)]
        for lane in lanes:
            self._attempt(lane, partial(self._warm_up, batch=batch))
        for round_ in range(self._plan.rounds):
            first = round_ % len(lanes)
            for lane in [*lanes[first:], *lanes[:first]]:
                self._attempt(lane, partial(self._time, batch=batch, round_=round_))

    def _takes(self, lane: _Lane, batch: int) -> bool:
        """The first side takes every batch size: the others are compared with it."""
        once = lane.spec.compiles_each_size and lane.job.device == "cpu" and lane is not self._lanes[0]
        return not once or batch == self._case.batches[0]

    def _warm_up(self, lane: _Lane, batch: int) -> None:
        self._tell(lane.spec.name, f"batch {batch}: warm-up")
        work = self._plan.work(1_000_000, batch)
        self._host(lane).run(*work)
        lane.traces[batch] = _required(self._host(lane).run(*work, traced=True).trace)

    def _time(self, lane: _Lane, batch: int, round_: int) -> None:
        self._tell(lane.spec.name, f"batch {batch}: round {round_ + 1} of {self._plan.rounds}")
        first = round_ * batch % (self._count - batch + 1)
        run = self._host(lane).run(*self._plan.work(first, batch))
        lane.runs.setdefault(batch, []).append(replace(run, images=run.images[:0]))
        self._compare(lane, batch, first, run.images)

    def _compare(self, lane: _Lane, batch: int, first: int, made: Images) -> None:
        """Timed pictures are judged too: a side may be right alone and wrong in a batch."""
        if self._reference is None or self._reference.images is None:
            raise AssertionError("a side that is timed has made pictures, and so there is a reference")
        found = likeness(made, self._reference.images[first : first + batch])
        before = lane.worst.get(batch, found)
        lane.worst[batch] = (min(found[0], before[0]), min(found[1], before[1]))
        if self._plan.gate.of_each_picture:
            self._require(lane, Quality(batch, *found), f"batch {batch}: ")

    def _profile(self, lane: _Lane) -> None:
        """In a process of its own; code that torch.compile made is not told apart by operators."""
        if lane.status != "measured" or lane.spec.compiles_each_size:
            return
        self._tell(lane.spec.name, "profile")
        lane.close()
        host = self._open_host(replace(lane.job, profiled=True))
        try:
            host.open()
            lane.profile = host.profile(*self._plan.work(0, 1))
        except Exception as error:  # its speed stands without it
            self._tell(lane.spec.name, f"no profile: {_first_line(error)}")
        finally:
            host.close()

    def _host(self, lane: _Lane) -> Host:
        if lane.host is None:
            raise AssertionError("a side that is out is not asked")
        return lane.host

    def result(self) -> CaseResult:
        """What is known by now; a side that is out has no speed."""
        reference = self._reference.spec.name if self._reference else None
        rows = [self._row(lane) for lane in self._lanes]
        return CaseResult(
            asdict(self._case),
            self._steps,
            self._plan.gate.name,
            reference,
            rows,
            prompts=hashlib.sha256("\n".join(self._plan.prompts).encode()).hexdigest()[:12],
        )

    def _row(self, lane: _Lane) -> Row:
        valid = lane.status == "measured"
        return Row(
            side=lane.spec.name,
            dtype=lane.job.dtype,
            settings=lane.settings,
            status=lane.status,
            reason=lane.reason,
            built_before=lane.built_before,
            build_seconds=lane.build_seconds if valid else None,
            first_image_seconds=lane.first_image_seconds if valid else None,
            quality=lane.quality,
            batches=[self._figures(lane, batch) for batch in sorted(lane.runs)] if valid else [],
            profile=lane.profile if valid else None,
        )

    def _figures(self, lane: _Lane, batch: int) -> BatchFigures:
        runs = lane.runs[batch]
        seconds = [run.seconds for run in runs]
        first = self._lanes[0]
        base = [run.seconds for run in first.runs.get(batch, [])] if first.status == "measured" else []
        paired = min(len(base), len(seconds))  # an interruption may have come in the middle of a round
        joules = [run.joules / batch for run in runs if run.joules is not None]
        psnr, ssim = lane.worst.get(batch, (float("nan"), float("nan")))
        return BatchFigures(
            batch=batch,
            seconds=seconds,
            latency=spread(seconds),
            speedup=ratio(base[:paired], seconds[:paired]) if paired else None,
            images_per_second=batch / median(seconds),
            stages=self._stages(runs),
            psnr=psnr,
            ssim=ssim,
            memory=_memory(lane.traces.get(batch), [run.resident for run in runs], batch),
            joules_per_image=median(joules) if joules else None,
            busy_elsewhere=[round(run.busy_elsewhere, 2) for run in runs],
            gpu=[run.gpu for run in runs],
        )

    def _stages(self, runs: Sequence[Run]) -> dict[str, float]:
        names = dict.fromkeys(name for run in runs for name in run.stages)
        found = {name: median(run.stages.get(name, 0.0) for run in runs) for name in names}
        for name, steps in self._steps.items():
            if name in found and steps:
                found[f"{name}_step"] = found[name] / steps
        return found


def _first_line(error: Exception) -> str:
    """What fits in a table; the log has the whole."""
    _log.info("a side failed", exc_info=error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c for c in lines[0] if c.isprintable())[:300]


def _memory(trace: Trace | None, resident: Sequence[int], batch: int) -> Memory | None:
    if trace is None:
        return None
    count = len(trace.series["seconds"])
    # The largest of a few neighbours, so that thinning out hides no peak.
    step = -(-count // _POINTS)
    series = {
        name: [max(values[k : k + step]) for k in range(0, count, step)]
        for name, values in trace.series.items()
    }
    return Memory(trace.peaks, trace.by_stage, growth(resident) / batch, series, trace.stages)


def _required(trace: Trace | None) -> Trace:
    if trace is None:
        raise AssertionError("a traced run has a trace")
    return trace
