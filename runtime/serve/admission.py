"""Who may wait: as many as fit, and only requests that can be made in time. It has no clock or thread of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from ...errors import QueueFullError, RequestError
from ..request import Size
from .call_times import CallTimes
from .requests import Group
from .scheduler import Schedulable, Scheduler

__all__ = ["Admission"]

_CAUTION = 2.5
"""A newcomer's estimate times this must fit its timeout: later requests of other sizes take turns with it."""
_MARGIN = 2.0
"""Someone waiting is in danger where their estimate times this passes their deadline: a flood slows the machine down,
whose refusals are work as well."""
_LONGEST = 60.0
"""Seconds; the queue looks otherwise after that, however long it is now."""
_PATIENCE = 30.0
"""Seconds that a size is kept out for the sake of others who wait; then one request is let in at their cost."""
_FORGOTTEN = 2 * _LONGEST
"""Seconds after which a refused size counts as given up."""

J = TypeVar("J", bound=Schedulable)


class _Coming(NamedTuple):
    """An image that would wait if it were admitted."""

    group: Group
    since: float
    timeout: float | None


@dataclass
class _KeptOut:
    """A size that others keep out: when that began, and when it was last."""

    since: float
    last: float


class Admission:
    """Admits requests to a queue, or refuses them. Times are in seconds of one clock."""

    def __init__(self, queue: Scheduler[J], *, max_waiting: int) -> None:
        """`max_waiting` images may wait."""
        self.max_waiting = max_waiting
        self.call_times = CallTimes()
        self._queue = queue
        self._running: tuple[Size, float, float] | None = None
        self._kept_out: dict[Size, _KeptOut] = {}

    def begin(self, jobs: Sequence[J], now: float) -> None:
        """A call for these is being made."""
        self._running = *_kind(jobs), now

    def end(self) -> None:
        """That call has ended."""
        self._running = None

    def check(
        self, groups: Sequence[Group], timeout: float | None, now: float, *, again: bool = False
    ) -> None:
        """Whether one image of each group may wait, to be made in `timeout` seconds.

        Args:
            again: it was let in before, elsewhere: only for want of room is it refused.

        Raises:
            RequestError: there are more than may ever wait.
            QueueFullError: and when to come again.
        """
        if len(groups) > self.max_waiting:
            raise RequestError(
                f"the request asks for {len(groups)} images, and at most {self.max_waiting} may wait; ask for fewer"
            )
        waiting = len(self._queue)
        if waiting + len(groups) > self.max_waiting:
            retry = _retry(max((after for _, after in self._forecast([], now)), default=0.0))
            raise QueueFullError(
                f"the queue is full: {waiting} of {self.max_waiting} places are taken, and the request needs "
                f"{len(groups)}; "
                f"try again in {retry} s",
                retry,
            )
        if again or not groups or (self._running is None and not self._queue):
            return  # with nothing before it, it is tried: that is how estimates come to be
        if timeout is None and all(job.timeout is None for job in self._queue):
            self._kept_out.clear()  # nobody can be late, and a forecast takes as long as the queue is
            return
        forecast = self._forecast([_Coming(group, now, timeout) for group in groups], now)
        took = max(after for job, after in forecast if isinstance(job, _Coming))
        if timeout is not None and _CAUTION * took > timeout:
            retry = _retry(_CAUTION * took - timeout)
            raise QueueFullError(
                f"with {waiting} images queued it would take an estimated {took:.1f} to {_CAUTION * took:.1f} s, and "
                f"its timeout is {timeout:g} s; try again in {retry} s, or raise the timeout",
                retry,
            )
        if self._harms(forecast, now) and self._keep_out(groups[0].size, now):
            retry = _retry(took)
            raise QueueFullError(
                f"{waiting} images are queued, and this one could make some of them late; "
                f"try again in {retry} s",
                retry,
            )
        self._kept_out.pop(groups[0].size, None)

    def _keep_out(self, size: Size, now: float) -> bool:
        """Whether a request of this size is refused for others' sake; the first after a long time of that is not."""
        self._kept_out = {s: kept for s, kept in self._kept_out.items() if now - kept.last <= _FORGOTTEN}
        kept = self._kept_out.setdefault(size, _KeptOut(now, now))
        kept.last = now
        return now - kept.since < _PATIENCE

    def _harms(self, forecast: Sequence[tuple[Schedulable, float]], now: float) -> bool:
        """Whether one who waits, and would be in time, might be late for who comes."""
        endangered = [
            (job, after)
            for job, after in forecast
            if _MARGIN * after > _left(job, now) and not isinstance(job, _Coming)
        ]
        if not endangered:
            return False
        without = {id(job): after for job, after in self._forecast([], now)}
        return any(after > without[id(job)] <= _left(job, now) for job, after in endangered)

    def _forecast(self, coming: Sequence[_Coming], now: float) -> list[tuple[Schedulable, float]]:
        """Everyone who waits, and after how many seconds they will have been made."""
        after, slower = 0.0, 1.0
        if self._running is not None:
            size, cost, begun = self._running
            expected, elapsed = self.call_times.seconds(size, cost, now), now - begun
            after = max(0.0, expected - elapsed)
            if elapsed > expected and self.call_times.measured(size, cost, now):
                slower = elapsed / expected  # what holds up this call holds up the next ones
        forecast = []
        ahead = self._queue.ahead(coming)
        while jobs := ahead.take_soon(now + after):
            after += slower * self.call_times.seconds(*_kind(jobs), now)
            forecast += [(job, after) for job in jobs]
        return forecast


def _kind(jobs: Sequence[Schedulable]) -> tuple[Size, float]:
    """Size and work of a call."""
    return jobs[0].group.size, sum(job.group.cost for job in jobs)


def _left(job: Schedulable, now: float) -> float:
    """Seconds until it must be made."""
    return math.inf if job.timeout is None else job.since + job.timeout - now


def _retry(seconds: float) -> int:
    return math.ceil(min(max(1.0, seconds), _LONGEST))
