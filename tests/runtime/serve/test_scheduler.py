"""Who is served next, on a clock that is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from latentrt.runtime.serve.requests import Group
from latentrt.runtime.serve.scheduler import Scheduler

SMALL = Group(64, 64, 10, True, None, 0.8, False)
LARGE = SMALL._replace(height=128, width=128)


@dataclass(eq=False)
class Waiting:
    group: Group
    since: float = 0.0
    timeout: float | None = None


def queue(max_batch: int = 4, window: float = 0.0) -> Scheduler[Waiting]:
    return Scheduler(max_batch=max_batch, window=window)


def added(scheduler: Scheduler[Waiting], *groups: Group, since: float = 0.0) -> list[Waiting]:
    jobs = [Waiting(group, since + k / 1000) for k, group in enumerate(groups)]
    for job in jobs:
        scheduler.add(job)
    return jobs


def sizes_served(scheduler: Scheduler[Waiting]) -> list[tuple[int, int]]:
    """(height, images) of each batch until nothing waits."""
    served = []
    while batch := scheduler.take(20.0):
        served.append((batch[0].group.height, len(batch)))
    assert not scheduler
    assert scheduler.ready_at() is None
    return served


@pytest.mark.parametrize(
    "other",
    [
        SMALL._replace(steps=11),
        SMALL._replace(guided=False),
        SMALL._replace(sampler="ddim"),
        SMALL._replace(high_noise_frac=0.5),
        SMALL._replace(negative=True),
        SMALL._replace(width=72),
    ],
)
def test_only_what_can_share_a_call_does(other: Group) -> None:
    scheduler = queue()
    a, b, c = added(scheduler, SMALL, other, SMALL)
    assert scheduler.take(1.0) == [a, c]
    assert scheduler.take(1.0) == [b]


def test_a_batch_is_bounded_and_in_order_of_arrival() -> None:
    scheduler = queue(max_batch=2)
    a, b, c = added(scheduler, SMALL, SMALL, SMALL)
    assert scheduler.take(1.0) == [a, b]
    assert scheduler.take(1.0) == [c]


def test_company_is_waited_for_within_the_window_and_no_longer_than_needed() -> None:
    scheduler = queue(max_batch=2, window=0.5)
    added(scheduler, SMALL, since=10.0)
    assert scheduler.ready_at() == 10.5
    assert scheduler.take(10.4) == []
    added(scheduler, SMALL, since=10.4)
    assert scheduler.ready_at() == 10.0  # full: at once
    assert len(scheduler.take(10.4)) == 2
    added(scheduler, SMALL, since=11.0)
    assert len(scheduler.take(11.5)) == 1


def test_a_full_batch_is_served_before_one_that_may_still_grow() -> None:
    scheduler = queue(max_batch=2, window=0.5)
    added(scheduler, SMALL, since=0.0)
    added(scheduler, LARGE, LARGE, since=0.1)
    assert [job.group for job in scheduler.take(0.2)] == [LARGE, LARGE]


def test_a_flood_of_one_size_does_not_starve_another() -> None:
    scheduler = queue(max_batch=2)
    added(scheduler, *[SMALL] * 20)
    added(scheduler, LARGE, since=1.0)
    assert sizes_served(scheduler)[:2] == [(64, 2), (128, 1)]


def test_turns_are_by_work_not_by_number() -> None:
    """An image of 128x128 is the work of four of 64x64."""
    scheduler = queue(max_batch=1)
    added(scheduler, *[SMALL, LARGE] * 12)
    first = [height for height, _ in sizes_served(scheduler)[:15]]
    assert first.count(64) == 12
    assert first.count(128) == 3


def test_idleness_saves_nothing_up() -> None:
    scheduler = queue(max_batch=1)
    added(scheduler, *[SMALL] * 50)
    for _ in range(40):
        scheduler.take(1.0)
    added(scheduler, *[LARGE] * 10, since=2.0)
    first = [height for height, _ in sizes_served(scheduler)[:10]]
    assert first.count(128) <= 3  # 40 turns of the other's would be worth ten


def test_emptying_the_queue_does_not_clear_the_bill() -> None:
    """One at a time, always there again: it must not come out as new each time."""
    scheduler = queue(max_batch=1)
    added(scheduler, *[SMALL] * 8)
    served = []
    for k in range(8):
        added(scheduler, LARGE, since=1.0 + k)
        served.append(scheduler.take(100.0)[0].group.height)
        if served[-1] == 64:
            for job in [job for job in scheduler if job.group == LARGE]:
                scheduler.remove(job)
    assert served.count(128) <= 3


def test_a_cancelled_request_is_not_served() -> None:
    scheduler = queue()
    a, b = added(scheduler, SMALL, SMALL)
    scheduler.remove(a)
    scheduler.remove(a)  # again: nothing happens
    assert list(scheduler) == [b]
    assert scheduler.take(1.0) == [b]
    scheduler.remove(b)
    assert scheduler.take(1.0) == []


def test_a_size_that_did_not_fit_gets_smaller_batches() -> None:
    scheduler = queue(max_batch=8)
    scheduler.limit(LARGE.size, 2)
    scheduler.limit(LARGE.size, 5)  # a limit is never raised
    added(scheduler, *[LARGE] * 5, *[SMALL] * 5)
    assert sorted(sizes_served(scheduler)) == [(64, 5), (128, 1), (128, 2), (128, 2)]


def test_only_batches_of_the_sizes_named_are_formed() -> None:
    """The oldest go first, and the rest waits for the next call, which newcomers may share."""
    scheduler: Scheduler[Waiting] = Scheduler(max_batch=6, window=0.0, batches=(1, 2, 4, 6))
    jobs = added(scheduler, *[SMALL] * 5)
    assert scheduler.take(1.0) == jobs[:4]
    later = added(scheduler, *[SMALL] * 2, since=2.0)
    assert scheduler.take(3.0) == [jobs[4], later[0]]
    assert scheduler.take(3.0) == [later[1]]
    added(scheduler, *[SMALL] * 7)
    assert sizes_served(scheduler) == [(64, 6), (64, 1)]


def test_a_rest_does_not_wait_for_company_again() -> None:
    scheduler: Scheduler[Waiting] = Scheduler(max_batch=4, window=0.5, batches=(1, 2, 4))
    jobs = added(scheduler, *[SMALL] * 3, since=10.0)
    assert scheduler.take(10.4) == []  # a fourth would fill it
    assert scheduler.take(10.6) == jobs[:2]
    assert scheduler.take(10.6) == jobs[2:]


def test_a_rest_goes_before_a_flood_that_has_been_served_as_much() -> None:
    """What a size pays is its work, in however many calls."""
    scheduler: Scheduler[Waiting] = Scheduler(max_batch=4, window=0.0, batches=(1, 2, 4))
    added(scheduler, *[SMALL] * 3)
    added(scheduler, *[SMALL._replace(width=72)] * 40, since=1.0)
    served = [len(scheduler.take(2.0)) for _ in range(3)]
    assert served == [2, 4, 1]


def test_looking_ahead_forms_the_same_batches() -> None:
    scheduler: Scheduler[Waiting] = Scheduler(max_batch=4, window=0.0, batches=(1, 2, 4))
    added(scheduler, *[SMALL] * 3)
    ahead = scheduler.ahead([])
    assert [len(ahead.take_soon(1.0)) for _ in range(3)] == [2, 1, 0]


def test_a_limit_is_a_size_that_is_formed() -> None:
    scheduler: Scheduler[Waiting] = Scheduler(max_batch=6, window=0.5, batches=(1, 2, 4, 6))
    scheduler.limit(SMALL.size, 3)
    sizes = []
    for _ in range(201):
        added(scheduler, *[SMALL] * (6 - len(scheduler)))
        sizes.append(len(scheduler.take(0.1)))  # full, so there is nothing to wait for
    assert sizes == [2] * 100 + [4] * 100 + [6]


def test_a_group_knows_its_work() -> None:
    assert SMALL.cost == 64 * 64 * 10 * 2
    assert replace(Waiting(SMALL), group=SMALL._replace(guided=False)).group.cost == 64 * 64 * 10


def test_sizes_that_are_ever_new_do_not_starve_one_that_waits() -> None:
    """Each of them has paid nothing, and would go before who has."""
    scheduler = queue(max_batch=1)
    added(scheduler, LARGE, LARGE)
    assert scheduler.take(0.0)[0].group == LARGE
    served = []
    for second in range(40):
        added(scheduler, SMALL._replace(width=72 + 8 * second), since=float(second))
        served.append(scheduler.take(float(second))[0].group)
    assert served.index(LARGE) == 31  # 30 s after it came


def test_age_counts_for_every_other_call_and_sooner_where_time_is_short() -> None:
    scheduler = queue(max_batch=1)
    flood = added(scheduler, *[LARGE] * 4)
    for job in flood[2:]:
        job.timeout = 200.0  # of which half is more than all are given
    flood[0].timeout = 10.0
    assert scheduler.take(0.0) == [flood[0]]
    small = added(scheduler, *[SMALL] * 8, since=29.0)
    served = [scheduler.take(100.0)[0] for _ in range(4)]
    assert served == [flood[1], small[0], flood[2], small[1]]
    hurried = added(scheduler, SMALL._replace(width=72), since=101.0)
    hurried[0].timeout = 2.0
    assert scheduler.take(102.5) == [flood[3]]  # older still


def test_what_is_remembered_of_sizes_is_bounded() -> None:
    scheduler = queue(max_batch=1)
    for k in range(1000):
        added(scheduler, SMALL._replace(width=64 + 8 * k), since=float(k))
        scheduler.take(float(k))
    assert len(scheduler._paid) <= 64


def test_a_limit_is_tried_to_be_raised_after_a_while() -> None:
    """Another program may have left the device meanwhile."""
    scheduler = queue(max_batch=8)
    scheduler.limit(SMALL.size, 3)
    sizes = []
    for _ in range(205):
        added(scheduler, *[SMALL] * (8 - len(scheduler)))
        sizes.append(len(scheduler.take(1.0)))
    assert sizes == [3] * 100 + [6] * 100 + [8] * 5
    scheduler.limit(SMALL.size, 2)
    added(scheduler, SMALL)
    for _ in range(150):
        scheduler.take(1.0)
        added(scheduler, SMALL)
    added(scheduler, *[SMALL] * 8)
    assert len(scheduler.take(1.0)) == 2  # smaller calls prove nothing
