"""`runtime/checks.py`: what an error says of a value that was refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from latentrt.errors import LatentRTError, RequestError
from latentrt.runtime.checks import check_choice, check_flag, check_integer, check_number, shown
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


def test_an_array_is_shown_in_one_line() -> None:
    assert shown(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"


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


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        *((value, True) for value in (True, 1, np.bool_(True), np.array([True]), torch.tensor(True))),
        *((value, False) for value in (False, 0, None, np.bool_(False), torch.tensor([0]))),
    ],
)
def test_flags(value: object, meaning: bool) -> None:
    assert check_flag("tiled_vae", value) is meaning


@pytest.mark.parametrize(
    "value",
    [
        "",
        "no",
        [],
        [False],
        {},
        2,
        0.5,
        np.zeros(2),
        np.zeros(0),
        torch.ones(2),
        torch.ones(1, device="meta"),
    ],
)
def test_what_is_no_flag(value: object) -> None:
    with pytest.raises(RequestError, match=r"tiled_vae is .*; it can be True or False"):
        check_flag("tiled_vae", value)


def test_a_name_may_be_of_a_type_of_its_own() -> None:
    assert check_choice("sampler", np.str_("ddim"), ("euler", "ddim")) == "ddim"
