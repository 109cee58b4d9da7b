"""How large an arena must be, by hand and for orders drawn at random."""

from __future__ import annotations

import random

from latentrt.runtime.arena import AllocatorEvent, arena_bytes

MB = 1 << 20


def test_what_fits_side_by_side() -> None:
    events = [(1, 8 * MB), (2, 16 * MB), (1, 0), (3, 8 * MB)]
    assert arena_bytes(events) == 24 * MB


def test_a_hole_too_small_is_of_no_use() -> None:
    """A tensor larger than the one that ended lies behind the one that is left."""
    events = [(1, 8 * MB), (2, 8 * MB), (1, 0), (3, 10 * MB)]  # 18 live
    assert arena_bytes(events) == 26 * MB


def test_neighbours_that_ended_are_one_hole() -> None:
    events = [(1, 8 * MB), (2, 8 * MB), (3, 8 * MB), (1, 0), (2, 0), (4, 16 * MB)]
    assert arena_bytes(events) == 24 * MB


def test_the_smallest_hole_that_fits_is_taken() -> None:
    first = [(1, 12 * MB), (2, 8 * MB), (3, 8 * MB), (4, 8 * MB)]
    events = [*first, (1, 0), (3, 0), (5, 8 * MB), (6, 12 * MB)]  # the 8 go where 8 were, so that the 12 fit
    assert arena_bytes(events) == 36 * MB


def test_a_little_more_than_is_asked_for_is_not_parted() -> None:
    events = [
        (1, 8 * MB),
        (2, 2 * MB),
        (1, 0),
        (3, 7 * MB),
        (4, MB + 1),
    ]  # the 1 MB that is left stays with the 7
    assert arena_bytes(events) == 12 * MB


def test_small_tensors_have_segments_of_their_own() -> None:
    assert arena_bytes([(1, 4), (2, MB)]) == 2 * MB
    assert arena_bytes([(1, 4), (2, MB), (3, MB)]) == 4 * MB
    assert arena_bytes([(1, 4), (2, 5 * MB)]) == 8 * MB  # 2, and 6
    assert arena_bytes([]) == 0


def test_any_order() -> None:
    rng = random.Random(0)
    for _ in range(50):
        events: list[AllocatorEvent] = []
        live: dict[int, int] = {}
        most = 0
        for number in range(1, 80):
            if live and rng.random() < 0.45:
                ended = rng.choice(list(live))
                events.append((ended, 0))
                del live[ended]
            live[number] = rng.randrange(2 * MB, 64 * MB, 512)
            events.append((number, live[number]))
            most = max(most, sum(live.values()))
        found = arena_bytes(events)
        assert most <= found <= 2 * most
        assert found % (2 * MB) == 0
