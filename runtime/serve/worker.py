"""What the thread that owns the device does: one call after the other, and smaller ones when a call fails."""

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
    """The outcome of one call.

    Attributes:
        images: number of images in the batch.
        size: their (height, width).
        steps: steps taken.
        cost: work of the whole call, in the unit of `Group.cost`.
        seconds: duration of the call.
        outcome: "made", "abandoned" (all of its jobs had ended), "out of memory", "refused" (a RequestError) or
            "failed".
        timings: seconds of each stage; empty unless the outcome is "made".
        waited: seconds that each of its images had waited in the queue.
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
    """Every job of the batch has ended, so nothing more is wanted of it."""


class Worker:
    """Calls the runner. `make` and `prove` are for one thread; what they report is posted to the event loop."""

    def __init__(
        self,
        runner: Runner,
        loop: asyncio.AbstractEventLoop,
        *,
        on_batch: Callable[[BatchReport], None],
        on_limit: Callable[[tuple[int, int], int], None],
        formable: Callable[[int], int] = lambda images: images,
    ) -> None:
        """
        Args:
            on_batch: called in the event loop after each call.
            on_limit: called there with a size and the number of its images that a call may have, after a larger call
                ran out of memory or had no engine.
            formable: the largest number of images, up to a given one, that a call may have.
        """
        self._runner = runner
        self._tell = loop.call_soon_threadsafe
        self._on_batch = on_batch
        self._on_limit = on_limit
        self._formable = formable

    def make(self, jobs: Sequence[Job]) -> None:
        """Generate those images of one group that are still wanted, in calls of sizes that are formed. A batch that
        fails is divided: in halves if memory ran out or no engine was built for it, and otherwise into single images.
        """
        while live := [job for job in jobs if not job.ended]:
            images = self._formable(len(live))
            self._make(live[:images])
            jobs = live[images:]

    def _make(self, live: Sequence[Job]) -> None:
        """One call, and where it fails several smaller ones."""
        error = self._call(live)
        if error is None:
            return
        if len(live) == 1:
            if is_out_of_memory(error):
                _log.warning("out of memory for one image of %dx%d: %s", *live[0].group.size[::-1], error)
            self._tell(live[0].finish, error)
            return
        half = self._formable((len(live) + 1) // 2)
        parts = [[job] for job in live]  # so that a request that fails, fails alone
        if is_out_of_memory(error) or isinstance(error, EngineSizeError):
            size = live[0].group.size
            why = "out of memory" if is_out_of_memory(error) else "no engine was built"
            details = (why, len(live), size[1], size[0], half, error)
            _log.warning("%s for a batch of %d images of %dx%d; the limit is now %d: %r", *details)
            self._tell(self._on_limit, size, half)
            parts = [list(live[k : k + half]) for k in range(0, len(live), half)]
        for part in parts:
            self.make(part)

    def prove(self) -> None:
        """Generate a self-test image, to see whether the device still works. If memory runs out, that says nothing of
        the device, and is logged.

        Raises:
            Exception: the device does not work any more.
        """
        try:
            self._runner.warm_up()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("the self-test image ran out of memory: %s", error)
        else:
            return
        release_memory()

    def _call(self, jobs: Sequence[Job]) -> Exception | None:
        """Call the runner once.

        Returns:
            the error it ended with, without tracebacks: their frames hold tensors.
        """
        begun = time.perf_counter()
        steps = 0

        def on_step(done: int, preview: Callable[[int], PIL.Image.Image] | None) -> None:
            nonlocal steps
            steps = done
            if all(job.ended for job in jobs):
                raise _AbandonedError
            for k, job in enumerate(jobs):
                if not job.ended:
                    picture = preview(k) if job.request.previews and preview is not None else None
                    self._tell(job.progress, Progress(done, job.request.steps, picture))

        failure: Exception | None = None
        timings: dict[str, float] = {}
        outcome = "made"
        try:
            results = self._runner.run([job.request for job in jobs], on_step)
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
    """The outcome of a call that ended with this error."""
    if is_out_of_memory(error):
        return "out of memory"
    return "refused" if isinstance(error, RequestError) else "failed"
