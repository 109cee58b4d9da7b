"""The median of times or of ratios, and its interval.

Times of one machine drift together, so sides are run in rounds and compared round by round: the ratio of two sides
is the median of the rounds' ratios.

The interval is the sign test's exact one, not a bootstrap's. Rounds drawn again with replacement (the bootstrap;
Efron, 1979) also put the ends of a median's interval on two of the sorted values, but with few rounds its 95 %
percentiles choose them too close: they hold the true median in 87.5 % of runs of 7 rounds. Here the two are chosen by
what they cover whatever the distribution (David and Nagaraja, Order Statistics, section 7.1), and the coverage is kept
beside them. With 6 to 8 rounds they are the least and the largest value; from 9 on one is left out at each end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["COVER", "LEAST_ROUNDS", "Interval", "growth", "median", "ratio"]

COVER = 0.95
"""What an interval should cover."""
LEAST_ROUNDS = 6
"""From so many on there is an interval that covers 95 %."""


@dataclass(frozen=True)
class Interval:
    """A median, the ends of its interval, and in what share of runs such an interval holds the true one: the least
    that is 95 % or more, or what the whole range covers where that is less."""

    value: float
    low: float
    high: float
    cover: float


def median(samples: Sequence[float]) -> Interval:
    """Of at least one sample."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    skipped, cover = _ends(len(ordered))
    return Interval(float(np.median(ordered)), float(ordered[skipped]), float(ordered[-1 - skipped]), cover)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median over rounds of numerator / denominator; the samples are paired by round.

    Raises:
        ValueError: not as many of one as of the other.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} rounds beside {len(denominator)}; they are compared in pairs")
    return median([a / b for a, b in zip(numerator, denominator, strict=True)])


def growth(samples: Sequence[float], at: Sequence[float] | None = None) -> float:
    """The median of the slopes between all pairs (Theil and Sen), which a single jump does not move; 0 for no pair.

    Args:
        at: where each sample was taken, rising; by default one apart.
    """
    values = np.asarray(samples, dtype=np.float64)
    places = np.arange(len(values)) if at is None else np.asarray(at, dtype=np.float64)
    if len(values) < 2:
        return 0.0
    first, second = np.triu_indices(len(values), 1)
    return float(np.median((values[second] - values[first]) / (places[second] - places[first])))


def _ends(count: int) -> tuple[int, float]:
    """How many values the interval leaves out at each end, and what it covers.

    It misses the true median where at most `skipped` of the values, each above it or below it like a coin, are on
    one side.
    """
    skipped, outside, ways = 0, 2, 2**count  # integers: floats end at some 1,000 rounds
    while True:
        wider = outside + 2 * math.comb(count, skipped + 1)
        if wider / ways > 1 - COVER:
            return skipped, 1 - outside / ways
        skipped, outside = skipped + 1, wider
