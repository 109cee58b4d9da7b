"""How a case is measured: first the pictures of each side, then, in turns, the times of the sides that pass the gate.

    each side alone     a process that builds, or only reads the files once -> a cold process -> its first picture ->
                        its best settings; this process stays open. A reference in another dtype than the case's
                        generates its pictures in one process, and is not timed
    pictures            the same prompts and seeds for each side, one by one, compared with the reference's; the gate
    each batch size     a warm-up, a run with memory sampled, then rounds: A B C, B C A, C A B, ...; after a round, its
                        pictures are compared with those that the reference generated one by one from the same seeds

If not all sides fit in memory together, this is done for one group after another (see `grouping`). A side that is
measured without the first one, at all batch sizes or at the larger ones, is not interleaved with it there: its speedup
compares rounds at different times, and is marked so.

A side that fails is reported with the reason, and the others go on. Results are available at any time.
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

from .cases import Case, SideSpec, eager_sides, pictures_only
from .features import MetricNetworks
from .gates import Gate
from .grouping import Grouping
from .host import Host, job_for
from .judging import Judge
from .results import CaseResult
from .side import Images
from .side_run import SideRun
from .worker import Job, Run, Trace

__all__ = ["CaseRun", "Plan"]

_log = logging.getLogger(__name__)

_WARM_UP_PICTURE = 1_000_000
"""Number of a picture that nothing else generates."""


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        prompts: used in turn.
        rounds: timed calls of each side at each batch size.
        pictures: of each side for the gate; at least as many as the largest batch are generated.
        seed: of the first picture.
        profile: names of sides that are profiled, after everything else.
        builders: sides that build at the same time. Each of them takes longer then, but all together take less.
    """

    prompts: Sequence[str]
    gate: Gate
    rounds: int = 9
    pictures: int = 4
    seed: int = 0
    profile: Sequence[str] = ()
    builders: int = 1

    def inputs(self, first: int, count: int) -> tuple[list[str], list[int]]:
        """Prompts and seeds of `count` pictures, from number `first` on."""
        numbers = range(first, first + count)
        return [self.prompts[k % len(self.prompts)] for k in numbers], [self.seed + k for k in numbers]


OnProgress = Callable[[str, str], None]
"""Called with (side, what it is doing), for a live table."""


