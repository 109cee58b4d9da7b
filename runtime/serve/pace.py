"""How long calls take, by the calls that were made.

A call costs something by itself, something a step, and something for its pixels, in shares that nobody knows
beforehand. Of a call like one that was made the time is known. Of others two things are sure: more work takes no less
time, and less work takes at least its share of the time. Estimates are the most that follows from these, so that
ignorance lets a request in: it is then made, and learnt from. What other work on the machine does to calls of one kind
it does to all, so they have a factor in common, which follows the last few calls of any kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..request import Size

__all__ = ["Pace"]

_FRESH = 600.0
"""Seconds that a measurement counts for. What is refused is never measured, so an unlucky one must not last."""
_KINDS = 64
"""Remembered."""
_WEIGHT = 0.3
"""Of the newest call in its kind's average."""
_TREND = 0.4
"""Of the newest call in what all kinds have in common lately."""
_FADING = 0.98
"""What is left of that with each call: what lasts is the averages' to learn."""
_JUMP = 3.0
"""More than this factor one call does not count for: it may have had a bad time."""
_SHORTEST = 1e-6
"""Seconds that a clock tells apart."""


@dataclass
class _Seen:
    """The calls of one size and work: their average, as of a machine without other work, and when the last one was."""

    seconds: float
    last: float
    calls: int


class Pace:
    """Measurements by size and work, the latter in the unit of `Group.cost`; times are in seconds of any one clock.

    Averages are geometric, so that the common factor and a kind's own average can be separated.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Size, float], _Seen] = {}
        self._lately = 1.0  # times the averages, what calls take now

    def learn(self, size: Size, cost: float, seconds: float, now: float) -> None:
        """A call of so much work took so long."""
        seconds = max(seconds, _SHORTEST)
        old = self._seen.pop((size, cost), None)
        if old is not None and now - old.last > _FRESH:
            old = None
        like = self._fresh(now, size, calls=2)
        if old is not None and old.calls > 1:
            like = {cost: old.seconds}
        if like:
            least, most = _bounds(like, cost)
            apart = seconds / self._lately / min(max(seconds / self._lately, least), most)
            self._lately = (self._lately * _bounded(apart) ** _TREND) ** _FADING
        alone, calls = seconds / self._lately, 1
        if old is not None:
            calls = old.calls + 1
            if old.calls > 1:  # the first of a kind allocates and records, and says little of the others
                alone = old.seconds * _bounded(alone / old.seconds) ** _WEIGHT
        self._seen[size, cost] = _Seen(alone, now, calls)
        if len(self._seen) > _KINDS:
            del self._seen[next(iter(self._seen))]  # the one not seen for longest

    def seconds(self, size: Size, cost: float, now: float) -> float:
        """What a call of so much work takes at least; 0 while nothing is known."""
        least, _ = _bounds(self._fresh(now, size) or self._fresh(now), cost)
        return self._lately * least

    def measured(self, size: Size, cost: float, now: float) -> bool:
        """Whether that is of such calls themselves, and more than one."""
        return cost in self._fresh(now, size, calls=2)

    def _fresh(self, now: float, size: Size | None = None, *, calls: int = 1) -> dict[float, float]:
        """Work -> seconds, of one size or the most of all; of what was called so often at least."""
        fresh: dict[float, float] = {}
        for (s, work), seen in self._seen.items():
            if size in (None, s) and now - seen.last <= _FRESH and seen.calls >= calls:
                fresh[work] = max(seen.seconds, fresh.get(work, 0.0))
        return fresh


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / _JUMP), _JUMP)


def _bounds(known: dict[float, float], cost: float) -> tuple[float, float]:
    """The least and the most seconds that so much work takes, by calls of other work."""
    if cost in known:
        return known[cost], known[cost]
    least = max((seconds * min(1.0, cost / work) for work, seconds in known.items()), default=0.0)
    most = min((seconds * max(1.0, cost / work) for work, seconds in known.items()), default=math.inf)
    return least, max(least, most)
