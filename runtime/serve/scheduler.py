"""Who is served next: requests of one size at a time, batched where they can share a call, sizes in fair turns.

It knows neither models nor clocks: jobs come with a group and a time of arrival, `now` is told. Turns are start-time
fair queueing (Goyal, Vin and Cheng, 1996): a size that was served pays the work of its batch, and the size that has
paid least is next; one that was idle starts at what the last turn began with, so it can neither save up nor be
starved by a flood of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from .requests import Group

__all__ = ["Schedulable", "Scheduler"]

Size = tuple[int, int]


class Schedulable(Protocol):
    """What waits."""

    @property
    def group(self) -> Group: ...

    @property
    def since(self) -> float:
        """When it came, in seconds."""


J = TypeVar("J", bound=Schedulable)


class Scheduler(Generic[J]):
    """A queue that gives out batches.

    Attributes:
        max_batch: images in a call.
        window: seconds that a job may wait for others to share its call while nothing else runs.
    """

    def __init__(self, *, max_batch: int, window: float) -> None:
        self.max_batch = max_batch
        self.window = window
        self._flows: dict[Size, list[J]] = {}  # never an empty list; each in order of arrival
        self._paid: dict[Size, float] = {}
        self._turn = 0.0
        self._limits: dict[Size, int] = {}

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._flows.values())

    def __iter__(self) -> Iterator[J]:
        return (job for jobs in self._flows.values() for job in jobs)

    def order(self, coming: Sequence[Schedulable]) -> list[list[Schedulable]]:
        """The calls until nothing waits, were these to come now and nobody after them."""
        ahead: Scheduler[Schedulable] = Scheduler(max_batch=self.max_batch, window=self.window)
        ahead._flows = {size: [*flow] for size, flow in self._flows.items()}
        ahead._paid, ahead._turn, ahead._limits = dict(self._paid), self._turn, self._limits
        for one in coming:
            ahead.add(one)
        calls = []
        while ahead:
            calls.append(ahead.take(math.inf))
        return calls

    def add(self, job: J) -> None:
        """Let a job wait."""
        size = job.group.size
        if size not in self._flows:
            self._flows[size] = []
            self._paid[size] = max(self._paid.get(size, 0.0), self._turn)
        self._flows[size].append(job)

    def remove(self, job: J) -> None:
        """A job that waits no longer; nothing happens when it doesn't."""
        flow = self._flows.get(job.group.size, [])
        if job in flow:
            self._drop([job])

    def take(self, now: float) -> list[J]:
        """The next batch, or none while the jobs there are may still get company."""
        ready = [size for size, flow in self._flows.items() if self._ready_at(flow) <= now]
        if not ready:
            return []
        size = min(ready, key=lambda size: (self._paid[size], self._flows[size][0].since))
        batch = self._mates(self._flows[size])
        self._turn = self._paid[size]
        self._paid[size] += sum(job.group.cost for job in batch)
        self._drop(batch)
        # Who is not here and has nothing to make up for starts afresh.
        self._paid = {s: paid for s, paid in self._paid.items() if s in self._flows or paid > self._turn}
        return batch

    def ready_at(self) -> float | None:
        """When `take` will have something; None when nothing waits."""
        return min((self._ready_at(flow) for flow in self._flows.values()), default=None)

    def limit(self, size: Size, images: int) -> None:
        """From now on at most `images` of this size in a call: more did not fit into memory."""
        self._limits[size] = min(images, self._limit(size))

    def _limit(self, size: Size) -> int:
        return self._limits.get(size, self.max_batch)

    def _mates(self, flow: Sequence[J]) -> list[J]:
        """The oldest job and those that can share its call."""
        head = flow[0].group
        return [job for job in flow if job.group == head][: self._limit(head.size)]

    def _ready_at(self, flow: Sequence[J]) -> float:
        full = len(self._mates(flow)) == self._limit(flow[0].group.size)
        return flow[0].since + (0.0 if full else self.window)

    def _drop(self, jobs: Sequence[J]) -> None:
        size = jobs[0].group.size
        gone = {id(job) for job in jobs}
        self._flows[size] = [job for job in self._flows[size] if id(job) not in gone]
        if not self._flows[size]:
            del self._flows[size]
