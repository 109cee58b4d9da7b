"""The median of times or of ratios, with a confidence interval.

All times on one machine drift together. So sides are run in rounds and compared round by round: the ratio of two sides
is the median of the rounds' ratios.

The interval is the exact one of the sign test: its ends are two of the sorted values, chosen by their coverage, which
does not depend on the distribution (David and Nagaraja, Order Statistics, section 7.1). With 6 to 8 rounds they are the
smallest and the largest value; from 9 rounds on, one value is left out at each end. The coverage is reported with them.

A bootstrap (Efron, 1979) also ends on two of the sorted values, but with few rounds its 95 % percentiles are too close:
of runs of 7 rounds, they contain the true median in 87.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["COVER", "LEAST_ROUNDS", "Interval", "growth", "median", "ratio"]

COVER = 0.95
"""The coverage that intervals should have."""
LEAST_ROUNDS = 6
"""The least number of rounds with which an interval can cover 95 %."""


@dataclass(frozen=True)
class Interval:
    """A median with its confidence interval.

    Attributes:
        value: the median.
        low, high: ends of the interval.
        cover: the probability that such an interval contains the true median. It is the smallest one of at least 95 %,
            or, with too few samples for that, the coverage of their whole range.
    """

    value: float
    low: float
    high: float
    cover: float


def median(samples: Sequence[float]) -> Interval:
    """Median and interval of at least one sample."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    skipped, cover = _ends(len(ordered))
    return Interval(float(np.median(ordered)), float(ordered[skipped]), float(ordered[-1 - skipped]), cover)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median over rounds of numerator / denominator; the samples are paired by round.

    Raises:
        ValueError: the two differ in length.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} rounds beside {len(denominator)}; they are compared in pairs")
    return median([a / b for a, b in zip(numerator, denominator, strict=True)])


def growth(samples: Sequence[float], at: Sequence[float] | None = None) -> float:
    """The Theil-Sen slope: the median of the slopes between all pairs, which a single jump does not change.

    0 if there is no pair.

    Args:
        at: where each sample was taken, in ascending order; by default they are 1 apart.
    """
    values = np.asarray(samples, dtype=np.float64)
    positions = np.arange(len(values)) if at is None else np.asarray(at, dtype=np.float64)
    if len(values) < 2:
        return 0.0
    first, second = np.triu_indices(len(values), 1)
    return float(np.median((values[second] - values[first]) / (positions[second] - positions[first])))


def _ends(count: int) -> tuple[int, float]:
    """How many values the interval leaves out at each end, and what it covers.

    Each value is above or below the true median with equal probability. The interval misses it if at most `skipped`
    values are on one side.
    """
    # Integers, because floats overflow at about 1,000 rounds.
    skipped, outside, ways = 0, 2, 2**count
    while True:
        wider = outside + 2 * math.comb(count, skipped + 1)
        if wider / ways > 1 - COVER:
            return skipped, 1 - outside / ways
        skipped, outside = skipped + 1, wider
