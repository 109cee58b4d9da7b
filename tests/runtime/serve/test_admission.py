"""`runtime/serve/admission.py` and `call_times.py`: which requests are admitted, on a clock that tests move:
estimates, and overload played through."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from latentrt.errors import QueueFullError, RequestError
from latentrt.runtime.serve.admission import Admission
from latentrt.runtime.serve.call_times import CallTimes
from latentrt.runtime.serve.requests import Group
from latentrt.runtime.serve.scheduler import Scheduler

SMALL = Group(64, 64, 10, True, None, 0.8, False)
LARGE = SMALL._replace(height=128, width=128)


def test_estimates_are_what_the_measurements_prove() -> None:
    times, size, other = CallTimes(), (64, 64), (128, 128)
    assert times.seconds(size, 100.0, 0.0) == 0
    times.learn(size, 100.0, 2.0, 0.0)
    for asked in (size, other):
        assert times.seconds(asked, 100.0, 0.0) == 2
        assert times.seconds(asked, 1e9, 0.0) == 2  # of more work it is known that it takes no less
        assert times.seconds(asked, 50.0, 0.0) == 1  # of less, that it takes at least its share
    times.learn(size, 1e6, 30.0, 0.0)
    assert times.seconds(size, 1e5, 0.0) == 3
    assert times.seconds(size, 100.0, 0.0) == 2
    times.learn(other, 100.0, 1.0, 0.0)
    assert times.seconds(other, 1e6, 0.0) == pytest.approx(1)  # its own size says more than others


def test_measurements_are_averaged_and_forgotten() -> None:
    times, size = CallTimes(), (64, 64)
    for _ in range(30):
        times.learn(size, 100.0, 1.0, 0.0)
    times.learn(size, 100.0, 11.0, 1.0)
    assert 2 < times.seconds(size, 100.0, 1.0) < 6
    assert times.seconds(size, 100.0, 700.0) == 0  # what keeps requests out cannot be measured again
    times.learn(size, 100.0, 1.0, 700.0)
    assert times.seconds(size, 100.0, 700.0) == 1
    for work in range(1, 1001):
        times.learn(size, float(work), 1.0, 700.0)
    assert len(times._seen) <= 64


def test_other_work_on_the_machine_is_learnt_from_calls_of_any_kind() -> None:
    times, sizes = known(), SIZES
    for size in sizes[:3]:
        times.learn(size, 100.0, 2.0, 1.0)
    assert 1.5 < times.seconds(sizes[3], 100.0, 1.0) < 2
    for _ in range(30):
        for size in sizes:
            times.learn(size, 100.0, 1.0, 2.0)
    assert times.seconds(sizes[3], 100.0, 2.0) == pytest.approx(1.0, rel=0.02)
    times.learn(sizes[0], 50.0, 0.75, 2.0)  # between its share and the whole
    times.learn((8, 8), 100.0, 0.01, 2.0)  # another size says nothing of these
    assert times.seconds(sizes[3], 100.0, 2.0) == pytest.approx(1.0, rel=0.02)
    times.learn(sizes[0], 200.0, 4.0, 2.0)  # twice of what twice the work can take
    assert 1.2 < times.seconds(sizes[3], 100.0, 2.0) < 1.4


@pytest.mark.parametrize("jitter", [0.03, 0.1, 0.3])
def test_chance_does_not_add_up(jitter: float) -> None:
    """Thousands of calls of one kind, as long or short as it happens, say nothing of another."""
    times, dice = known(), random.Random(4)
    for k in range(5000):
        times.learn(SIZES[0], 100.0, dice.uniform(1 - jitter, 1 + jitter), k / 10)
        assert 1 - jitter < times.seconds(SIZES[1], 100.0, k / 10) < 1 + jitter


def test_the_first_call_of_a_size_says_nothing_of_others_and_one_bad_call_little() -> None:
    times = known()
    times.learn((8, 8), 100.0, 10.0, 1.0)  # it allocates, or records a graph
    for _ in range(5):
        times.learn((8, 8), 100.0, 1.0, 1.0)
        assert times.seconds(SIZES[0], 100.0, 1.0) == pytest.approx(1.0)
    assert times.seconds((8, 8), 100.0, 1.0) == pytest.approx(1.0)
    times.learn(SIZES[0], 100.0, 600.0, 2.0)  # it hung
    assert times.seconds(SIZES[1], 100.0, 2.0) < 2
    for _ in range(20):
        times.learn(SIZES[0], 100.0, 1.0, 2.0)
    assert 0.9 < times.seconds(SIZES[1], 100.0, 2.0) < 1.1
    times.learn(SIZES[0], 100.0, 0.0, 3.0)  # a clock that did not move


SIZES = [(64, 64), (64, 72), (64, 80), (64, 88)]


def known() -> CallTimes:
    """Of each size it was seen that such a call takes a second."""
    times = CallTimes()
    for size in SIZES:
        for _ in range(2):
            times.learn(size, 100.0, 1.0, 0.0)
    return times


@dataclass(eq=False)
class Waiting:
    group: Group
    since: float
    timeout: float | None = None


def test_the_queue_as_it_will_be_made() -> None:
    queue: Scheduler[Waiting] = Scheduler(max_batch=4, window=0.0)
    for k in range(10):
        queue.add(Waiting(SMALL, float(k)))
    queue.limit(LARGE.size, 2)
    for k in range(2):
        queue.add(Waiting(LARGE, 20.0 + k))
    newest = Waiting(LARGE, 30.0)
    ahead = queue.ahead([newest])
    calls = list(iter(lambda: ahead.take_soon(30.0), []))
    assert [(call[0].group.height, len(call)) for call in calls] == [
        (64, 4),
        (128, 2),
        (64, 4),
        (64, 2),
        (128, 1),
    ]
    assert calls[-1] == [newest]
    assert len(queue) == 12  # nothing was taken


def test_a_rare_size_is_admitted_despite_a_long_queue_of_another() -> None:
    queue: Scheduler[Waiting] = Scheduler(max_batch=1, window=0.0)
    admission = Admission(queue, max_waiting=60)
    admission.call_times.learn(SMALL.size, SMALL.cost, 1.0, 0.0)
    for _ in range(50):
        queue.add(Waiting(SMALL, 0.0))
    with pytest.raises(
        QueueFullError, match=r"with 50 images queued .* take an estimated 51.0 to 127.5 s"
    ) as full:
        admission.check([SMALL], 100.0, 0.0)
    assert full.value.retry_after == 28
    admission.check([SMALL._replace(width=72)], 100.0, 0.0)  # of another size, it has its turn soon
    admission.begin([Waiting(SMALL, 0.0)], 0.0)
    with pytest.raises(QueueFullError, match=r"would take an estimated 51.4 to 128.5 s"):
        admission.check([SMALL], 100.0, 0.6)
    admission.end()
    with pytest.raises(QueueFullError, match=r"50 of 60 places are taken, .*; try again in 50 s"):
        admission.check([SMALL] * 11, None, 0.6)
    with pytest.raises(QueueFullError, match=r"timeout is 100.3 s; try again in 28 s") as full:
        admission.check([SMALL], 100.3, 0.0)
    assert full.value.retry_after == 28  # the header's, in whole seconds


def test_more_at_once_than_may_ever_wait_are_refused_for_good() -> None:
    admission = Admission(Scheduler(max_batch=4, window=0.0), max_waiting=3)
    with pytest.raises(
        RequestError, match=r"^the request asks for 4 images, and at most 3 may wait; ask for fewer$"
    ):
        admission.check([SMALL] * 4, None, 0.0)
    admission.check([SMALL] * 3, None, 0.0)


def test_a_request_that_would_delay_admitted_ones_is_refused() -> None:
    queue: Scheduler[Waiting] = Scheduler(max_batch=4, window=0.0)
    admission = Admission(queue, max_waiting=60)
    other = SMALL._replace(width=72)
    for group in (SMALL, other, LARGE):
        for images in range(1, 5):
            work = images * group.cost
            admission.call_times.learn(group.size, work, work / SMALL.cost, 0.0)
    queue.add(Waiting(SMALL, 0.0, 6.0))
    admission.begin([Waiting(SMALL, 0.0)], 0.0)
    queue.add(Waiting(SMALL, 0.0, 6.0))  # made after 3 s, with a margin of two
    with pytest.raises(QueueFullError, match=r"^2 images are queued, .* try again in 4 s$"):
        admission.check([SMALL], None, 0.0)  # would make their call longer
    admission.check([LARGE], 60.0, 0.0)  # after them, as its size has its turn already
    queue.remove(next(iter(queue)))
    admission.check([SMALL], None, 0.0)  # after 3 s again
    late = Waiting(other, 0.0, 0.5)
    queue.add(late)
    admission.check([LARGE], None, 0.0)  # nor does one that will be late anyway keep others out


def test_without_deadlines_nothing_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hold up the event loop for as long as the queue is, at each that joins it."""
    queue: Scheduler[Waiting] = Scheduler(max_batch=4, window=0.0)
    admission = Admission(queue, max_waiting=5000)
    forecasts: list[Sequence[object]] = []
    forecast = admission._forecast
    monkeypatch.setattr(
        admission, "_forecast", lambda coming, now: forecasts.append(coming) or forecast(coming, now)
    )
    for k in range(5):
        admission.check([SMALL], None, float(k))
        queue.add(Waiting(SMALL, float(k)))
    assert forecasts == []
    admission.check([SMALL], 100.0, 5.0)
    queue.add(Waiting(SMALL, 5.0, 100.0))
    admission.check([SMALL], None, 6.0)
    assert len(forecasts) == 2


