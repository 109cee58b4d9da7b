"""The thread that owns the device: one call after the other, and what to do when a call goes wrong."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import PIL.Image

from ...errors import EngineSizeError, LatentRTError, RequestError
from ..budget import without_frames
from ..place import release_memory
from .jobs import Job
from .requests import Progress
from .runner import Runner, is_out_of_memory

__all__ = ["BatchReport", "Worker"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchReport:
    """What became of one call.

    Attributes:
        images: in the batch.
        size: their (height, width).
        steps: taken.
        cost: work of the whole call, in the unit of `Group.cost`.
        seconds: it took.
        outcome: "made", "abandoned" (all had left), "out of memory", "refused" (a RequestError) or "failed".
        timings: seconds of each stage; empty where it was not made.
        waited: seconds that each of its images had waited.
    """

    images: int
    size: tuple[int, int]
    steps: int
    cost: float
    seconds: float
    outcome: str
    timings: dict[str, float]
    waited: tuple[float, ...] = ()


class _AbandonedError(Exception):
    """Everyone has left the batch."""


class Worker:
    """Calls the runner. `make` is for one thread; jobs hear of it in the event loop."""

    def __init__(
        self,
        runner: Runner,
        loop: asyncio.AbstractEventLoop,
        *,
        on_batch: Callable[[BatchReport], None],
        on_limit: Callable[[tuple[int, int], int], None],
    ) -> None:
        """Both are called in the loop: after each call, and when a size was found to fit only so many at once."""
        self._runner = runner
        self._tell = loop.call_soon_threadsafe
        self._on_batch = on_batch
        self._on_limit = on_limit

    def make(self, jobs: Sequence[Job]) -> None:
        """Make the images of one group that are still wanted; on trouble in smaller batches, and at last each alone."""
        live = [job for job in jobs if not job.left]
        if not live:
            return
        error = self._call(live)
        if error is None:
            return
        if len(live) == 1:
            if is_out_of_memory(error):
                _log.warning(
                    "memory did not suffice for one image of %dx%d: %s", *live[0].group.size[::-1], error
                )
            self._tell(live[0].finish, error)
            return
        half = (len(live) + 1) // 2
        parts = [[job] for job in live]  # a fault shows alone whose it is
        if is_out_of_memory(error) or isinstance(error, EngineSizeError):
            size = live[0].group.size
            why = "memory did not suffice" if is_out_of_memory(error) else "no engine was built"
            details = (why, len(live), size[1], size[0], half, error)
            _log.warning("%s for %d images of %dx%d; from now on %d at once: %r", *details)
            self._tell(self._on_limit, size, half)
            parts = [live[:half], live[half:]]
        for part in parts:
            self.make(part)

    def prove(self) -> None:
        """Make an image of the engine's own. Where memory does not suffice for it now that shows nothing.

        Raises:
            Exception: what the device does not recover from.
        """
        try:
            self._runner.warm_up()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("memory did not suffice for an image of the engine's own: %s", error)
        else:
            return
        release_memory()

    def _call(self, jobs: Sequence[Job]) -> Exception | None:
        """One call of the runner. The error it ended with holds no frames, and so none of their tensors."""
        begun = time.perf_counter()
        steps = 0

        def on_step(done: int, preview: Callable[[int], PIL.Image.Image] | None) -> None:
            nonlocal steps
            steps = done
            if all(job.left for job in jobs):
                raise _AbandonedError
            for k, job in enumerate(jobs):
                if not job.left:
                    picture = preview(k) if job.previews and preview is not None else None
                    self._tell(job.progress, Progress(done, job.request.steps, picture))

        failure: Exception | None = None
        timings: dict[str, float] = {}
        outcome = "made"
        try:
            requests = [replace(job.request, previews=job.previews) for job in jobs]
            results = self._runner.run(requests, on_step)
        except _AbandonedError:
            outcome = "abandoned"
        except Exception as error:
            outcome = _outcome(error)
            if not isinstance(error, LatentRTError) and outcome == "failed":
                _log.exception("a call for %d images failed", len(jobs))
            failure = without_frames(error)
        else:
            timings = dict(results[0].timings)
            for job, result in zip(jobs, results, strict=True):
                self._tell(
                    job.finish, replace(result, timings={"queue": job.waited or 0.0, **result.timings})
                )
        if outcome == "out of memory":
            release_memory()
        cost = sum(job.group.cost for job in jobs)
        seconds = time.perf_counter() - begun
        waited = tuple(job.waited or 0.0 for job in jobs)
        size = jobs[0].group.size
        report = BatchReport(len(jobs), size, steps, cost, seconds, outcome, timings, waited)
        self._tell(self._on_batch, report)
        return failure


def _outcome(error: Exception) -> str:
    """What became of a call that ended with it."""
    if is_out_of_memory(error):
        return "out of memory"
    return "refused" if isinstance(error, RequestError) else "failed"
