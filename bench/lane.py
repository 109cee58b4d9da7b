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
from .side import Images
from .stats import growth, ratio
from .worker import Job, Run, Trace

__all__ = ["Lane"]

_POINTS = 240
"""Of a memory series, at most, in the results."""


@dataclass(eq=False)
class Lane:
    """What is known of one side so far.

    Attributes:
        batches: the sizes that it is measured at.
        reason: why it is out, or why sizes are left out.
        beside: batch size -> seconds of the first side, in rounds interleaved with this one's.
    """

    spec: SideSpec
    job: Job
    batches: tuple[int, ...]
    host: Host | None = None
    settings: str = ""
    memory_format: str | None = None
    status: str = "measured"
    reason: str = ""
    built_before: bool = False
    build_seconds: float | None = None
    first_image_seconds: float | None = None
    images: Images | None = None
    quality: Quality | None = None
    runs: dict[int, list[Run]] = field(default_factory=dict)
    beside: dict[int, list[float]] = field(default_factory=dict)
    worst: dict[int, tuple[float, float]] = field(default_factory=dict)
    traces: dict[int, Trace] = field(default_factory=dict)
    profile: Profile | None = None

    def end(self, status: str, reason: str) -> None:
        """Mark it as failed; a second reason does not replace the first."""
        if self.status == "measured":
            self.status, self.reason = status, "; ".join(filter(None, [reason, self.reason]))
        self.close()

    def leave_out(self, sizes: Mapping[int, str]) -> None:
        """Leave out batch sizes that there is no room for, with the reason; without any left, the side has failed."""
        self.reason = "; ".join(f"batch {batch} {why}" for batch, why in sizes.items())
        if not self.batches:
            self.status = "skipped"

    def close(self) -> None:
        """End its process."""
        if self.host is not None:
            self.host.close()
            self.host = None

    def row(self, steps: Mapping[str, int], rounds: int, beside: Mapping[int, list[float]]) -> Row:
        """What is known by now.

        A side whose pictures are wrong, or were not looked at yet, has no speed. One that failed keeps the batch sizes
        that it was through with.

        Args:
            beside: batch size -> seconds of the side that speed is compared with.
        """
        known = {
            "measured": sorted(self.runs),
            "failed": [b for b in sorted(self.runs) if len(self.runs[b]) >= rounds],
        }
        sizes = known.get(self.status, []) if self.quality is not None else []
        told = self.quality is not None and (self.status == "measured" or bool(sizes))
        return Row(
            side=self.spec.name,
            dtype=self.job.dtype,
            settings=self.settings,
            status=self.status,
            reason=self.reason,
            built_before=self.built_before,
            build_seconds=self.build_seconds if told else None,
            first_image_seconds=self.first_image_seconds if told else None,
            quality=self.quality,
            batches=[self._figures(batch, steps, rounds, beside.get(batch, [])) for batch in sizes],
            profile=self.profile if told else None,
        )

    def _figures(
        self, batch: int, steps: Mapping[str, int], rounds: int, beside: list[float]
    ) -> BatchFigures:
        runs = self.runs[batch]
        seconds = [run.seconds for run in runs]
        paired = min(len(beside), len(seconds))  # an interruption may have come in the middle of a round
        joules = [run.joules / batch for run in runs if run.joules is not None]
        psnr, ssim = self.worst.get(batch, (float("nan"), float("nan")))
        return BatchFigures(
            batch=batch,
            seconds=seconds,
            speedup=ratio(beside[:paired], seconds[:paired]) if paired else None,
            images_per_second=batch / median(seconds),
            stages=_stages(runs, steps),
            psnr=psnr,
            ssim=ssim,
            # Of the last process: the first side has one for each group that it is not resident between.
            memory=_memory(self.traces.get(batch), [run.memory for run in runs[-rounds:]], batch),
            joules_per_image=median(joules) if len(joules) == len(runs) else None,
            busy_elsewhere=[round(run.busy_elsewhere, 2) for run in runs],
            gpu=[run.gpu for run in runs],
            beside=beside[:paired],
        )


def _stages(runs: Sequence[Run], steps: Mapping[str, int]) -> dict[str, float]:
    names = dict.fromkeys(name for run in runs for name in run.stages)
    found = {name: median(run.stages.get(name, 0.0) for run in runs) for name in names}
    for name, count in steps.items():
        if name in found and count:
            found[f"{name}_step"] = found[name] / count
    return found


def _memory(trace: Trace | None, after: Sequence[Mapping[str, float]], batch: int) -> Memory | None:
    """`after` has the bytes after each run, by kind."""
    if trace is None:
        return None
    count = len(trace.series["seconds"])
    # The largest of a few neighbours, so that thinning out hides no peak.
    step = -(-count // _POINTS)
    series = {
        name: [max(values[k : k + step]) for k in range(0, count, step)]
        for name, values in trace.series.items()
    }
    kinds = [kind for kind in after[0] if all(kind in memory for memory in after)]
    grown = {kind: growth([memory[kind] for memory in after]) / batch for kind in kinds}
    at_rest = {kind: median(memory[kind] for memory in after) for kind in kinds}
    return Memory(trace.peaks, trace.by_stage, series, trace.stages, at_rest, grown)
