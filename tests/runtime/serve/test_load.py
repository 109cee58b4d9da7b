"""`bench/serve_load.py`, `serve_clients.py` and `serve_process.py`: many clients at once, a third of whom leave midway:
no image is lost or mixed up."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections import Counter
from itertools import permutations
from typing import Any

import httpx2 as httpx
import numpy as np
import PIL.Image
import pytest
from helpers.fake_runner import FakeRunner, in_loop, picture
from helpers.served import Served, served
from helpers.waiting import until
from latentrt.bench import serve_clients, serve_load, serve_process
from latentrt.bench.serve_clients import Outcome, mixed_bodies, send
from latentrt.bench.serve_process import Memory, ServerProcess, run_server
from latentrt.errors import BenchmarkError
from latentrt.runtime.serve.requests import ImageResult
from latentrt.runtime.serve.runner import OnStep


class Timed(FakeRunner):
    """A step takes some time, whatever the batch."""

    def run(self, requests: Any, on_step: OnStep) -> list[ImageResult]:
        def step(done: int, preview: Any) -> None:
            time.sleep(0.001)
            on_step(done, preview)

        return super().run(requests, step)


def process_of(server: Served) -> ServerProcess:
    return ServerProcess(server.url, os.getpid())


def digest(image: PIL.Image.Image) -> str:
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def test_nothing_is_lost_or_mixed_up() -> None:
    runner = Timed()
    asked = mixed_bodies(80, ["64x64", "72x64", "64x128"], [2, 5, 20])
    dice = random.Random(2)
    with served(lambda: runner, max_waiting=64) as server:
        outcome = in_loop(
            send(server.url, asked, 32, lambda _: dice.choice([None, None, dice.uniform(0.001, 0.05)]))
        )
        assert (server.service.waiting, server.service.running) == (0, 0)
    assert set(outcome.statuses) == {200}
    assert len(outcome.images) + outcome.disconnected == 80
    assert all(made == digest(picture(seed)) for seed, made in outcome.images.items())
    made = Counter(seed for call in runner.calls for seed in call)
    assert set(made.values()) == {1}  # none twice
    assert max(len(call) for call in runner.calls) > 1


def test_the_measurement_of_load() -> None:
    """Its parts, over a runner without a model, find what they should."""
    checks: dict[str, bool] = {}
    with served(Timed, max_batch=1) as one, served(Timed, max_batch=8, window=0.2) as many:
        alone, batched = process_of(one), process_of(many)
        gain = serve_load.batching(alone, batched, clients=4, rounds=1, checks=checks)
        mixed = serve_load.mixed(alone, batched, requests=20, clients=4, image_seconds=0.05, checks=checks)
        flood = serve_load.overload(batched, rate=5.0, seconds=1.0, timeout=60.0, checks=checks)
    assert set(gain["one_at_a_time"]["images_by_batch"]) == {"1"}
    assert max(map(int, gain["batched"]["images_by_batch"])) > 1
    assert mixed["differ"] == []
    assert sum(mixed["images_by_batch"].values()) == mixed["compared_with_alone"] == 20 - mixed["left"]
    assert sum(each["p50_seconds"] > 0 for each in mixed["by_size"].values()) == 3
    assert sum(flood["statuses"].values()) == 25
    assert not checks["the rest was refused, and the device not idle"]  # it could answer all of them
    for held in (
        "every request was answered or had left",
        "batched images equal those alone",
        "every image equals the same made alone",
        "each image is made once",
        "so say the clients",
        "overload is answered with 200, 429 or 504",
        "who is refused is told when to come again",
    ):
        assert checks[held], held


ONCE = "each image is made once"
ALONE = "batched images equal those alone"
GAIN = "batching gains 1.5x, or an image alone takes less than 1.5 times its share of a batch"


def batched_run() -> tuple[dict[str, Outcome], dict[str, Any]]:
    """A round of four requests to each server, as it should be, and the other arguments of the checks."""
    images = dict.fromkeys(range(4), "as drawn")
    one_round = {name: Outcome(images=dict(images), made=4) for name in ("alone", "batched")}
    return one_round, {"requests": 4, "gain": 2.0, "seconds_per_image": {"1": 4.0, "2": 2.0}}


@pytest.mark.parametrize(
    ("fault", "arguments", "failing"),
    [
        (lambda r: None, {}, []),
        (lambda r: setattr(r["batched"], "made", 5), {}, [ONCE]),
        (lambda r: setattr(r["alone"], "made", 3), {}, [ONCE]),
        (lambda r: [outcome.images.popitem() for outcome in r.values()], {}, [ONCE]),
        (lambda r: r["batched"].images.update({2: "another"}), {}, [ALONE]),
        (lambda r: None, {"gain": 1.4}, [GAIN]),
        (lambda r: None, {"gain": 1.4, "seconds_per_image": {"1": 2.9, "2": 2.0}}, []),  # little to be gained
    ],
)
def test_faults_of_batching_are_found(fault: Any, arguments: dict[str, Any], failing: list[str]) -> None:
    """In whichever round they are."""
    faulty, others = batched_run()
    fault(faulty)
    for outcomes in permutations([batched_run()[0], faulty]):
        checks = serve_load.batching_checks(outcomes, **others | arguments)
        assert [name for name, held in checks.items() if not held] == failing


def mixed_run() -> tuple[Outcome, dict[str, Any]]:
    """30 requests, 10 of which leave, as it should be."""
    batches = {1: {"total": [0.1] * 10}, 2: {"total": [0.1] * 10}}
    outcome = Outcome(images=dict.fromkeys(range(20), "as drawn"), disconnected=10, per_image=batches)
    return outcome, {"requests": 30, "leaving": 10, "differ": [], "memory": memory(*[400.0] * 10)}


def memory(*resident: float) -> Memory:
    """Samples in MiB, after every third request."""
    sampled = Memory(ServerProcess("", 0), every=3)
    sampled.resident = {3 * k: size for k, size in enumerate(resident, start=1)}
    return sampled


@pytest.mark.parametrize(
    ("fault", "arguments", "failing"),
    [
        (lambda o: None, {}, []),
        (lambda o: o.images.popitem(), {}, ["every request was answered or had left"]),
        (lambda o: None, {"requests": 31}, ["every request was answered or had left"]),
        (lambda o: None, {"leaving": 12}, ["a third left midway"]),
        (lambda o: None, {"leaving": 9}, ["a third left midway"]),
        (lambda o: None, {"differ": [7]}, ["every image equals the same made alone"]),
        (
            lambda o: o.per_image[2].update(total=[0.1] * 9),
            {},
            ["of those 50% and more were made in company"],
        ),
        (
            lambda o: None,
            {"memory": memory(350.0, 400.0, 450.0, 500.0, *[501.0] * 6)},
            ["memory grew by less than 100 MiB"],
        ),
        (lambda o: None, {"memory": memory(300.0, *[400.0] * 9)}, []),  # while it warms up
        (lambda o: None, {"memory": memory(360.0, 370.0, 380.0, 390.0, *[400.0] * 6)}, []),
        (
            lambda o: None,
            {"memory": memory(*[400.0] * 5, 400.0, 400.2, 400.4, 400.6, 400.8)},
            ["and in the end by less than 40 KiB a request"],
        ),
    ],
)
def test_faults_of_mixed_requests_are_found(
    fault: Any, arguments: dict[str, Any], failing: list[str]
) -> None:
    outcome, others = mixed_run()
    fault(outcome)
    checks = serve_load.mixed_checks(outcome, **others | arguments)
    assert [name for name, held in checks.items() if not held] == failing


def flooded() -> tuple[Outcome, dict[str, Any]]:
    """500 requests to a server that makes 100 images in the time, as it should be."""
    outcome = Outcome(
        statuses=Counter({200: 99, 504: 1, 429: 400}),
        seconds={"64x64": [2.0] * 99},
        retry_after=[1] * 400,
        wall=10.0,
    )
    return outcome, {"requests": 500, "capacity": 100.0, "timeout": 2.5, "slope": 10.0}


@pytest.mark.parametrize(
    ("fault", "arguments", "failing"),
    [
        (lambda o: None, {}, []),
        (
            lambda o: o.statuses.update({500: 1}),
            {"requests": 501},
            ["overload is answered with 200, 429 or 504"],
        ),
        (lambda o: o.statuses.update({504: 1, 429: -1}), {}, ["99 % of what was let in was in time"]),
        (lambda o: o.seconds.update({"72x64": [2.6] * 2}), {}, ["so say the clients"]),
        (lambda o: o.retry_after.append(None), {}, ["who is refused is told when to come again"]),
        (lambda o: o.retry_after.append(0), {}, ["who is refused is told when to come again"]),
        (lambda o: None, {"capacity": 199.0}, ["the rest was refused, and the device not idle"]),
        (
            lambda o: o.statuses.update({200: 400, 429: -400}),
            {},
            ["the rest was refused, and the device not idle"],
        ),
        (lambda o: None, {"slope": 40.0}, ["meanwhile memory grew by less than 40 KiB an image"]),
    ],
)
def test_faults_under_overload_are_found(fault: Any, arguments: dict[str, Any], failing: list[str]) -> None:
    outcome, others = flooded()
    fault(outcome)
    checks = serve_load.overload_checks(outcome, **others | arguments)
    assert [name for name, held in checks.items() if not held] == failing


def test_a_server_that_answers_nobody_fails_without_an_error() -> None:
    outcome = Outcome(statuses=Counter({504: 500}), wall=10.0)
    checks = serve_load.overload_checks(outcome, **flooded()[1])
    assert not checks["so say the clients"]


def test_a_third_leaves_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first preview, or before it; no image is finished before those who leave have left."""
    gone: set[int] = set()
    leave = serve_clients._stream_and_disconnect

    async def left(http: httpx.AsyncClient, body: Any, seconds: float) -> Any:
        result = await leave(http, body, seconds)
        gone.add(body["seed"])
        return result

    class Waiting(FakeRunner):
        def run(self, requests: Any, on_step: OnStep) -> list[ImageResult]:
            def step(done: int, preview: Any) -> None:
                on_step(done, preview)
                until(lambda: gone >= {request.seed for request in requests if request.seed % 3 == 0})

            return super().run(requests, step)

    monkeypatch.setattr(serve_clients, "_stream_and_disconnect", left)
    checks: dict[str, bool] = {}
    with served(FakeRunner, max_batch=1) as one, served(Waiting, max_batch=8) as many:
        found = serve_load.mixed(
            process_of(one), process_of(many), requests=60, clients=20, image_seconds=0.05, checks=checks
        )
    assert found["left"] == 20
    assert checks["a third left midway"]
    assert found["statuses"] == {"200": 40}


