"""Estimates of how long calls take, from measurements of earlier ones.

A call has a fixed cost, a cost per step and a cost per pixel, in shares that are unknown beforehand. A call like an
earlier one is expected to take the same time. Of any other, two things are known: more work takes no less time, and
less work takes at least its share of the time. An estimate is the highest lower bound that follows from these, so that
a request of which nothing is known is admitted, and then measured. Other work on the machine slows calls of all kinds
alike, so all estimates share a factor that follows the last few calls of any kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..request import Size

__all__ = ["CallTimes"]

_FRESH = 600.0
"""Seconds after which a measurement expires: refused calls are never measured, so an unlucky one must not last."""
_KINDS = 64
"""Kinds of call remembered."""
_WEIGHT = 0.3
"""Weight of the newest call in its kind's average."""
_TREND = 0.4
"""Weight of the newest call in the common factor."""
_FADING = 0.98
"""Decay of the common factor with each call, so that a lasting change goes into the averages."""
_JUMP = 3.0
"""Bound of the factor by which one call may change an estimate: it may be an outlier."""
_SHORTEST = 1e-6
"""Seconds; resolution of the clock."""


@dataclass
class _Seen:
    """Calls of one size and work: their average on an otherwise idle machine, and the time of the last one."""

    seconds: float
    last: float
    calls: int


class CallTimes:
    """Measurements by size and work, the latter in the unit of `Group.cost`; times are in seconds of any one clock.

    Averages are geometric, so that the common factor and a kind's own average can be separated.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Size, float], _Seen] = {}
        self._lately = 1.0  # the common factor: calls now take this times their averages

    def learn(self, size: Size, cost: float, seconds: float, now: float) -> None:
        """Record that a call of this size and cost took `seconds`."""
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
            if old.calls > 1:  # the first of a kind allocates and captures, and says little about the others
                alone = old.seconds * _bounded(alone / old.seconds) ** _WEIGHT
        self._seen[size, cost] = _Seen(alone, now, calls)
        if len(self._seen) > _KINDS:
            del self._seen[next(iter(self._seen))]  # the one not seen for longest

    def seconds(self, size: Size, cost: float, now: float) -> float:
        """Lower bound of the time of a call of this size and cost; 0 while nothing is known."""
        least, _ = _bounds(self._fresh(now, size) or self._fresh(now), cost)
        return self._lately * least

    def measured(self, size: Size, cost: float, now: float) -> bool:
        """Whether the estimate comes from at least two calls of this very size and cost."""
        return cost in self._fresh(now, size, calls=2)

    def _fresh(self, now: float, size: Size | None = None, *, calls: int = 1) -> dict[float, float]:
        """Cost -> seconds, of one size or the largest over all sizes, of kinds called at least `calls` times."""
        fresh: dict[float, float] = {}
        for (s, work), seen in self._seen.items():
            if size in (None, s) and now - seen.last <= _FRESH and seen.calls >= calls:
                fresh[work] = max(seen.seconds, fresh.get(work, 0.0))
        return fresh


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / _JUMP), _JUMP)


def _bounds(known: dict[float, float], cost: float) -> tuple[float, float]:
    """Least and most seconds for a call of this cost, from the known times of other costs."""
    if cost in known:
        return known[cost], known[cost]
    least = max((seconds * min(1.0, cost / work) for work, seconds in known.items()), default=0.0)
    most = min((seconds * max(1.0, cost / work) for work, seconds in known.items()), default=math.inf)
    return least, max(least, most)
