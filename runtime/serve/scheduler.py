"""The order in which jobs are served: one size at a time, batched where they can share a call, sizes in fair turns.

It knows neither models nor clocks: a job has a group and a time of arrival, and the caller gives the time. Turns are
start-time fair queueing (Goyal, Vin and Cheng, 1996): a size pays for the work of each of its batches, and the size
that has paid least is next. One that was idle starts at what the last turn began with: it earns no credit, and a flood
of another size cannot starve it. That holds among a few sizes; a stream of new ones, each of which has paid nothing,
would come before all others. So every other call goes to the job that has waited longest, once that is long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..request import Size
from .requests import Group

__all__ = ["Schedulable", "Scheduler"]

_PATIENCE = 30.0
"""Seconds after which a job's age counts, and not what its size has paid; or half of the time it was given."""
_REMEMBERED = 64
"""Sizes without jobs whose payments are remembered, because they are ahead of the last turn."""
_PROBATION = 100
"""Calls as large as a limit after which twice as many images are tried again: others may have left the device."""


class Schedulable(Protocol):
    """A job in the queue."""

    @property
    def group(self) -> Group: ...

    @property
    def since(self) -> float:
        """Time of arrival, in seconds."""

    @property
    def timeout(self) -> float | None:
        """Seconds from its arrival to its deadline; None for none."""


J = TypeVar("J", bound=Schedulable)


@dataclass
class _Limit:
    """The most images of one size that fit into a call, and the number of calls of that many."""

    images: int
    calls: int = 0


class Scheduler(Generic[J]):
    """A queue that gives out batches.

    Attributes:
        max_batch: images in a call.
        window: seconds that a job may wait for others to share its call while nothing else runs.
        batches: the numbers of images that a call may have, 1 and `max_batch` among them; empty for any. Of more jobs
            than one of these the oldest go, and the others stay in the queue.
    """

    def __init__(self, *, max_batch: int, window: float, batches: Sequence[int] = ()) -> None:
        self.max_batch = max_batch
        self.window = window
        self.batches = tuple(batches)
        self._flows: dict[Size, list[J]] = {}  # never an empty list; each in order of arrival
        self._paid: dict[Size, float] = {}  # in order of the last turn
        self._turn = 0.0
        self._by_age = False  # the last call
        self._limits: dict[Size, _Limit] = {}

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._flows.values())

    def __iter__(self) -> Iterator[J]:
        return (job for jobs in self._flows.values() for job in jobs)

    def ahead(self, coming: Sequence[Schedulable]) -> Scheduler[Schedulable]:
        """A copy for forecasts, with the jobs of this queue and these."""
        ahead: Scheduler[Schedulable] = Scheduler(
            max_batch=self.max_batch, window=self.window, batches=self.batches
        )
        ahead._flows = {size: [*flow] for size, flow in self._flows.items()}
        ahead._paid, ahead._turn, ahead._by_age = dict(self._paid), self._turn, self._by_age
        ahead._limits = {size: copy(limit) for size, limit in self._limits.items()}
        for one in coming:
            ahead.add(one)
        return ahead

    def add(self, job: J) -> None:
        """Add a job to the queue."""
        size = job.group.size
        if size not in self._flows:
            self._flows[size] = []
            self._paid[size] = max(self._paid.get(size, 0.0), self._turn)
        self._flows[size].append(job)

    def remove(self, job: J) -> None:
        """Remove a job; nothing happens if it is not in the queue."""
        flow = self._flows.get(job.group.size, [])
        if job in flow:
            self._drop([job])

    def take(self, now: float) -> list[J]:
        """The next batch; empty while every job may still wait, within `window`, for others to share its call."""
        return self._next([size for size, flow in self._flows.items() if self._ready_at(flow) <= now], now)

    def take_soon(self, now: float) -> list[J]:
        """The next batch, regardless of `window`; empty if the queue is."""
        return self._next(list(self._flows), now)

    def _next(self, ready: Sequence[Size], now: float) -> list[J]:
        """The next batch, of one of these sizes."""
        if not ready:
            return []
        size = min(ready, key=lambda size: (self._paid[size], self._flows[size][0].since))
        oldest = min(ready, key=lambda size: _impatient_at(self._flows[size][0]))
        self._by_age = not self._by_age and _impatient_at(self._flows[oldest][0]) <= now
        if self._by_age:
            size = oldest
        batch = self._mates(self._flows[size])
        paid = self._paid.pop(size)
        self._turn = max(self._turn, paid)
        self._paid[size] = paid + sum(job.group.cost for job in batch)
        self._note(size, len(batch))
        self._drop(batch)
        # A size with no jobs and no debt is forgotten.
        absent = [s for s in self._paid if s not in self._flows]
        for k, s in enumerate(reversed(absent)):
            if self._paid[s] <= self._turn or k >= _REMEMBERED:
                del self._paid[s]
        return batch

    def ready_at(self) -> float | None:
        """The time from which `take` returns a batch; None if the queue is empty."""
        return min((self._ready_at(flow) for flow in self._flows.values()), default=None)

    def limit(self, size: Size, images: int) -> None:
        """Allow at most `images` of this size in a call from now on: more did not fit into memory."""
        self._limits[size] = _Limit(self.formable(min(images, self._limit(size))))

    def _limit(self, size: Size) -> int:
        found = self._limits.get(size)
        return self.max_batch if found is None else found.images

    def _note(self, size: Size, images: int) -> None:
        """Count a call of so many images. After enough calls at the limit, twice as many are tried."""
        limit = self._limits.get(size)
        if limit is None or images < limit.images:
            return
        limit.calls += 1
        if limit.calls == _PROBATION:
            limit.images, limit.calls = self.formable(2 * limit.images), 0
            if limit.images >= self.max_batch:
                del self._limits[size]

    def _mates(self, flow: Sequence[J]) -> list[J]:
        """The oldest job and those that share its call."""
        head = flow[0].group
        mates = [job for job in flow if job.group == head]
        return mates[: self.formable(min(len(mates), self._limit(head.size)))]

    def formable(self, images: int) -> int:
        """The largest number of images, up to this one, that a call may have."""
        return max((batch for batch in self.batches if batch <= images), default=images)

    def _ready_at(self, flow: Sequence[J]) -> float:
        full = len(self._mates(flow)) == self._limit(flow[0].group.size)
        return flow[0].since + (0.0 if full else self.window)

    def _drop(self, jobs: Sequence[J]) -> None:
        size = jobs[0].group.size
        gone = {id(job) for job in jobs}
        self._flows[size] = [job for job in self._flows[size] if id(job) not in gone]
        if not self._flows[size]:
            del self._flows[size]


def _impatient_at(job: Schedulable) -> float:
    """The time from which its age counts."""
    return job.since + (_PATIENCE if job.timeout is None else min(_PATIENCE, job.timeout / 2))
