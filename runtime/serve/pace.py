"""How long calls take, by the calls that were made.

A call costs something by itself, something a step, and something for its pixels, in shares that nobody knows
beforehand. Of a call like one that was made the time is known. Of others two things are sure: more work takes no less
time, and less work takes at least its share of the time. Estimates are the most that follows from these, so that
ignorance lets a request in: it is then made, and learnt from.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..request import Size

__all__ = ["Pace"]

_FRESH = 600.0
"""Seconds that a measurement counts for. What is refused is never measured, so an unlucky one must not last."""
_KINDS = 64
"""Remembered."""
_WEIGHT = 0.3
"""Of the newest call in its kind's average."""


@dataclass
class _Seen:
    """The average of calls of one size and work."""

    seconds: float
    last: float


class Pace:
    """Measurements by size and work, the latter in the unit of `Group.cost`; times are in seconds of any one clock."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Size, float], _Seen] = {}

    def learn(self, size: Size, cost: float, seconds: float, now: float) -> None:
        """A call of so much work took so long."""
        old = self._seen.pop((size, cost), None)
        if old is not None and now - old.last <= _FRESH:
            seconds = old.seconds + _WEIGHT * (seconds - old.seconds)
        self._seen[size, cost] = _Seen(seconds, now)
        if len(self._seen) > _KINDS:
            del self._seen[next(iter(self._seen))]  # the one not seen for longest

    def seconds(self, size: Size, cost: float, now: float) -> float:
        """What a call of so much work takes at least; 0 while nothing is known."""
        same = self._seen.get((size, cost))
        if same is not None and now - same.last <= _FRESH:
            return same.seconds
        fresh = [(kind, seen.seconds) for kind, seen in self._seen.items() if now - seen.last <= _FRESH]
        like = [(work, seconds) for (s, work), seconds in fresh if s == size]
        others = like or [(work, seconds) for (_, work), seconds in fresh]
        return max((seconds * min(1.0, cost / work) for work, seconds in others), default=0.0)