def test_a_size_is_not_kept_out_for_ever() -> None:
    """Small ones with little time come faster than they are made; a large one comes again and again."""
    dice = random.Random(5)
    queue: Scheduler[Waiting] = Scheduler(max_batch=8, window=0.0)
    admission = Admission(queue, max_waiting=64)
    takes = {SMALL: 0.5, LARGE: 8.0}
    for group, seconds in takes.items():
        for images in (1, 8):
            for _ in range(2):
                admission.call_times.learn(group.size, images * group.cost, seconds * images / 8, 0.0)
    now = free = next_large = 0.0
    running: list[Waiting] = []
    let_in: list[float] = []
    late = made = 0
    while now < 200.0:
        if running and now >= free:
            admission.end()
            made += len(running)
            late += sum(now - job.since > (job.timeout or 0.0) for job in running)
            running = []
        group, timeout = (SMALL, 2.5)
        if now >= next_large:
            group, timeout = (LARGE, 600.0)
            next_large = now + 5.0
        try:
            admission.check([group], timeout, now)
            queue.add(Waiting(group, now, timeout))
            if group is LARGE:
                let_in.append(now)
        except QueueFullError:
            pass
        if not running and (running := queue.take(now)):
            free = now + takes[running[0].group] * len(running) / 8
            admission.begin(running, now)
        now += dice.expovariate(1.3 * 8 / 0.5)
    assert len(let_in) >= 3
    assert max(np.diff([0.0, *let_in, 200.0])) < 60.0
    assert late <= 0.05 * made


