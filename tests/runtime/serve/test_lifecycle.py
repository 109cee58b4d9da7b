"""`runtime/serve/service.py` and `server.py`: loading, ready, draining, stopped by a fault."""

from __future__ import annotations

import base64
import logging
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from helpers.fake_runner import FakeRunner
from helpers.faults import disk_full
from helpers.served import served
from helpers.waiting import until
from latentrt.errors import CheckpointNotFoundError
from latentrt.runtime.serve import app
from latentrt.runtime.serve.logs import log_as_json


def test_a_server_is_ready_when_it_is_warm_and_not_before() -> None:
    warm = threading.Event()

    class Slow(FakeRunner):
        def warm_up(self, batches: Sequence[int] = (1,)) -> None:
            assert warm.wait(20)

    with served(Slow, ready=False) as server:
        assert server.client.get("/health").status_code == 200
        answer = server.client.get("/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the model is being loaded")
        early = server.ask()
        assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
        assert "retry-after" in early.headers
        warm.set()
        until(lambda: server.client.get("/ready").status_code == 200)
        assert server.ask().status_code == 200


def test_a_model_that_does_not_load_says_why() -> None:
    def broken() -> FakeRunner:
        raise CheckpointNotFoundError("'no-model' is not a local folder or file")

    with served(broken, ready=False) as server:
        until(lambda: "does not load" in server.client.get("/ready").text)
        answer = server.client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the model does not load: 'no-model' is not a local folder or file"
        assert server.ask().status_code == 503
        assert server.client.get("/health").status_code == 200


def test_draining_finishes_and_answers_503_to_what_is_new() -> None:
    runner = FakeRunner()
    with served(lambda: runner) as server, ThreadPoolExecutor(2) as pool:
        runner.hold()
        first = pool.submit(server.ask, seed=1)
        runner.reached()
        waiting = pool.submit(server.ask, seed=2, size="8x8")
        until(lambda: server.service.waiting == 1)
        server.server.handle_exit(15, None)
        until(lambda: server.client.get("/ready").status_code == 503)
        assert server.client.get("/ready").json()["reason"] == "it is shutting down"
        late = server.ask(seed=3)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        runner.release()
        assert first.result().json()["data"][0]["seed"] == 1
        assert waiting.result().json()["data"][0]["seed"] == 2
        until(lambda: server.server.should_exit)
    assert sorted(map(sorted, runner.calls)) == [[1], [2]]


def test_what_draining_has_no_time_for_is_answered() -> None:
    runner = FakeRunner()
    with served(lambda: runner, drain_seconds=0.3) as server, ThreadPoolExecutor(2) as pool:
        runner.hold()
        made = pool.submit(server.ask, seed=1, steps=50)
        runner.reached()
        waiting = pool.submit(server.ask, seed=2, size="8x8")
        until(lambda: server.service.waiting == 1)
        server.server.handle_exit(15, None)
        for answer in (made.result(), waiting.result()):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
            assert "shut down before the image was made" in answer.json()["error"]["message"]
        assert server.server.config.timeout_graceful_shutdown == 5
        runner.release()


def test_draining_leaves_answers_the_time_it_has_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = threading.Event()

    def slow(*_: object) -> bytes:
        assert encode.wait(20)
        return b"PNG"

    monkeypatch.setattr(app, "png_bytes", slow)
    caplog.set_level("INFO", logger="uvicorn.error")
    runner = FakeRunner()
    with served(lambda: runner) as server, ThreadPoolExecutor(1) as pool:
        server.server.config.timeout_graceful_shutdown = 0
        runner.hold()
        asked = pool.submit(server.ask)
        runner.reached()
        server.server.handle_exit(15, None)
        runner.release()
        until(
            lambda: "Waiting for connections to close" in caplog.text
        )  # the seconds that answers have are running
        encode.set()
        assert asked.result().json()["data"][0]["b64_json"] == base64.b64encode(b"PNG").decode()


def test_a_fault_that_stops_the_engine_gets_503(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner()
    with served(lambda: runner) as server, ThreadPoolExecutor(1) as pool:
        runner.hold()
        first = pool.submit(server.ask, seed=1)
        runner.reached()

        def take(now: float) -> Any:
            raise ZeroDivisionError("planted")

        monkeypatch.setattr(server.service.engine._queue, "take", take)
        runner.release()
        assert first.result().status_code == 200
        until(lambda: server.client.get("/ready").status_code == 503)
        assert "stopped through a fault of its own" in server.client.get("/ready").json()["reason"]
        assert server.metric("latentrt_ready") == 0
        health = server.client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "stopped"})
        late = server.ask(seed=2)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "stopped")


@pytest.mark.parametrize("built", [False, True])
def test_a_model_that_raises_stop_iteration_does_not_load(built: bool) -> None:
    """As it is built, or made warm: no future of an event loop takes that error, and it would load for ever."""

    class Odd(FakeRunner):
        def __init__(self) -> None:
            super().__init__()
            if not built:
                raise StopIteration

        def warm_up(self, batches: Sequence[int] = (1,)) -> None:
            raise StopIteration

    with served(Odd, ready=False) as server:
        why = "the model does not load; the server's log says why"
        until(lambda: server.client.get("/ready").json()["reason"] == why, 20)


def test_a_full_disk_while_the_model_is_loaded_is_the_reason() -> None:
    def full() -> FakeRunner:
        raise disk_full("unet.onnx")

    with served(full, ready=False) as server:
        until(lambda: "No space left on device" in server.client.get("/ready").text)
        assert server.client.get("/ready").json()["reason"].endswith("No space left on device: 'unet.onnx'")


def test_a_full_disk_under_the_log_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        try:
            log_as_json()
            with served(FakeRunner) as server:
                assert [server.ask(seed=k).status_code for k in range(3)] == [200, 200, 200]
        finally:
            logging.captureWarnings(False)
            root.handlers[:] = handlers
            root.setLevel(level)
            monkeypatch.undo()
            with suppress(OSError):
                full.close()
