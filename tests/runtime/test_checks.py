"""`runtime/checks.py`: what an error says of a value that was refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from latentrt.errors import LatentRTError
from latentrt.runtime.checks import check_integer, check_number, shown
from latentrt.runtime.engines.registry import get_backend
from latentrt.runtime.place import parse_bytes, parse_device, parse_dtype


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


HUGE = 10**5000  # of more digits than Python writes
LONG = "x" * 100_000


def test_a_value_is_shown_as_it_is_written() -> None:
    assert [shown(x) for x in (7, 0.5, None, [1, "a"], "FlowMatchEulerDiscreteScheduler")] == [
        "7",
        "0.5",
        "None",
        "[1, 'a']",
        "'FlowMatchEulerDiscreteScheduler'",
    ]


@pytest.mark.parametrize(
    "value",
    [LONG, [LONG] * 1000, Unprintable(), HUGE, [HUGE]],
    ids=["long", "list", "unprintable", "huge", "hugelist"],
)
def test_any_value_is_shown_in_short(value: object) -> None:
    assert 0 < len(shown(value)) < 1000


@pytest.mark.parametrize("value", [LONG, Unprintable(), HUGE], ids=["long", "unprintable", "huge"])
@pytest.mark.parametrize(
    "refuse",
    [
        lambda value: check_integer("steps", value, 1, 9),
        lambda value: check_number("eta", value, 0, 1),
        lambda value: parse_bytes(-value if value is HUGE else value, "memory_limit"),
        parse_dtype,
        parse_device,
        get_backend,
    ],
    ids=["integer", "number", "bytes", "dtype", "device", "backend"],
)
def test_what_is_refused_is_named_in_short(refuse: Callable[[Any], object], value: object) -> None:
    with pytest.raises(LatentRTError) as caught:
        refuse(value)
    assert len(str(caught.value)) < 300