def test_a_first_call_that_takes_long_says_nothing_of_what_waits() -> None:
    queue: Scheduler[Waiting] = Scheduler(max_batch=4, window=0.0)
    admission = Admission(queue, max_waiting=60)
    for _ in range(2):
        admission.call_times.learn(SMALL.size, SMALL.cost, 1.0, 0.0)
    admission.begin([Waiting(LARGE, 0.0)], 0.0)  # of which nothing is known
    admission.check([SMALL], 60.0, 100.0)
    admission.begin([Waiting(SMALL, 0.0)], 0.0)  # should have been made long ago
    with pytest.raises(QueueFullError, match=r"would take an estimated 100.0 to 250.0 s"):
        admission.check([SMALL], 60.0, 100.0)
    admission.check([], 60.0, 100.0)


@pytest.mark.parametrize("sizes", [2, 5])
@pytest.mark.parametrize("max_batch", [1, 4])
def test_overload(max_batch: int, sizes: int) -> None:
    """Five times what can be made comes, with 20 s for each: 99 % of what is let in is in time."""
    alone = {SMALL._replace(width=64 * k, height=64): 0.5 + 0.5 * k for k in range(1, sizes + 1)}
    took, refused = overloaded(alone, max_batch, deadline=20.0, end=240.0)
    assert np.percentile(took, 99) <= 20.0
    assert refused > 2 * len(took)
    best = max_batch * 240.0 / np.mean(list(alone.values()))
    assert len(took) >= 0.8 * best  # nor was the device left idle


