"""`runtime/serve/app.py`: any request is answered: never with a fault of the server's own, and nothing stays
behind."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from helpers.fake_runner import FakeRunner
from helpers.served import Served, served
from helpers.waiting import until
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from latentrt.runtime.serve.schema import GenerationBody, Limits

FIELDS = st.sampled_from(sorted(GenerationBody.model_fields))
NASTY = st.sampled_from(
    ["\ud800", "\x00", "64x64", "8x8", "0x0", "-8x8", "64x64\n", "1e9", "../..", "auto", "image/png", 10**400, -0.0]
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=200) | NASTY
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
BODIES = VALUES | st.dictionaries(FIELDS | st.text(max_size=20), VALUES, max_size=8)
VALID = (
    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 27\r\n"
    b'\r\n{"prompt": "x", "steps": 1}GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'
)
# 408: a machine that tests may need longer than `read` for any of them; 504: its own `timeout` may be a moment.
ALLOWED = {200, 400, 404, 405, 408, 413, 422, 429, 504}


def post(server: Served, content: bytes) -> Any:
    return server.client.post(
        "/v1/images/generations", content=content, headers={"Content-Type": "application/json"}
    )


def any_body(server: Served, body: Any) -> None:
    answer = post(server, json.dumps(body).encode())
    assert answer.status_code in ALLOWED, (body, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
        assert len(answer.text) < 1000


def one_bad_field(server: Served, field: tuple[str, Any]) -> None:
    """The answer names it, where it is bad."""
    name, value = field
    answer = post(server, json.dumps({"prompt": "x", "steps": 1, name: value}).encode())
    allowed = {200, 404, 408, 422} | ({429, 504} if name == "timeout" else set())
    assert answer.status_code in allowed, answer.text
    if answer.status_code not in (200, 408):
        assert answer.json()["error"]["param"] == name, answer.text


def bytes_for_a_body(server: Served, body: bytes) -> None:
    answer = post(server, body)
    assert answer.status_code in ALLOWED - {200} or json.loads(body)["prompt"]


def raw_bytes(server: Served, data: bytes) -> None:
    for status in re.findall(rb"HTTP/1\.1 (\d{3})", server.raw(data, half_close=False)):
        assert int(status) in ALLOWED | {401, 414, 431, 501}, (data, status)


def a_spoilt_request(server: Served, change: tuple[int, int, bytes]) -> None:
    start, length, put = change
    raw_bytes(server, VALID[:start] + put + VALID[start + length :])


SPOILT = st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), st.binary(max_size=12))
ATTACKS: list[tuple[Callable[[Served, Any], None], st.SearchStrategy[Any]]] = [
    (any_body, BODIES),
    (one_bad_field, st.tuples(FIELDS, VALUES)),
    (bytes_for_a_body, st.binary(max_size=300)),
    (raw_bytes, st.binary(max_size=300)),
    (a_spoilt_request, SPOILT),
]


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Megabytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024


@pytest.mark.parametrize(
    "seconds",
    [3, pytest.param(300, marks=[pytest.mark.full, pytest.mark.timeout(1200)])],
)
def test_any_request_is_answered_and_leaves_nothing_behind(
    seconds: int, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(pixels=512 * 512, steps=200, images=4, prompt=100, body=10_000, read=0.2)
    with served(FakeRunner, limits=limits, max_waiting=8) as server:
        _attacked(server, seconds)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def _attack(server: Served, turn: int) -> None:
    """Some of each kind."""
    for assault, strategy in ATTACKS:
        _drawn(partial(assault, server), strategy, turn)


def _drawn(assault: Callable[[Any], None], strategy: st.SearchStrategy[Any], turn: int) -> None:
    @seed(turn)
    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(value: Any) -> None:
        assault(value)

    one()


def _attacked(server: Served, seconds: int) -> None:
    _attack(server, 0)
    until(lambda: server.service.waiting + server.service.running == 0)
    before = files(), threading.active_count(), resident()
    turn, end = 1, time.monotonic() + seconds
    while time.monotonic() < end:
        _attack(server, turn)
        turn += 1
    print(f"{50 * turn} attacks")
    until(lambda: server.service.waiting + server.service.running == 0)
    until(lambda: gc.collect() + files() - before[0] <= 2)
    assert threading.active_count() <= before[1] + 4  # the loop's pool of threads may have grown to its size
    assert resident() - before[2] < 100
    until(lambda: server.ask(seed=1).status_code == 200)
