"""How a case is measured: sides' pictures first, and then, in turns, the times of those that pass.

    each side alone     a process that builds, or just reads the files once -> cold process -> first picture -> its
                        best setting; its process stays open. A reference that is not in the case's dtype makes its
                        pictures in one process, and no more
    pictures            the same prompts and seeds from each, one by one, held against the reference; the gate
    each batch size     a warm-up, a run with memory sampled, then rounds: A B C, B C A, C A B, ...; timed pictures are
                        held against what the reference made of the same seeds one by one

Where not all sides fit together this is done for one group after another (see `room`). A side that is measured without
the first one, at all batch sizes or at the larger ones, is not interleaved with it there: its speedup is of rounds at
different times, and is marked so.

A side that fails anywhere is told with its reason, and the others go on. What was measured is there at any time.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import BenchmarkError
from .cases import Case, SideSpec, eager_sides, pictures_only
from .features import Judges
from .gates import Gate, Quality, likeness, measure_quality
from .host import Host, job_for
from .lane import Lane
from .results import CaseResult
from .room import Arrangement
from .side import Images, Pictures, as_bytes, unit
from .worker import Job, Trace

__all__ = ["CaseRun", "Plan"]

_log = logging.getLogger(__name__)

_MANY = 256
"""Pictures of a side from which on they are kept and compared as bytes, a quarter of the memory."""
_SHOWN = 16
"""Of many pictures, as many are kept of a side for the report."""


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        prompts: taken in turn.
        rounds: timed calls of each side at each batch size.
        pictures: of each side for the gate, and at least as many as the largest batch.
        seed: of the first picture.
        profile: names of sides of which it is told where the time of a picture goes, after everything else.
        builders: sides that build at the same time. Each takes longer then, and all of them less.
    """

    prompts: Sequence[str]
    gate: Gate
    rounds: int = 9
    pictures: int = 4
    seed: int = 0
    profile: Sequence[str] = ()
    builders: int = 1

    def work(self, first: int, count: int) -> tuple[list[str], list[int]]:
        """Prompts and seeds of pictures `first` and on."""
        at = range(first, first + count)
        return [self.prompts[k % len(self.prompts)] for k in at], [self.seed + k for k in at]


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
        note: Callable[[], None] = lambda: None,
        arrangement: Arrangement | None = None,
        missing: Mapping[str, str] | None = None,
        keep: bool = True,
    ) -> None:
        """
        Args:
            sides: the first is what speed is compared with.
            steps: that base and refiner take.
            folder: for what sides build; what an earlier run built there is taken as it is, and no time is told for it.
            open_host: where a side is to run.
            note: called whenever `result` has more to tell, between measurements.
            arrangement: which sides are resident together; all are where None.
            missing: side -> why it cannot run on this machine; it is skipped.
            keep: what sides built; otherwise it makes room for the next group.
        """
        self._case = case
        self._plan = plan
        self._steps = steps
        self._open_host = open_host
        self._judges = judges or Judges()
        self._count = max(plan.pictures, *case.batches)
        self._tell = tell
        self._note = note
        self._keep = keep
        self._seconds: float | None = None
        self._reference: Lane | None = None
        missing = missing or {}
        present = [side for side in sides if side.name not in missing]
        self._eager_sides = eager_sides(present)
        self._pictures_only = pictures_only(case, present)
        self._eager: dict[str, Quality] = {}  # what eager PyTorch reaches, by dtype
        arrangement = arrangement or Arrangement.together(case, present)
        self._lanes = [
            Lane(spec, job_for(case, spec, device, folder), arrangement.batches.get(spec.name, ()))
            for spec in sides
        ]
        lanes = {lane.spec.name: lane for lane in self._lanes}
        self._groups = [[lanes[name] for name in group] for group in arrangement.groups]
        self._group_batches = arrangement.group_batches or [case.batches] * len(self._groups)
        for name, why in missing.items():
            lanes[name].end("skipped", why)
        for name, sizes in arrangement.lost.items():
            lanes[name].leave_out(sizes)
        for lane in self._lanes[1:]:  # the others are compared with the first, so that it takes every size
            if lane.spec.compiles_each_size and device == "cpu":
                lane.batches = lane.batches[:1]

    def measure(self) -> None:
        """Everything; sides are closed when it ends, however it ends."""
        begun = time.perf_counter()
        try:
            for k, group in enumerate(self._groups):
                self._measure_group(group, self._group_batches[k])
                later = self._groups[k + 1 :]
                for lane in group:
                    if not any(lane in other for other in later):
                        self._finish(lane)
                    elif lane not in later[0]:
                        lane.close()  # its memory is for the next group
        finally:
            for lane in self._lanes:
                lane.close()
            self._seconds = time.perf_counter() - begun

    @property
    def pictures(self) -> dict[str, Images]:
        """Of each side that made some, for the report."""
        made = {lane.spec.name: lane.images for lane in self._lanes if lane.images is not None}
        shown = self._count if self._count <= _MANY else _SHOWN
        return {name: unit(images[:shown]).astype(np.float32) for name, images in made.items()}

    def result(self) -> CaseResult:
        """What is known by now; a side that is out has no speed, but for batch sizes that it was through with."""
        return CaseResult(
            asdict(self._case),
            self._steps,
            self._plan.gate.name,
            self._reference.spec.name if self._reference else None,
            [lane.row(self._steps, self._plan.rounds, self._seconds_of_first(lane)) for lane in self._lanes],
            seconds=self._seconds,
            builders=self._plan.builders,
            prompts=hashlib.sha256("\n".join(self._plan.prompts).encode()).hexdigest()[:12],
            groups=[[lane.spec.name for lane in group] for group in self._groups],
            group_batches=[list(batches) for batches in self._group_batches],
        )

    def _seconds_of_first(self, lane: Lane) -> Mapping[int, list[float]]:
        """What a lane's speed is compared with, by batch size: the first side's rounds that were interleaved with its
        own, else as many of another time. Nothing where the first side's pictures fail, or a size failed midway."""
        first, rounds = self._lanes[0], self._plan.rounds
        if first.status not in ("measured", "failed"):
            return {}
        whole = {batch: runs[-rounds:] for batch, runs in first.runs.items() if len(runs) >= rounds}
        apart = {batch: [run.seconds for run in runs] for batch, runs in whole.items()}
        together = {
            batch
            for group, batches in zip(self._groups, self._group_batches, strict=True)
            if first in group and lane in group
            for batch in batches
        }
        return {b: lane.beside.get(b, []) if b in together else apart.get(b, []) for b in self._case.batches}

    def _measure_group(self, group: Sequence[Lane], batches: Sequence[int]) -> None:
        """Eager PyTorch goes first: the others are held against it, and need not be kept once they are judged."""
        # A side may have nothing to do here: one that is compiled for each size is measured at the first only.
        group = [lane for lane in group if lane.images is None or set(lane.batches) & set(batches)]
        eager = [lane for lane in group if lane.spec.name in self._eager_sides]
        for lane in eager:
            self._attempt(lane, self._begin)
        self._choose_reference(eager)
        for lane in eager:
            self._attempt(lane, self._judge)
            if lane.spec is self._pictures_only:
                lane.end("reference", "only its pictures are taken")
        self._note()
        self._build_all([lane for lane in group if lane not in eager])
        for lane in group:
            if lane not in eager:
                self._attempt(lane, self._begin)
                self._choose_reference([lane])
                self._attempt(lane, self._judge)
                self._note()
        for batch in batches:
            lanes = [lane for lane in group if lane.status == "measured" and batch in lane.batches]
            self._measure_batch(lanes, batch)
            self._note()

    def _attempt(self, lane: Lane, work: Callable[[Lane], None], where: str = "") -> None:
        """A side's failure is its own, and one that is out is not asked again."""
        if lane.status != "measured":
            return
        try:
            work(lane)
        except Exception as error:
            lane.end("failed", where + _first_line(error))
            self._tell(lane.spec.name, f"failed: {lane.reason}")

    def _build_all(self, lanes: Sequence[Lane]) -> None:
        todo = [lane for lane in lanes if lane.host is None and lane.images is None and lane.spec.builds]
        with ThreadPoolExecutor(self._plan.builders) as builders:
            try:
                for built in [builders.submit(self._attempt, lane, self._build) for lane in todo]:
                    built.result()
            except BaseException:  # Ctrl-C: what waits for a process goes on when that is gone
                builders.shutdown(wait=False, cancel_futures=True)
                for lane in todo:
                    lane.close()
                raise

    def _build(self, lane: Lane) -> None:
        lane.built_before = lane.job.is_built()
        if lane.built_before:
            return
        self._tell(lane.spec.name, "building")
        lane.build_seconds, _ = self._first_image(lane)
        lane.close()
        lane.job.note_built()

    def _begin(self, lane: Lane) -> None:
        if lane.host is not None:  # it stayed open after the group before
            return
        name = lane.spec.name
        if lane.images is not None:  # its process was closed for another group
            self._tell(name, "opening again")
            lane.host = self._open_host(lane.job)
            lane.host.open()
            lane.host.tune(lane.memory_format)
            return
        timed = lane.spec is not self._pictures_only
        if timed and lane.build_seconds is None:
            self._tell(name, "its files")
            self._first_image(lane)
            lane.close()
        self._tell(name, "first image")
        lane.first_image_seconds, first = self._first_image(lane)
        if timed:
            self._tell(name, "its best setting")
            lane.settings, lane.memory_format = self._host(lane).tune()
        kept = self._kept(first)
        images = np.empty((self._count, *kept.shape[1:]), kept.dtype)
        images[:1] = kept
        for k in range(1, self._count):
            self._tell(name, f"picture {k + 1} of {self._count}")
            images[k : k + 1] = self._kept(self._host(lane).run(*self._plan.work(k, 1)).images)
        lane.images = images  # all or none: of what was not made nobody is to be shown or judged by

    def _first_image(self, lane: Lane) -> tuple[float, Images]:
        """Seconds from before the process begins, and the picture."""
        begun = time.perf_counter()
        lane.host = self._open_host(lane.job)
        lane.settings = lane.host.open()
        first = lane.host.run(*self._plan.work(0, 1)).images
        return time.perf_counter() - begun, first

    def _kept(self, images: Images) -> Pictures:
        if self._count <= _MANY:
            return images
        if not np.isfinite(images).all():
            raise BenchmarkError("a picture is not finite")  # of which bytes would tell nothing
        return np.stack(as_bytes(images))

    def _choose_reference(self, lanes: Sequence[Lane]) -> None:
        """Eager PyTorch in float32 where it ran, else eager PyTorch, else the first side that did; never one whose
        pictures are not finite."""
        # One that was judged in an earlier group may have few of its pictures left.
        asked = [lane for lane in lanes if lane.status == "measured" and lane.quality is None]
        alive = [lane for lane in asked if lane.images is not None and np.isfinite(lane.images).all()]
        exact = [lane for lane in alive if lane.job.dtype == "float32"]
        self._reference = self._reference or next(iter([*exact, *alive]), None)
        for lane in alive:
            if lane.spec.name in self._eager_sides and lane.images is not None:
                found = likeness(lane.images, self._of_reference())
                self._eager[lane.job.dtype] = Quality(len(lane.images), *found)

    def _judge(self, lane: Lane) -> None:
        if lane.images is None or lane.quality is not None:
            return
        self._tell(lane.spec.name, "quality")
        prompts, _ = self._plan.work(0, self._count)
        # With no reference yet its pictures are not finite, and beside themselves they fail too.
        reference = lane.images if self._reference is None else self._of_reference()
        lane.quality = measure_quality(lane.images, reference, prompts, self._judges)
        if self._count > _MANY and lane is not self._reference:
            lane.images = lane.images[:_SHOWN].copy()
        self._require(lane, lane.quality, "")

    def _of_reference(self) -> Pictures:
        if self._reference is None or self._reference.images is None:
            raise AssertionError("a side that is judged has made pictures, and so there is a reference")
        return self._reference.images

    def _require(self, lane: Lane, quality: Quality, where: str) -> None:
        failures = self._plan.gate.judge(quality, lane.job.dtype, self._eager.get(lane.job.dtype))
        if failures:
            lane.end("invalid", where + ", ".join(failures))
            self._tell(lane.spec.name, f"invalid: {lane.reason}")

    def _measure_batch(self, lanes: Sequence[Lane], batch: int) -> None:
        first, where = self._lanes[0], f"batch {batch}: "
        beside: list[float] = []  # the first side's, in this group's rounds
        for lane in lanes:
            if lane is not first:
                lane.beside[batch] = beside
            self._attempt(lane, partial(self._warm_up, batch=batch), where)
        for round_ in range(self._plan.rounds):
            turn = round_ % len(lanes) if lanes else 0
            for lane in [*lanes[turn:], *lanes[:turn]]:
                self._attempt(lane, partial(self._time, batch=batch, round_=round_), where)
                if lane is first and lane.status == "measured":
                    beside.append(lane.runs[batch][-1].seconds)
                    first.beside.setdefault(batch, []).append(beside[-1])
        if first.status != "measured":  # it ended on the way
            beside.clear()

    def _warm_up(self, lane: Lane, batch: int) -> None:
        self._tell(lane.spec.name, f"batch {batch}: warm-up")
        work = self._plan.work(1_000_000, batch)
        self._host(lane).run(*work)
        lane.traces[batch] = _required(self._host(lane).run(*work, traced=True).trace)

    def _time(self, lane: Lane, batch: int, round_: int) -> None:
        self._tell(lane.spec.name, f"batch {batch}: round {round_ + 1} of {self._plan.rounds}")
        first = round_ * batch % (self._count - batch + 1)
        run = self._host(lane).run(*self._plan.work(first, batch))
        lane.runs.setdefault(batch, []).append(replace(run, images=run.images[:0]))
        self._compare(lane, batch, first, run.images)

    def _compare(self, lane: Lane, batch: int, first: int, made: Images) -> None:
        """Timed pictures are judged too: a side may be right alone and wrong in a batch."""
        found = likeness(self._kept(made), self._of_reference()[first : first + batch])
        before = lane.worst.get(batch, found)
        lane.worst[batch] = (min(found[0], before[0]), min(found[1], before[1]))
        if self._plan.gate.of_each_picture:
            self._require(lane, Quality(batch, *found), f"batch {batch}: ")

    def _finish(self, lane: Lane) -> None:
        """Its group is through."""
        if lane.spec.name in self._plan.profile:
            self._profile(lane)
        lane.close()
        if not self._keep:
            shutil.rmtree(lane.job.folder, ignore_errors=True)

    def _profile(self, lane: Lane) -> None:
        """In a process of its own; code that torch.compile made is not told apart by operators."""
        if lane.status != "measured" or lane.spec.compiles_each_size:
            return
        self._tell(lane.spec.name, "profile")
        lane.close()
        host = self._open_host(replace(lane.job, profiled=True))
        try:
            host.open()
            host.tune(lane.memory_format)  # as it was timed: tried out again, it may be the other one
            lane.profile = host.profile(*self._plan.work(0, 1))
        except Exception as error:  # its speed stands without it
            self._tell(lane.spec.name, f"no profile: {_first_line(error)}")
        finally:
            host.close()

    def _host(self, lane: Lane) -> Host:
        if lane.host is None:
            raise AssertionError("a side that is out is not asked")
        return lane.host


def _first_line(error: Exception) -> str:
    """What fits in a table; the log has the whole."""
    _log.info("a side failed", exc_info=error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c for c in lines[0] if c.isprintable())[:300]


def _required(trace: Trace | None) -> Trace:
    if trace is None:
        raise AssertionError("a traced run has a trace")
    return trace