@pytest.mark.parametrize("sizes", [3, 6])
@pytest.mark.parametrize("fixed", [0.0, 0.3])
def test_overload_with_time_for_five_calls(fixed: float, sizes: int) -> None:
    """Each image of a call adds to it, and sizes that come later take turns with those that wait."""
    full = {SMALL._replace(width=64 + 8 * k): 0.53 for k in range(sizes)}
    took, refused = overloaded(full, 8, deadline=2.74, end=45.0, fixed=fixed)
    assert np.percentile(took, 99) <= 2.74
    assert refused > 2 * len(took)
    assert len(took) >= 0.8 * 8 * 45.0 / 0.53


@pytest.mark.parametrize("slower", [1.6, 2.0])
def test_overload_on_a_machine_that_turns_slow(slower: float) -> None:
    """By the work of refusing, for one."""
    full = {SMALL._replace(width=64 + 8 * k): 0.53 for k in range(3)}
    took, _ = overloaded(full, 8, deadline=2.74, end=30.0, fixed=0.3, slower=slower)
    assert np.percentile(took, 99) <= 2.74


def overloaded(
    full: dict[Group, float],
    max_batch: int,
    *,
    deadline: float,
    end: float,
    fixed: float = 1.0,
    slower: float = 1.0,
) -> tuple[list[float], int]:
    """Requests of kinds whose full calls take so long, played through: how long each took, how many were refused.

    `fixed` is the part of a call's time that one image takes as well; calls take `slower` times what they are known to.
    """
    dice = random.Random(3)
    queue: Scheduler[Waiting] = Scheduler(max_batch=max_batch, window=0.0)
    admission = Admission(queue, max_waiting=64)
    now, free, came, busy = 0.0, 0.0, 0.0, 0.0
    gap = np.mean(list(full.values())) / (5 * max_batch)
    for group, seconds in full.items():
        for images in range(1, max_batch + 1):
            share = fixed + (1 - fixed) * images / max_batch
            for _ in range(2):
                admission.call_times.learn(group.size, images * group.cost, seconds * share, 0.0)
    running: list[Waiting] = []
    refused = 0
    took: list[float] = []
    while now < end:
        now = min(came, free) if running else came
        if running and now >= free:
            admission.end()
            admission.call_times.learn(
                running[0].group.size, sum(job.group.cost for job in running), busy, now
            )
            took += [now - job.since for job in running]
            running = []
        if now >= came:
            group = dice.choice(list(full))
            try:
                admission.check([group], deadline, now)
                queue.add(Waiting(group, now, deadline))
            except QueueFullError:
                refused += 1
            came = now + dice.expovariate(1 / gap)
        if not running and (running := queue.take(now)):
            share = fixed + (1 - fixed) * len(running) / max_batch
            busy = full[running[0].group] * share * slower * dice.uniform(0.8, 1.2)
            free = now + busy
            admission.begin(running, now)
    return took, refused
