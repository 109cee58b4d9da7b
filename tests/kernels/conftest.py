"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from latentrt.kernels._dispatch import forced
from latentrt.kernels._triton import counted


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run here: the GPU, or else the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def launches() -> Iterator[Counter[str]]:
    """Operators go to their Triton kernels, also on the CPU; the launches are counted by the kernel's name."""
    with forced(), counted() as counts:
        yield counts


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator allocates is full of NaN, so that an element it forgets shows."""

    def fill(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() and not t.is_meta else t

    for name in ("empty", "empty_like", "empty_strided"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: fill(plain(*a, **k)))
