"""A request in the engine: it waits, runs, and ends once, with a result, an error or a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from ...errors import DeadlineError, ServiceError
from .requests import CheckedRequest, Finished, Group, ImageResult, Progress

__all__ = ["Job"]


class Job:
    """What `AsyncEngine.submit` returns. For the event loop's thread, except for `ended`.

    Attributes:
        request: the image to generate, with its seed.
        since: time of arrival, by the loop's clock.
        timeout: seconds from its arrival to its deadline; None for none.
        waited: seconds from its arrival to the beginning of its call; None before.
    """

    def __init__(
        self,
        request: CheckedRequest,
        *,
        timeout: float | None,
        forget: Callable[[Job], None],
    ) -> None:
        """`forget`: called when it ends, to remove it from the queue."""
        loop = asyncio.get_running_loop()
        self.request = request
        self.since = loop.time()
        self.timeout = timeout
        self.waited: float | None = None
        self._forget = forget
        self._end: asyncio.Future[ImageResult] = loop.create_future()
        # Retrieved here, since asyncio logs an error that is never retrieved.
        self._end.add_done_callback(lambda end: end.cancelled() or end.exception())
        self._progress: Progress | None = None
        self._changed = asyncio.Event()
        self._timer = None if timeout is None else loop.call_later(timeout, self._expire, timeout)

    @property
    def group(self) -> Group:
        return self.request.group

    @property
    def ended(self) -> bool:
        """Whether it has ended; may be read from any thread."""
        return self._end.done()

    async def result(self) -> ImageResult:
        """Wait for the image.

        Raises:
            DeadlineError: its time ran out.
            LatentRTError: it could not be made.
            asyncio.CancelledError: it was cancelled.
        """
        return await asyncio.shield(self._end)

    async def events(self) -> AsyncIterator[Progress | Finished]:
        """Progress as it comes, then `Finished`. Only the latest step is stored, so that a slow reader misses some.

        Raises:
            as `result`.
        """
        seen = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._progress is not None and self._progress is not seen:
                seen = self._progress
                yield seen
            if self._end.done():
                yield Finished(self._end.result())
                return

    def cancel(self) -> None:
        """Cancel it, unless it has ended. A job in the queue is removed; a batch stops once all of its jobs have
        ended."""
        if not self._end.done():
            self._end.cancel()
            self._after_end()

    def begin(self) -> None:
        """Record that its call begins."""
        self.waited = asyncio.get_running_loop().time() - self.since

    def progress(self, progress: Progress) -> None:
        """Report a step. One that is repeated, as after its batch has failed, is not reported again."""
        reported = 0 if self._progress is None else self._progress.step
        if not self._end.done() and progress.step > reported:
            self._progress = progress
            self._changed.set()

    def finish(self, end: ImageResult | Exception) -> None:
        """End it with a result or an error, unless it has ended."""
        if self._end.done():
            return
        if isinstance(end, StopIteration):  # which no future takes
            wrapped = ServiceError("the image could not be made: something raised StopIteration")
            wrapped.__cause__ = end
            end = wrapped
        if isinstance(end, Exception):
            self._end.set_exception(end)
        else:
            self._end.set_result(end)
        self._after_end()

    def _expire(self, timeout: float) -> None:
        where = "waiting" if self.waited is None else "being made"
        self.finish(DeadlineError(f"the image was still {where} after {timeout:g} s; give it more time"))

    def _after_end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._changed.set()
        self._forget(self)
