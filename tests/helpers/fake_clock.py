"""A clock that a loaded machine does not disturb."""

from __future__ import annotations

import time

import numpy as np
import pytest


class FakeClock:
    """Time passes where somebody sleeps, and a microsecond with each look at it.

    Args:
        noise: deviation of what a sleep takes, as a share of it.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self._now = 1000.0
        self._noise = noise
        self._rng = np.random.default_rng(seed)

    def sleep(self, seconds: float) -> None:
        self._now += seconds * max(0.0, 1 + self._noise * self._rng.standard_normal())

    def perf_counter(self) -> float:
        self._now += 1e-6
        return self._now

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """In the place of the machine's, for what reads it as `time.perf_counter()`."""
        patch.setattr(time, "sleep", self.sleep)
        patch.setattr(time, "perf_counter", self.perf_counter)
