"""The state of one side while its case is measured, and its row in the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from .cases import SideSpec
from .gates import Quality
from .host import Host
from .profile import Profile
from .results import BatchFigures, Memory, Row
from .side import Images, Layout
from .stats import growth, ratio
from .worker import Job, Run, Trace

__all__ = ["SideRun"]

_MAX_SAMPLES = 240
"""Maximum length of a memory series in the results."""


@dataclass(eq=False)
class SideRun:
    """What is known of one side so far.

    Attributes:
        batches: the batch sizes that it is measured at.
        host: the process that it is loaded in; None while it is not loaded.
        status: see `results.Row`.
        reason: why it is not measured, or why batch sizes are skipped.
        images: its pictures for the quality gate.
        runs: batch size -> its timed calls.
        baseline_seconds: batch size -> seconds of the first side, in the rounds that were interleaved with this one's.
        worst_likeness: batch size -> the lowest PSNR and SSIM of its timed pictures.
        traces: batch size -> its memory during one call.
    """

    spec: SideSpec
    job: Job
    batches: tuple[int, ...]
    host: Host | None = None
    settings: str = ""
    layout: Layout | None = None
    status: str = "measured"
    reason: str = ""
    built_before: bool = False
    build_seconds: float | None = None
    first_image_seconds: float | None = None
    images: Images | None = None
    quality: Quality | None = None
    runs: dict[int, list[Run]] = field(default_factory=dict)
    baseline_seconds: dict[int, list[float]] = field(default_factory=dict)
    worst_likeness: dict[int, tuple[float, float]] = field(default_factory=dict)
    traces: dict[int, Trace] = field(default_factory=dict)
    profile: Profile | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    def stop(self, status: str, reason: str) -> None:
        """Measure it no further. The first status is final: a later one does not replace it."""
        if self.status == "measured":
            self.status, self.reason = status, "; ".join(filter(None, [reason, self.reason]))
        self.close()

    def skip_batches(self, reasons: Mapping[int, str]) -> None:
        """Report why batch sizes are skipped. If none remain, the whole side is."""
        self.reason = "; ".join(f"batch {batch} {reason}" for batch, reason in reasons.items())
        if not self.batches:
            self.status = "skipped"

    def close(self) -> None:
        """End its process."""
        if self.host is not None:
            self.host.close()
            self.host = None

    def row(self, steps: Mapping[str, int], rounds: int, baseline: Mapping[int, list[float]]) -> Row:
        """What is known by now.

        A side has no speed while its pictures have not been checked, or if they are wrong. A side that failed keeps
        the batch sizes that were complete.

        Args:
            steps: stage -> how many steps it takes.
            baseline: batch size -> seconds of the side that speed is compared with.
        """
        batches_by_status = {
            "measured": sorted(self.runs),
            "failed": [b for b in sorted(self.runs) if len(self.runs[b]) >= rounds],
        }
        batches = batches_by_status.get(self.status, []) if self.quality is not None else []
        has_times = self.quality is not None and (self.status == "measured" or bool(batches))
        return Row(
            side=self.name,
            dtype=self.job.dtype,
            settings=self.settings,
            status=self.status,
            reason=self.reason,
            built_before=self.built_before,
            build_seconds=self.build_seconds if has_times else None,
            first_image_seconds=self.first_image_seconds if has_times else None,
            quality=self.quality,
            batches=[self._figures(batch, steps, rounds, baseline.get(batch, [])) for batch in batches],
            profile=self.profile if has_times else None,
        )

    def _figures(
        self, batch: int, steps: Mapping[str, int], rounds: int, baseline: list[float]
    ) -> BatchFigures:
        runs = self.runs[batch]
        seconds = [run.seconds for run in runs]
        # An interruption may have come in the middle of a round.
        paired = min(len(baseline), len(seconds))
        joules = [run.joules / batch for run in runs if run.joules is not None]
        psnr, ssim = self.worst_likeness.get(batch, (float("nan"), float("nan")))
        return BatchFigures(
            batch=batch,
            seconds=seconds,
            speedup=ratio(baseline[:paired], seconds[:paired]) if paired else None,
            images_per_second=batch / median(seconds),
            stages=_stages(runs, steps),
            psnr=psnr,
            ssim=ssim,
            # Only the last process counts: the first side has one for each group in which it was opened again.
            memory=_memory(self.traces.get(batch), [run.memory for run in runs[-rounds:]], batch),
            joules_per_image=median(joules) if len(joules) == len(runs) else None,
            busy_elsewhere=[round(run.busy_elsewhere, 2) for run in runs],
            gpu=[run.gpu for run in runs],
            beside=baseline[:paired],
        )


def _stages(runs: Sequence[Run], steps: Mapping[str, int]) -> dict[str, float]:
    """Stage -> median seconds, and `STAGE_step` -> seconds of one step."""
    names = dict.fromkeys(name for run in runs for name in run.stages)
    stages = {name: median(run.stages.get(name, 0.0) for run in runs) for name in names}
    for name, count in steps.items():
        if name in stages and count:
            stages[f"{name}_step"] = stages[name] / count
    return stages


def _memory(trace: Trace | None, at_rest: Sequence[Mapping[str, float]], batch: int) -> Memory | None:
    """`at_rest` has the bytes after each run, by kind."""
    if trace is None:
        return None
    count = len(trace.series["seconds"])
    # Each kept sample is the largest of its neighbours, so that thinning hides no peak.
    step = -(-count // _MAX_SAMPLES)
    series = {
        name: [max(values[k : k + step]) for k in range(0, count, step)]
        for name, values in trace.series.items()
    }
    kinds = [kind for kind in at_rest[0] if all(kind in memory for memory in at_rest)]
    return Memory(
        trace.peaks,
        trace.by_stage,
        series,
        trace.stages,
        at_rest={kind: median(memory[kind] for memory in at_rest) for kind in kinds},
        growths={kind: growth([memory[kind] for memory in at_rest]) / batch for kind in kinds},
    )
