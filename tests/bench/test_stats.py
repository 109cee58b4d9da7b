"""`bench/stats.py`: medians, ratios and growth, and how often their intervals hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
from latentrt.bench.stats import growth, median, ratio


def test_statistics() -> None:
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 21)  # of the machine, which meets both sides
    found = ratio(list(2 * drift * rng.normal(1, 0.01, 21)), list(drift * rng.normal(1, 0.01, 21)))
    assert 1.97 < found.low < 2 < found.high < 2.03
    assert (median([1.0]).low, median([1.0]).value) == (1, 1)
    assert growth([5, 7, 9, 400, 13]) == pytest.approx(2.0)
    assert growth([5, 9, 15, 400, 19], at=[0, 2, 5, 6, 7]) == pytest.approx(2.0)
    assert growth([5]) == 0
    assert median([1.0] * 3000).cover == pytest.approx(0.95, abs=0.005)
    with pytest.raises(ValueError, match="3 rounds beside 2"):
        ratio([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("rounds", "cover"),
    [(3, 0.75), (5, 0.9375), (6, 0.96875), (7, 0.984375), (9, 0.9609375), (15, 0.96484375)],
)
def test_intervals_cover_what_they_say(rounds: int, cover: float) -> None:
    """The true ratio lies in the interval as often as it tells, by simulation of times with a long tail."""
    rng = np.random.default_rng(rounds)
    inside = 0
    for times in rng.lognormal(0, 0.3, (2000, 2, rounds)):
        found = ratio(list(2 * times[0]), list(times[1]))
        inside += found.low <= 2 <= found.high
    assert found.cover == cover
    assert inside / 2000 == pytest.approx(cover, abs=3 * (cover * (1 - cover) / 2000) ** 0.5)