class CaseRun:
    """One case. `measure` fills it; `result` can be called at any time, also after an interruption."""

    def __init__(
        self,
        case: Case,
        specs: Sequence[SideSpec],
        plan: Plan,
        *,
        steps: dict[str, int],
        device: str,
        folder: Path,
        open_host: Callable[[Job], Host],
        networks: MetricNetworks | None = None,
        on_progress: OnProgress = lambda side, state: None,
        on_result: Callable[[], None] = lambda: None,
        grouping: Grouping | None = None,
        unavailable: Mapping[str, str] | None = None,
        keep_builds: bool = True,
    ) -> None:
        """
        Args:
            specs: the sides; the first is the one that speed is compared with.
            steps: that base and refiner take.
            folder: for what sides build. What an earlier run built there is used, and has no build time.
            open_host: gives the place in which a side is loaded.
            on_result: called whenever `result` has changed, between measurements.
            grouping: which sides are resident together; all of them if None.
            unavailable: side -> why it cannot run on this machine; it is skipped.
            keep_builds: leave what sides built on disk. Otherwise it is removed after their last group.
        """
        self._case = case
        self._plan = plan
        self._steps = steps
        self._open_host = open_host
        self._picture_count = max(plan.pictures, *case.batches)
        self._on_progress = on_progress
        self._on_result = on_result
        self._keep_builds = keep_builds
        self._seconds: float | None = None
        unavailable = unavailable or {}
        available = [spec for spec in specs if spec.name not in unavailable]
        self._eager_sides = eager_sides(available)
        self._pictures_only = pictures_only(case, available)
        prompts, _ = plan.inputs(0, self._picture_count)
        self._judge = Judge(plan.gate, networks or MetricNetworks(), prompts, self._eager_sides)
        grouping = grouping or Grouping.together(case, available)
        self._sides = [
            SideRun(spec, job_for(case, spec, device, folder), grouping.batches.get(spec.name, ()))
            for spec in specs
        ]
        sides = {side.name: side for side in self._sides}
        self._groups = [([sides[name] for name in group.sides], group.batches) for group in grouping.groups]
        for name, reason in unavailable.items():
            sides[name].stop("skipped", reason)
        for name, reasons in grouping.skipped.items():
            sides[name].skip_batches(reasons)
        # Not the first side: the others are compared with it at every size.
        for side in self._sides[1:]:
            if side.spec.compiles_each_size and device == "cpu":
                side.batches = side.batches[:1]

    def measure(self) -> None:
        """Measure everything. All sides are closed at the end, also after an error."""
        started = time.perf_counter()
        try:
            for k, (group, batches) in enumerate(self._groups):
                self._measure_group(group, batches)
                later = [sides for sides, _ in self._groups[k + 1 :]]
                for side in group:
                    if not any(side in sides for sides in later):
                        self._finish(side)
                    elif side not in later[0]:
                        side.close()  # the next group needs its memory
        finally:
            for side in self._sides:
                side.close()
            self._seconds = time.perf_counter() - started

    @property
    def pictures(self) -> dict[str, Images]:
        """Side -> its pictures for the report; sides without any are missing."""
        return {side.name: self._judge.shown(side.images) for side in self._sides if side.images is not None}

    def result(self) -> CaseResult:
        """What is known by now. A side that failed has no speed, except at batch sizes that were complete."""
        rounds = self._plan.rounds
        return CaseResult(
            asdict(self._case),
            self._steps,
            self._plan.gate.name,
            self._judge.reference.name if self._judge.reference else None,
            [side.row(self._steps, rounds, self._baseline_seconds(side)) for side in self._sides],
            seconds=self._seconds,
            builders=self._plan.builders,
            prompts=hashlib.sha256("\n".join(self._plan.prompts).encode()).hexdigest()[:12],
            groups=[[side.name for side in group] for group, _ in self._groups],
            group_batches=[list(batches) for _, batches in self._groups],
        )

    def _baseline_seconds(self, side: SideRun) -> Mapping[int, list[float]]:
        """Batch size -> the first side's seconds that a side's speed is compared with.

        These are the rounds that were interleaved with the side's own, or else as many rounds of another time. There
        are none if the first side's pictures fail, or if it failed in the middle of a batch size.
        """
        first, rounds = self._sides[0], self._plan.rounds
        if first.status not in ("measured", "failed"):
            return {}
        interleaved_at = {
            batch for group, batches in self._groups if first in group and side in group for batch in batches
        }
        other_rounds = {
            batch: [run.seconds for run in runs[-rounds:]]
            for batch, runs in first.runs.items()
            if len(runs) >= rounds
        }
        return {
            b: (side.baseline_seconds if b in interleaved_at else other_rounds).get(b, [])
            for b in self._case.batches
        }

    def _measure_group(self, group: Sequence[SideRun], batches: Sequence[int]) -> None:
        """Eager PyTorch goes first, since the others are compared with it."""
        # A side may have nothing to do here: one that is compiled for each size is measured at the first only.
        group = [side for side in group if side.images is None or set(side.batches) & set(batches)]
        eager = [side for side in group if side.name in self._eager_sides]
        for side in eager:
            self._attempt(side, self._open)
        self._judge.choose_reference(eager)
        for side in eager:
            self._attempt(side, self._judge_pictures)
            if side.spec is self._pictures_only:
                side.stop("reference", "only its pictures are taken")
        self._on_result()
        self._build_all([side for side in group if side not in eager])
        for side in group:
            if side not in eager:
                self._attempt(side, self._open)
                self._judge.choose_reference([side])
                self._attempt(side, self._judge_pictures)
                self._on_result()
        for batch in batches:
            sides = [side for side in group if side.status == "measured" and batch in side.batches]
            self._measure_batch(sides, batch)
            self._on_result()

    def _attempt(self, side: SideRun, action: Callable[[SideRun], None], where: str = "") -> None:
        """Run an action on a side. If it raises, only this side has failed; a failed side is not run again."""
        if side.status != "measured":
            return
        try:
            action(side)
        except Exception as error:
            side.stop("failed", where + _first_line(error))
            self._on_progress(side.name, f"failed: {side.reason}")

    def _build_all(self, sides: Sequence[SideRun]) -> None:
        to_build = [side for side in sides if side.host is None and side.images is None and side.spec.builds]
        with ThreadPoolExecutor(self._plan.builders) as builders:
            try:
                for future in [builders.submit(self._attempt, side, self._build) for side in to_build]:
                    future.result()
            except BaseException:  # Ctrl-C: threads that wait for a process end when the process has ended
                builders.shutdown(wait=False, cancel_futures=True)
                for side in to_build:
                    side.close()
                raise

    def _build(self, side: SideRun) -> None:
        side.built_before = side.job.is_built()
        if side.built_before:
            return
        self._on_progress(side.name, "building")
        side.build_seconds, _ = self._first_image(side)
        side.close()
        side.job.note_built()

    def _open(self, side: SideRun) -> None:
        """Load a side and, the first time, generate its pictures."""
        if side.host is not None:  # still open from the previous group
            return
        if side.images is not None:  # it was closed for another group
            self._on_progress(side.name, "opening again")
            side.host = self._open_host(side.job)
            side.host.open()
            side.host.tune(side.layout)
            return
        timed = side.spec is not self._pictures_only
        if timed and side.build_seconds is None:
            self._on_progress(side.name, "its files")
            self._first_image(side)
            side.close()
        self._on_progress(side.name, "first image")
        side.first_image_seconds, first = self._first_image(side)
        if timed:
            self._on_progress(side.name, "its best setting")
            side.settings, side.layout = self._host(side).tune()
        compact = self._judge.compact(first)
        images = np.empty((self._picture_count, *compact.shape[1:]), compact.dtype)
        images[:1] = compact
        for k in range(1, self._picture_count):
            self._on_progress(side.name, f"picture {k + 1} of {self._picture_count}")
            images[k : k + 1] = self._judge.compact(self._host(side).run(*self._plan.inputs(k, 1)).images)
        # Set only when complete, so that a side which fails midway has no pictures.
        side.images = images

    def _first_image(self, side: SideRun) -> tuple[float, Images]:
        """Seconds from before the process starts until the picture is there, and the picture."""
        started = time.perf_counter()
        side.host = self._open_host(side.job)
        side.settings = side.host.open()
        first = side.host.run(*self._plan.inputs(0, 1)).images
        return time.perf_counter() - started, first

    def _judge_pictures(self, side: SideRun) -> None:
        if side.images is not None and side.quality is None:
            self._on_progress(side.name, "quality")
            self._stop_invalid(side, self._judge.failures(side, side.images), "")

    def _stop_invalid(self, side: SideRun, failures: Sequence[str], where: str) -> None:
        if failures:
            side.stop("invalid", where + ", ".join(failures))
            self._on_progress(side.name, f"invalid: {side.reason}")

    def _measure_batch(self, sides: Sequence[SideRun], batch: int) -> None:
        first, where = self._sides[0], f"batch {batch}: "
        # The first side's seconds in this group's rounds; all sides of the group share the list.
        baseline: list[float] = []
        for side in sides:
            if side is not first:
                side.baseline_seconds[batch] = baseline
            self._attempt(side, partial(self._warm_up, batch=batch), where)
        for round_ in range(self._plan.rounds):
            turn = round_ % len(sides) if sides else 0
            self._measure_round([*sides[turn:], *sides[:turn]], batch, round_, baseline)
        if first.status != "measured":  # it failed in one of these rounds
            baseline.clear()

    def _warm_up(self, side: SideRun, batch: int) -> None:
        self._on_progress(side.name, f"batch {batch}: warm-up")
        inputs = self._plan.inputs(_WARM_UP_PICTURE, batch)
        self._host(side).run(*inputs)
        side.traces[batch] = _required(self._host(side).run(*inputs, traced=True).trace)

    def _measure_round(
        self, sides: Sequence[SideRun], batch: int, round_: int, baseline: list[float]
    ) -> None:
        """Time a call of each side, then check their pictures: in between, the GPU would wait and cool down."""
        where = f"batch {batch}: "
        first = round_ * batch % (self._picture_count - batch + 1)
        runs: dict[SideRun, Run] = {}

        def time_call(side: SideRun) -> None:
            self._on_progress(side.name, f"{where}round {round_ + 1} of {self._plan.rounds}")
            runs[side] = self._host(side).run(*self._plan.inputs(first, batch))

        try:
            for side in sides:
                self._attempt(side, time_call, where)
        finally:  # after Ctrl-C, too, what was timed counts once it is checked
            for side, run in runs.items():
                self._attempt(side, partial(self._check_run, run=run, batch=batch, first=first), where)
                if side is self._sides[0] and side.status == "measured":
                    baseline.append(run.seconds)
                    side.baseline_seconds.setdefault(batch, []).append(run.seconds)

    def _check_run(self, side: SideRun, run: Run, batch: int, first: int) -> None:
        failures = self._judge.failures_while_timed(side, run.images, batch, first)
        self._stop_invalid(side, failures, f"batch {batch}: ")
        if side.status == "measured":
            side.runs.setdefault(batch, []).append(replace(run, images=run.images[:0]))

    def _finish(self, side: SideRun) -> None:
        """After the last group of a side."""
        if side.name in self._plan.profile:
            self._profile(side)
        side.close()
        if not self._keep_builds:
            shutil.rmtree(side.job.folder, ignore_errors=True)

    def _profile(self, side: SideRun) -> None:
        """Profile a side in a process of its own. Code that torch.compile made has no separate operators."""
        if side.status != "measured" or side.spec.compiles_each_size:
            return
        self._on_progress(side.name, "profile")
        side.close()
        host = self._open_host(replace(side.job, profiled=True))
        try:
            host.open()
            # In the layout that was timed: another trial could choose another one.
            host.tune(side.layout)
            side.profile = host.profile(*self._plan.inputs(0, 1))
        except Exception as error:  # its speed is valid without a profile
            self._on_progress(side.name, f"no profile: {_first_line(error)}")
        finally:
            host.close()

    def _host(self, side: SideRun) -> Host:
        if side.host is None:
            raise AssertionError("a side that is not loaded cannot run")
        return side.host


def _first_line(error: Exception) -> str:
    """The part of the message that fits in a table; all of it is logged."""
    _log.info("a side failed", exc_info=error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(c for c in lines[0] if c.isprintable())[:300]


def _required(trace: Trace | None) -> Trace:
    if trace is None:
        raise AssertionError("a traced run has a trace")
    return trace