def test_a_server_that_keeps_what_it_made_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(range(10_000))
    for a_request, flat in ((60, False), (20, True)):  # kilobytes
        checks: dict[str, bool] = {}
        monkeypatch.setattr(
            ServerProcess, "resident", property(lambda _, kb=a_request: next(sizes) * kb / 1024)
        )
        with served(FakeRunner, max_batch=1) as one, served(FakeRunner) as many:
            serve_load.mixed(
                process_of(one), process_of(many), requests=25, clients=4, image_seconds=1.0, checks=checks
            )
        assert checks["and in the end by less than 40 KiB a request"] is flat


def test_refusals_that_do_not_say_when_are_found() -> None:
    outcome = Outcome()
    for headers in ({"retry-after": "3"}, {"retry-after": "soon"}, {}):
        outcome.add_response({"seed": 1}, httpx.Response(429, headers=headers), 0.1)
    assert outcome.retry_after == [3, None, None]


def test_neither_server_is_always_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one meets a warmer machine."""
    asked: list[str] = []

    async def noting(url: str, *rest: Any) -> Outcome:
        asked.append(url)
        return await send(url, *rest)

    monkeypatch.setattr(serve_load, "send", noting)
    checks: dict[str, bool] = {}
    with served(Timed, max_batch=1) as one, served(Timed, max_batch=8) as many:
        found = serve_load.batching(process_of(one), process_of(many), clients=2, rounds=2, checks=checks)
        assert asked == [one.url, many.url, many.url, one.url]
    assert checks["batched images equal those alone"]
    assert found["one_at_a_time"]["images_by_batch"].keys() == {"1"}


def server_that(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in place of `latentrt serve`."""
    popen = serve_process.subprocess.Popen
    command = [sys.executable, "-c", f"import json, signal, sys, time\nerr = sys.stderr\n{script}"]
    monkeypatch.setattr(serve_process.subprocess, "Popen", lambda _, **options: popen(command, **options))


