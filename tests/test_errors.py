"""`errors.py`: every error arrives whole in another process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from latentrt import errors
from latentrt.runtime.serve import retries, schema, service

MADE_FROM: dict[type[errors.LatentRTError], tuple[Any, ...]] = {
    errors.QueueFullError: ("the queue is full", 2.5),
    schema.FieldError: ("size", "size is 3x3"),
}


def tree(error: type[errors.LatentRTError]) -> Iterator[type[errors.LatentRTError]]:
    yield error
    for kind in error.__subclasses__():
        yield from tree(kind)


KINDS = sorted(set(tree(errors.LatentRTError)), key=lambda kind: kind.__name__)


def test_all_of_them_are_one_tree() -> None:
    assert {kind.__name__ for kind in KINDS} >= set(errors.__all__)
    assert {schema.FieldError, service.NotReadyError, retries.ReplicaLostError} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_is_copied_and_pickled_with_what_it_says(
    again: Callable[[Any], Any], kind: type[errors.LatentRTError]
) -> None:
    error = kind(*MADE_FROM.get(kind, ("the message",)))
    error.add_note("a note")
    twin = again(error)
    assert type(twin) is kind
    assert (str(twin), twin.args, vars(twin)) == (str(error), error.args, vars(error))
    assert vars(twin)["__notes__"] == ["a note"]
