"""A request on its way: it waits, runs, and ends once, with a result, an error, or by leaving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from ...errors import DeadlineError
from .requests import CheckedRequest, Finished, Group, ImageResult, Progress

__all__ = ["Job"]


class Job:
    """What `AsyncEngine.submit` gives back; everything but `left` belongs to the event loop's thread.

    Attributes:
        request: what is made, with its seed.
        since: when it came, by the loop's clock.
        timeout: seconds from then until it must be made.
        waited: seconds from then until it was begun.
        previews: progress comes with pictures.
    """

    def __init__(
        self,
        request: CheckedRequest,
        *,
        timeout: float | None,
        previews: bool,
        forget: Callable[[Job], None],
    ) -> None:
        """`forget` takes it out of the queue."""
        loop = asyncio.get_running_loop()
        self.request = request
        self.since = loop.time()
        self.timeout = timeout
        self.waited: float | None = None
        self.previews = previews
        self._forget = forget
        self._end: asyncio.Future[ImageResult] = loop.create_future()
        # An error that nobody reads is no news: asyncio would log it.
        self._end.add_done_callback(lambda end: end.cancelled() or end.exception())
        self._progress: Progress | None = None
        self._changed = asyncio.Event()
        self._timer = None if timeout is None else loop.call_later(timeout, self._expire, timeout)

    @property
    def group(self) -> Group:
        return self.request.group

    @property
    def left(self) -> bool:
        """Whether it has ended, so that nobody waits for more; safe to ask from any thread."""
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
        """Progress as it comes, then `Finished`. Who reads slowly misses steps, and nothing piles up.

        Raises:
            as `result` does.
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
        """Leave: the queue, or the batch. The device is free when all of a batch have left. Nothing once it ended."""
        if not self._end.done():
            self._end.cancel()
            self._ended()

    def begin(self) -> None:
        """It waits no longer."""
        self.waited = asyncio.get_running_loop().time() - self.since

    def progress(self, progress: Progress) -> None:
        """A step is done. One that is made again, as where a batch has failed, is no news."""
        told = 0 if self._progress is None else self._progress.step
        if not self._end.done() and progress.step > told:
            self._progress = progress
            self._changed.set()

    def finish(self, end: ImageResult | Exception) -> None:
        """It ends here, unless it has left before."""
        if self._end.done():
            return
        if isinstance(end, Exception):
            self._end.set_exception(end)
        else:
            self._end.set_result(end)
        self._ended()

    def _expire(self, timeout: float) -> None:
        where = "waiting" if self.waited is None else "being made"
        self.finish(DeadlineError(f"the image was still {where} after {timeout:g} s; give it more time"))

    def _ended(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._changed.set()
        self._forget(self)