LISTENS = "print(json.dumps({'url': 'x'}), file=err, flush=True)\n"


def test_warnings_in_a_server_s_log_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a question that it was too busy to answer."""
    answers = iter([httpx.ReadTimeout("busy"), httpx.Response(503, text="it loads"), httpx.Response(200)])

    def get(url: str) -> httpx.Response:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(serve_process.httpx, "get", get)
    warnings = "print('UserWarning: old', 7, '[1]', '{}', 'null', file=err, sep='\\n')\n"
    server_that(warnings + LISTENS + "signal.pause()", monkeypatch)
    with run_server(8, "eager", {}) as server:
        assert server.url == "x"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('no such model', file=err); sys.exit(2)", "the server ended: no such model"),
        (LISTENS, "the server is not ready: no answer"),  # and ends
        (LISTENS + "signal.pause()", "the server is not ready: no answer"),
    ],
)
def test_a_server_that_does_not_get_ready_is_an_error(
    script: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(url: str) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(serve_process.httpx, "get", get)
    monkeypatch.setattr(serve_process, "_LOADING_SECONDS", 1.0)
    server_that(script, monkeypatch)
    with pytest.raises(BenchmarkError, match=message), run_server(8, "eager", {}):
        pass


def test_a_server_process_that_fails_at_its_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """import json, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit({}))
print(json.dumps({{"url": "x"}}), file=sys.stderr, flush=True)
signal.pause()"""
    monkeypatch.setattr(serve_process.httpx, "get", lambda _: httpx.Response(200))
    popen = serve_process.subprocess.Popen
    for status in (0, 3):
        checks: dict[str, bool] = {}
        command = [sys.executable, "-c", script.format(status)]
        monkeypatch.setattr(
            serve_process.subprocess, "Popen", lambda _, command=command, **options: popen(command, **options)
        )
        with run_server(8, "eager", checks) as server:
            assert server.url == "x"
        assert checks == {"the server with batches of 8 ended with 0": status == 0}


def test_an_image_that_differs_is_found() -> None:
    class Blurred(FakeRunner):
        def run(self, requests: Any, on_step: OnStep) -> list[ImageResult]:
            results = super().run(requests, on_step)
            if requests[0].seed == 5:
                results[0].image.putpixel((1, 1), (255, 255, 255))
            return results

    checks: dict[str, bool] = {}
    with served(FakeRunner, max_batch=1) as one, served(Blurred, max_batch=1) as other:
        mixed = serve_load.mixed(
            process_of(one), process_of(other), requests=8, clients=1, image_seconds=1e4, checks=checks
        )
    assert mixed["differ"] == [5]
    assert not checks["every image equals the same made alone"]


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_500_requests_on_the_demo() -> None:
    """Each image equals its request alone, to the bit on ONNX Runtime; memory stays flat; overload is refused."""
    found = serve_load.measure(requests=500, clients=32, rounds=3, seconds=60.0)
    print(found["batching"], found["mixed"], found["overload"], sep="\n")
    assert [check for check, held in found["checks"].items() if not held] == []
