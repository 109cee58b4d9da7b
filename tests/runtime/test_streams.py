"""How the host keeps its distance from the device: against a device that lags behind."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from fake_queue import FakeQueue
from latentrt.runtime import streams
from latentrt.runtime.denoise import Host, walk
from latentrt.runtime.sampler import SamplerTable, build_table
from latentrt.runtime.streams import Pace, queue_of
from sampler_oracle import config_of, make_scheduler

LATENTS = torch.zeros(1, 4, 2, 2)


def table(steps: int) -> SamplerTable:
    return build_table(config_of(make_scheduler("euler")), steps)


def host(queue: FakeQueue, pace: Pace, stop_before: int | None = None) -> Host:
    asked = [0]

    def should_stop() -> bool:
        queue.log.append("stop?")
        asked[0] += 1
        return asked[0] - 1 == stop_before

    return Host(pace, should_stop=should_stop)


def step(queue: FakeQueue) -> None:
    """A replay: it may be two ahead of the device, itself counted not."""
    assert queue.places - queue.done <= 2
    queue.log.append("step")


def test_before_a_step_the_host_waits_for_the_one_before_the_last_and_asks_whether_to_stop() -> None:
    queue = FakeQueue()
    walk(LATENTS, lambda: step(queue), table(4), host(queue, Pace(queue)))
    assert queue.log == [
        *("stop?", "step", "record 1"),
        *("stop?", "step", "record 2"),
        *("wait 1", "stop?", "step", "record 3"),
        *("wait 2", "stop?", "step", "record 4"),
    ]


def test_the_host_waits_for_nothing_else() -> None:
    """Of 30 steps the last two are still under way when the loop has ended."""
    queue = FakeQueue()
    walk(LATENTS, lambda: step(queue), table(30), host(queue, Pace(queue)))
    assert [line for line in queue.log if line.startswith("wait")] == [f"wait {k}" for k in range(1, 29)]


def test_an_interruption_is_seen_before_the_next_step_is_given() -> None:
    queue = FakeQueue()
    walk(LATENTS, lambda: step(queue), table(30), host(queue, Pace(queue), stop_before=3))
    assert queue.log.count("step") == 3
    assert queue.log[-2:] == ["wait 2", "stop?"]


def test_a_loop_that_follows_another_keeps_its_distance_too() -> None:
    queue = FakeQueue()
    pace = Pace(queue)
    for _ in range(2):
        walk(LATENTS, lambda: step(queue), table(3), host(queue, pace))
    second = queue.log.index("record 3") + 1
    assert queue.log[second : second + 4] == ["wait 2", "stop?", "step", "record 4"]
    assert [line for line in queue.log if line.startswith("wait")] == [f"wait {k}" for k in range(1, 5)]


def test_a_callback_sees_a_step_that_is_done() -> None:
    queue = FakeQueue()

    def on_step(index: int, timestep: float, latents: torch.Tensor) -> None:
        assert queue.done == queue.places
        queue.log.append("callback")

    walk(LATENTS, lambda: step(queue), table(2), Host(Pace(queue), on_step=on_step))
    first = ("step", "record 1", "record 2", "wait 2", "callback")
    assert queue.log == [*first, "step", "record 3", "record 4", "wait 4", "callback"]


def test_on_the_cpu_work_is_done_when_it_was_given() -> None:
    queue, done = queue_of(torch.device("cpu")), []
    begun = queue.record(timed=True)
    time.sleep(0.002)
    ended = queue.on_side_stream(lambda: done.append(1))
    assert done == [1]
    assert ended.query()
    assert begun.elapsed_time(ended) >= 2


def test_all_work_beside_a_device_s_own_shares_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries keep memory for each stream they ever saw."""
    made: list[torch.device] = []
    waited: list[str] = []
    current = SimpleNamespace(record_event=lambda: "now")
    here, there = (torch.device("cuda", k) for k in range(2))
    monkeypatch.setattr(streams, "_side", cache(streams._side.__wrapped__))  # forgets the stand-ins
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda device: made.append(device) or SimpleNamespace(wait_event=waited.append)
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    done: list[int] = []
    for k in range(3):
        queue_of(here).on_side_stream(lambda k=k: done.append(k))  # type: ignore[misc]
    queue_of(there).on_side_stream(lambda: done.append(3))
    assert (made, waited, done) == ([here, there], ["now"] * 4, [0, 1, 2, 3])
