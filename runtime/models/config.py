"""Reading a component's config.json: each field is used, known to change nothing, or an error naming it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...errors import UnsupportedConfigError

__all__ = ["DEEPEST", "Fields"]

DEEPEST = 100
"""Layers in a row. Published models have 48 at most; millions would be built for hours before their weights are seen to
be missing."""


class Fields:
    """The fields of one config.json, read once and checked as they are read.

    Args:
        component: named in errors, such as `unet`.
        raw: the parsed config.json. Keys that begin with `_` and those in `inert` are passed over.
        defaults: the fields the model reads, with the values they have when absent.
        fixed: fields the model has one meaning for, with a test of the value and what it must be.
        inert: fields that say nothing about what the network computes.

    Raises:
        UnsupportedConfigError: a fixed field has another value, or an unknown field is set at all.
    """

    def __init__(
        self,
        component: str,
        raw: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any],
        fixed: Mapping[str, tuple[Callable[[Any], bool], str]],
        inert: Collection[str] = (),
    ) -> None:
        self.component = component
        self._values = dict(defaults)
        for field, value in raw.items():
            if field.startswith("_") or field in inert:
                continue
            if field in defaults:
                self._values[field] = value
            elif field in fixed:
                holds, need = fixed[field]
                if not holds(value):
                    raise self.unsupported(field, value, need)
            elif value is not None:
                raise self.unsupported(field, value, "absent: latentrt does not know this field")

    def unsupported(self, field: str, value: object, need: str) -> UnsupportedConfigError:
        """The error to raise for a field."""
        return UnsupportedConfigError(
            f"{self.component} configuration: {field}={value!r} is not supported; it must be {need}"
        )

    def _of(self, field: str, kind: type | tuple[type, ...], need: str) -> Any:
        value = self._values[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.unsupported(field, value, need)
        return value

    def integer(self, field: str, most: int | None = None) -> int:
        """A positive integer, and not above `most`."""
        need = "a positive integer" if most is None else f"an integer from 1 to {most}"
        value = int(self._of(field, int, need))
        if value < 1 or (most is not None and value > most):
            raise self.unsupported(field, value, need)
        return value

    def optional_integer(self, field: str) -> int | None:
        """A positive integer, or None."""
        return None if self._values[field] is None else self.integer(field)

    def number(self, field: str) -> float:
        return float(self._of(field, (int, float), "a number"))

    def flag(self, field: str) -> bool:
        """True or false; published files also write null for false."""
        return False if self._values[field] is None else bool(self._of(field, bool, "true or false"))

    def string(self, field: str, choices: Collection[str]) -> str:
        value = self._of(field, str, f"one of {', '.join(choices)}")
        if value not in choices:
            raise self.unsupported(field, value, f"one of {', '.join(choices)}")
        return str(value)

    def optional_string(self, field: str, choices: Collection[str]) -> str | None:
        return None if self._values[field] is None else self.string(field, choices)

    def integers(self, field: str) -> tuple[int, ...]:
        """A list of positive integers, at least one."""
        values = self._of(field, (list, tuple), "a list of positive integers")
        if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise self.unsupported(field, values, "a list of positive integers")
        return tuple(values)

    def strings(self, field: str, choices: Collection[str], length: int) -> tuple[str, ...]:
        """A list of `length` strings, each of `choices`."""
        need = f"a list of {length}, each one of {', '.join(choices)}"
        values = self._of(field, (list, tuple), need)
        if len(values) != length or any(v not in choices for v in values):
            raise self.unsupported(field, values, need)
        return tuple(values)

    def per_level(self, field: str, levels: int, most: int | None = None) -> tuple[int, ...]:
        """One positive integer for all levels, or a list with one for each; none above `most`."""
        if not isinstance(self._values[field], (list, tuple)):
            return (self.integer(field, most),) * levels
        values = self.integers(field)
        if most is not None and max(values) > most:
            raise self.unsupported(field, list(values), f"integers from 1 to {most}")
        if len(values) != levels:
            raise self.unsupported(field, list(values), f"one integer or a list of {levels}")
        return values

    def size(self, field: str) -> tuple[int, int] | None:
        """(height, width), from one number for both, a pair, or None."""
        if self._values[field] is None:
            return None
        height, width = self.per_level(field, 2)
        return height, width
