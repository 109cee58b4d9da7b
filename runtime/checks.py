"""Checks of single arguments, whose errors name the argument and the value, however odd or long that is."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from ..errors import RequestError

__all__ = ["check_choice", "check_flag", "check_integer", "check_items", "check_number", "shown"]

T = TypeVar("T", bound=str)

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def shown(value: object) -> str:
    """A value as Python writes it, for a message: of a long one its ends."""
    try:
        return re.sub(r"\s*\n\s*", " ", _BRIEF.repr(value))  # arrays and tensors are written in lines
    except ValueError:  # a whole number of more digits than Python writes
        return f"a {type(value).__name__}"


def check_choice(what: str, value: object, allowed: Sequence[T]) -> T:
    """One of several names.

    Raises:
        RequestError: it is none of them; they are listed.
    """
    for name in allowed:
        if isinstance(value, str) and value == name:
            return name
    raise RequestError(f"there is no {what} {shown(value)}; there are {', '.join(allowed)}")


def check_flag(name: str, value: Any) -> bool:
    """True or False, also as a number, array or tensor; None for False.

    Raises:
        RequestError: it is neither.
    """
    try:
        if value is None or value in (0, 1):
            return bool(value)
    except Exception:  # an array of several is neither equal to a number nor different
        pass
    raise RequestError(f"{name} is {shown(value)}; it can be True or False")


def check_integer(name: str, value: Any, low: int, high: int | None) -> int:
    """A whole number in bounds.

    Raises:
        RequestError: it is none, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} must be a whole number; got {shown(value)}")
    number = int(value)
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"{low} to {high}"
        raise RequestError(f"{name} is {shown(number)}; it must be {bound}")
    return number


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A number in bounds.

    Raises:
        RequestError: it is not a finite number, or out of bounds.
    """
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    # `not ... <` refuses NaN; huge integers compare without overflow.
    if not is_real or not abs(value) < math.inf:
        raise RequestError(f"{name} must be a finite number; got {shown(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name} is {shown(value)}; it must be between {low} and {high}")
    return float(value)


def check_items(name: str, value: Any, example: str) -> list[Any]:
    """The items of a list, tuple or the like.

    Raises:
        RequestError: it is none; `example` is one.
    """
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return list(value)
    except TypeError:
        pass
    raise RequestError(f"{name} must be a list, such as {example}; got {shown(value)}")
