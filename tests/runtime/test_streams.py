"""`runtime/streams.py` and `progress.py`: how far the host may run ahead of the device, against a device that lags
behind."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_stream import FakeStream
from helpers.sampler_oracle import config_of, make_scheduler
from latentrt.runtime import streams
from latentrt.runtime.denoise import run_steps
from latentrt.runtime.progress import CallProgress
from latentrt.runtime.sampler import SamplerTable, build_table
from latentrt.runtime.streams import current_stream

LATENTS = torch.zeros(1, 4, 2, 2)


def table(steps: int) -> SamplerTable:
    return build_table(config_of(make_scheduler("euler")), steps)


class Stop(threading.Event):
    """Set when it is asked for the `before`th time, from 0; each time is logged."""

    def __init__(self, stream: FakeStream, before: int | None = None) -> None:
        super().__init__()
        self._log, self._before, self._asked = stream.log, before, 0

    def is_set(self) -> bool:
        self._log.append("stop?")
        self._asked += 1
        return self._asked - 1 == self._before


def progress_of(stream: FakeStream, stop_before: int | None = None) -> CallProgress:
    progress = CallProgress(4, {"disable": True}, LATENTS.device)
    progress.stop = Stop(stream, stop_before)
    return progress


def step(stream: FakeStream) -> None:
    """A replay: it may be two ahead of the device, itself counted not."""
    assert stream.places - stream.done <= 2
    stream.log.append("step")


def test_before_a_step_the_host_waits_for_the_one_before_the_last_and_asks_whether_to_stop(
    stream: FakeStream,
) -> None:
    run_steps(LATENTS, lambda: step(stream), table(4), progress_of(stream))
    assert stream.log == [
        *("stop?", "step", "record 1"),
        *("stop?", "step", "record 2"),
        *("wait 1", "stop?", "step", "record 3"),
        *("wait 2", "stop?", "step", "record 4"),
    ]


def test_the_host_waits_for_nothing_else(stream: FakeStream) -> None:
    """Of 30 steps the last two are still under way when the loop has ended."""
    run_steps(LATENTS, lambda: step(stream), table(30), progress_of(stream))
    assert [line for line in stream.log if line.startswith("wait")] == [f"wait {k}" for k in range(1, 29)]


def test_an_interruption_is_seen_before_the_next_step_is_given(stream: FakeStream) -> None:
    run_steps(LATENTS, lambda: step(stream), table(30), progress_of(stream, stop_before=3))
    assert stream.log.count("step") == 3
    assert stream.log[-2:] == ["wait 2", "stop?"]


def test_a_loop_that_follows_another_keeps_its_distance_too(stream: FakeStream) -> None:
    progress = progress_of(stream)
    for _ in range(2):
        run_steps(LATENTS, lambda: step(stream), table(3), progress)
    second = stream.log.index("record 3") + 1
    assert stream.log[second : second + 4] == ["wait 2", "stop?", "step", "record 4"]
    assert [line for line in stream.log if line.startswith("wait")] == [f"wait {k}" for k in range(1, 5)]


def test_a_callback_sees_a_step_that_is_done(stream: FakeStream) -> None:
    def on_step(index: int, timestep: float, values: dict[str, Any]) -> None:
        assert stream.done == stream.places
        stream.log.append("callback")

    progress = CallProgress(2, {"disable": True}, LATENTS.device, on_step=on_step)
    run_steps(LATENTS, lambda: step(stream), table(2), progress)
    first = ("step", "record 1", "record 2", "wait 2", "callback")
    assert stream.log == [*first, "step", "record 3", "record 4", "wait 4", "callback"]


def test_on_the_cpu_work_is_done_when_it_was_given() -> None:
    stream, done = current_stream(torch.device("cpu")), []
    begun = stream.record_event(timed=True)
    time.sleep(0.002)
    ended = stream.on_side_stream(lambda: done.append(1))
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
        current_stream(here).on_side_stream(lambda k=k: done.append(k))  # type: ignore[misc]
    current_stream(there).on_side_stream(lambda: done.append(3))
    assert (made, waited, done) == ([here, there], ["now"] * 4, [0, 1, 2, 3])
