"""Percentiles of times, and what a ratio of two sides is worth: its bootstrap interval.

Times of one machine drift together, so sides are run in rounds and compared round by round: the ratio of two sides
is the median of the rounds' ratios, and its interval is over rounds drawn again with replacement (Efron, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "Spread", "growth", "ratio", "spread"]

_DRAWS = 2000
_COVER = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """A sample's percentiles, and the 95 % interval of its median."""

    median: Interval
    p10: float
    p90: float
    p99: float


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample."""
    values = np.asarray(samples, dtype=np.float64)
    p10, p90, p99 = (float(q) for q in np.quantile(values, [0.1, 0.9, 0.99]))
    return Spread(_median(values), p10, p90, p99)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median over rounds of numerator / denominator; the samples are paired by round.

    Raises:
        ValueError: not as many of one as of the other.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} rounds beside {len(denominator)}; they are compared in pairs")
    return _median(np.asarray(numerator, np.float64) / np.asarray(denominator, np.float64))


def growth(samples: Sequence[float]) -> float:
    """Per sample: the median of the slopes between all pairs (Theil and Sen), which a single jump does not move."""
    values = np.asarray(samples, dtype=np.float64)
    if len(values) < 2:
        return 0.0
    first, second = np.triu_indices(len(values), 1)
    return float(np.median((values[second] - values[first]) / (second - first)))


def _median(values: NDArray[np.float64]) -> Interval:
    drawn = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    medians = np.median(values[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - _COVER) / 2, (1 + _COVER) / 2])
    return Interval(float(np.median(values)), float(low), float(high))
