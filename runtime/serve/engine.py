"""The engine in process: requests in from an event loop, batches out to the one thread that owns the device."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from ...errors import DrainingError, RequestError, ServiceError, StoppedError
from ..checks import check_flag, check_integer, check_number
from ..pipeline import Pipeline
from .admission import Admission
from .jobs import Job
from .requests import Finished, ImageRequest, ImageResult, Progress
from .runner import PipelineRunner, Runner
from .scheduler import Scheduler
from .worker import BatchReport, Worker

__all__ = ["AsyncEngine", "submit_to"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_FAULTS = 3
"""Calls that fail, and none between them that makes an image, before one of the engine's own shows whether the device
still works."""
_LAST_STEP = 10.0
"""Seconds for the device to come to the end of a step that nobody waits for."""


class AsyncEngine:
    """Makes images for many at once. `async with` loads the models on entry and drains on exit.

    Requests that can share a call are batched, and each gets the image it would get alone. One that fails, fails
    alone; a batch for which memory does not suffice, or no engine was built, is made in halves. For one event loop and
    its thread.

    Where each batch size is captured, as on a GPU, only batches of 1, 2, 4, ... and `max_batch` images are formed, so
    that few have to be warmed up, for every kind of request that comes. Three requests are then a batch of two and one
    of one: the first two are done earlier, the third when a batch of three would be, or a little later. Elsewhere
    batches of any size are formed, and only one image is made beforehand.
    """

    def __init__(
        self,
        pipe: Pipeline | Runner,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        window: float = 0.01,
        on_batch: Callable[[BatchReport], None] | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            pipe: a pipeline; calls from elsewhere would share the device with the engine's.
            max_batch: images in a call at the most.
            max_waiting: images that may wait; beyond it requests are refused.
            window: seconds a request may wait for company while the device is idle.
            on_batch: called with a report of every call, in the event loop.

        Raises:
            RequestError: one of them is of another type, or too small.
        """
        if not isinstance(pipe, (Pipeline, Runner)):
            raise RequestError(f"pipe is {pipe!r}; give what Pipeline.from_pretrained returns")
        check_integer("max_batch", max_batch, 1, None)
        check_integer("max_waiting", max_waiting, 1, None)
        check_number("window", window, 0, math.inf)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner = PipelineRunner(pipe) if isinstance(pipe, Pipeline) else pipe
        batches = _powers_of_two(max_batch) if self._runner.captures else ()
        self._warm = batches or (1,)
        self._queue: Scheduler[Job] = Scheduler(max_batch=max_batch, window=window, batches=batches)
        self._on_batch = on_batch
        self._thread = ThreadPoolExecutor(1, "latentrt-engine")
        self._wake = asyncio.Event()
        self._running: list[Job] = []
        self._draining = False
        self._call: Future[None] | None = None  # the last one, in the thread
        self._serving: asyncio.Task[None] | None = None
        self._failure: StoppedError | None = None
        self._admission = Admission(self._queue, max_waiting=max_waiting)
        self._reports: list[BatchReport] = []  # of the running batch: one call, or several where it fails
        self._faults = 0

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, error: type[BaseException] | None, *_: object) -> None:
        await self.drain(None if error is None else 0)

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Images being made for which somebody waits."""
        return sum(not job.ended for job in self._running)

    @property
    def draining(self) -> bool:
        """Whether it is shutting down and takes nothing new."""
        return self._draining

    @property
    def failure(self) -> StoppedError | None:
        """Why it stopped, where a fault of its own ended it; it takes nothing any more."""
        return self._failure

    @property
    def at_work(self) -> bool:
        """Whether its thread is at a call, for whomever: even after a drain, where that was not given the time."""
        return self._call is not None and not self._call.done()

    async def start(self) -> None:
        """Load the models, make an image, and one batch of each size that is formed where that is captured, and begin
        to serve.

        Raises:
            LatentRTError: a model cannot be loaded or run.
            ServiceError: it was started or drained before.
        """
        if self._loop is not None or self._draining:
            raise ServiceError(
                "an engine serves once; make a new AsyncEngine, with the same pipeline if you like"
            )
        loop = self._loop = asyncio.get_running_loop()
        try:
            await self._in_thread(self._runner.warm_up, self._warm)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        worker = Worker(
            self._runner,
            loop,
            on_batch=self._learn,
            on_limit=self._queue.limit,
            formable=self._queue.formable,
        )
        self._serving = loop.create_task(self._serve(worker), name="latentrt-engine")
        self._serving.add_done_callback(self._stopped)

    def submit(
        self,
        *requests: ImageRequest,
        timeout: float | None = None,
        previews: bool = False,
        again: bool = False,
    ) -> list[Job]:
        """Take requests, all of them or none.

        Args:
            timeout: seconds from now until each must be made; refused at once where, by the times of calls so far, it
                cannot, or others that wait could not.
            previews: progress comes with pictures.
            again: they were taken before, by an engine that was lost: as long as there is room, they are taken.

        Raises:
            RequestError: one of them cannot be made.
            QueueFullError: try again in `retry_after` seconds.
            DrainingError: the engine is shutting down, or was not started.
            StoppedError: a fault has ended the engine.
            ServiceError: it was asked from another event loop than the one that started it.
        """
        if self._failure is not None:
            raise StoppedError(str(self._failure))
        if self._draining or self._serving is None:
            state = "is shutting down and takes nothing new" if self._draining else "was not started"
            raise DrainingError(f"the engine {state}; send the request to another server")
        if asyncio.get_running_loop() is not self._loop:
            raise ServiceError("the engine belongs to the event loop that started it; ask it from there")
        for request in requests:
            if not isinstance(request, ImageRequest):
                raise RequestError(f"the request is a {type(request).__name__}; give an ImageRequest")
        if timeout is not None and not (isinstance(timeout, float) and timeout == math.inf):
            check_number("timeout", timeout, -math.inf, math.inf)
        previews, again = check_flag("previews", previews), check_flag("again", again)
        checked = [replace(self._runner.check(request), previews=previews) for request in requests]
        self._admission.check([one.group for one in checked], timeout, self._loop.time(), again=again)
        jobs = [Job(one, timeout=timeout, forget=self._queue.remove) for one in checked]
        for job in jobs:
            self._queue.add(job)
        self._wake.set()
        return jobs

    async def generate(self, request: ImageRequest, *, timeout: float | None = None) -> ImageResult:
        """Make one image. Cancelling the task that waits for it cancels the work.

        Raises:
            LatentRTError: as `submit`; DeadlineError; what went wrong while it was made.
        """
        (job,) = self.submit(request, timeout=timeout)
        try:
            return await job.result()
        finally:
            job.cancel()

    async def stream(
        self, request: ImageRequest, *, timeout: float | None = None, previews: bool = False
    ) -> AsyncIterator[Progress | Finished]:
        """Make one image and tell of its progress. Closing the iterator (contextlib.aclosing) cancels the work.

        Raises:
            LatentRTError: as `generate`.
        """
        (job,) = self.submit(request, timeout=timeout, previews=previews)
        try:
            async for event in job.events():
                yield event
        finally:
            job.cancel()

    async def drain(self, timeout: float | None = None) -> None:
        """Take nothing new, make what was taken, and stop; what is left after `timeout` seconds is refused."""
        self._draining = True
        self._wake.set()
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=timeout)
            self._end_all(
                DrainingError(
                    "the engine shut down before the image was made; send the request to another server"
                )
            )
            self._wake.set()
            _, late = await asyncio.wait([self._serving], timeout=_LAST_STEP)
            if late:
                _log.error(
                    "the device is still busy %g s after the deadline; exiting without waiting for it",
                    _LAST_STEP,
                )
                self._serving.cancel()
        self._thread.shutdown(wait=False)

    def _learn(self, report: BatchReport) -> None:
        self._reports.append(report)
        if report.outcome == "made":
            self._faults = 0
        elif report.outcome == "failed":  # the rest proves neither
            self._faults += 1
        if self._on_batch is not None:
            self._on_batch(report)

    def _stopped(self, serving: asyncio.Task[None]) -> None:
        """The serving task has ended; unless it was told to stop, no request may wait for it any longer."""
        error = None if serving.cancelled() else serving.exception()
        if error is None and self._draining:
            return
        self._failure = StoppedError(
            "the engine has stopped through a fault of its own; start the service again"
        )
        _log.critical("the engine has stopped", exc_info=error)
        self._end_all(self._failure)

    def _end_all(self, error: ServiceError) -> None:
        for job in [*self._queue, *self._running]:
            job.finish(error)

    async def _in_thread(self, work: Callable[..., None], *arguments: object) -> None:
        """Called in the one thread that owns the device."""
        self._call = submit_to(self._thread, work, *arguments)
        await asyncio.wrap_future(self._call)

    async def _serve(self, worker: Worker) -> None:
        """Hand the worker batch after batch."""
        loop = asyncio.get_running_loop()
        while self._queue or not self._draining:
            # Nobody comes while draining, so there is nothing to wait for.
            jobs = self._queue.take(loop.time() + (self._queue.window if self._draining else 0.0))
            if jobs:
                self._running, begun = jobs, loop.time()
                self._admission.begin(jobs, begun)
                for job in jobs:
                    job.begin()
                try:
                    await self._in_thread(worker.make, jobs)
                except Exception as error:  # the engine's own fault: its jobs end, and it goes on
                    _log.exception("%d images were lost", len(jobs))
                    for job in jobs:
                        job.finish(error)
                self._running = []
                self._admission.end()
                self._measure(begun, loop.time())
                if self._faults >= _FAULTS:
                    await self._prove(worker)
                continue
            self._wake.clear()
            try:
                async with asyncio.timeout_at(self._queue.ready_at()):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _prove(self, worker: Worker) -> None:
        """Make a self-test image. An error that a device does not recover from ends the engine here."""
        _log.warning("%d calls failed in a row; making a self-test image", self._faults)
        await self._in_thread(worker.prove)
        self._faults = 0

    def _measure(self, begun: float, now: float) -> None:
        """Learn from what was made since then, the loop's own delays included: each call has its share of them."""
        delay = (now - begun) / (sum(report.seconds for report in self._reports) or 1.0)
        for report in self._reports:
            if report.outcome == "made":
                self._admission.call_times.learn(report.size, report.cost, report.seconds * delay, now)
        self._reports = []


def submit_to(thread: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> Future[T]:
    """As `thread.submit`, for a task to wait for: a StopIteration comes as a RuntimeError, as out of a generator."""

    def call() -> T:
        try:
            return work(*arguments)
        except StopIteration as error:  # which no future of an event loop takes: the task would wait for ever
            raise RuntimeError("something raised StopIteration") from error

    return thread.submit(call)


def _powers_of_two(most: int) -> tuple[int, ...]:
    """Those up to `most`, and `most` itself, ascending."""
    return tuple(sorted({1 << k for k in range(most.bit_length())} | {most}))
