"""The HTTP interface, over a runner without a model: OpenAI's client, refusals, leaving, overload, keys."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import PIL.Image
import pytest
from fake_runner import FakeRunner, seed_of
from latentrt.errors import CheckpointNotFoundError
from latentrt.runtime.image import read_parameters
from latentrt.runtime.serve.app import preview_is_due
from latentrt.runtime.serve.logs import JsonFormatter
from latentrt.runtime.serve.schema import Limits
from served import Served, events_of, served, until

RUNNER = FakeRunner()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = Limits(pixels=512 * 512, steps=200, images=4, prompt=100, body=10_000)
    with served(lambda: RUNNER, limits=limits, max_waiting=8) as one:
        yield one


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    """Whatever a test held is let go."""
    RUNNER.calls.clear()
    RUNNER.steps.clear()
    yield RUNNER
    RUNNER.release()


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def image_of(b64: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(b64)))


def test_openais_client_makes_images(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="cat-model", prompt="a cat", n=2, size="64x48", quality="standard", response_format="b64_json",
        extra_body={"seed": 7, "steps": 3},
    )  # fmt: skip
    assert [seed_of(image_of(image.b64_json)) for image in answer.data] == [7, 8]
    assert [image.seed for image in answer.data] == [7, 8]
    assert answer.data[0].timings["base"] == 0.1
    assert answer.data[0].batch == 2
    assert answer.created > 1.7e9
    assert answer.output_format == "png"


def test_openais_client_streams(client: openai.OpenAI, runner: FakeRunner) -> None:
    runner.hold()
    stream = client.images.generate(prompt="a cat", stream=True, extra_body={"seed": 9, "steps": 3})
    events = []
    runner.let_one()
    with stream:
        for event in stream:
            events.append(event)
            runner.let_one()
        *parts, last = events
    assert [event.step for event in parts] == [1, 2, 3]
    assert [event.partial_image_index for event in parts] == [0, 1, 2]
    assert {seed_of(image_of(event.b64_json)) for event in parts} == {109}
    assert last.type == "image_generation.completed"
    assert seed_of(image_of(last.b64_json)) == 9
    assert last.seed == 9


def test_openais_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["cat-model"]
    assert client.models.retrieve("cat-model").owned_by == "latentrt"
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3' here; this server has 'cat-model'"):
        client.models.retrieve("dall-e-3")


def test_a_png_by_accept(server: Served, tmp_path: Any) -> None:
    answer = server.client.post(
        "/v1/images/generations", json={"prompt": "x", "seed": 5, "steps": 2}, headers={"Accept": "image/png"}
    )
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "5"
    assert "base;dur=100.0" in answer.headers["server-timing"]
    file = tmp_path / "x.png"
    file.write_bytes(answer.content)
    assert seed_of(PIL.Image.open(file)) == 5
    assert read_parameters(file) == {"seed": 5}


@pytest.mark.parametrize(
    ("wanted", "steps"),
    [(0, []), (1, [5]), (3, [3, 5, 8]), (10, list(range(1, 11))), (None, list(range(1, 11)))],
)
def test_previews_are_spread_over_the_steps(wanted: int | None, steps: list[int]) -> None:
    sent: list[int] = []
    for step in range(1, 11):
        if preview_is_due(step, 10, wanted, len(sent)):
            sent.append(step)
    assert sent == steps


def test_a_stream_of_several_images(server: Served) -> None:
    events = events_of(server.ask(stream=True, n=3, seed=4, partial_images=0))
    assert sorted((e["image"], e["seed"]) for e in events) == [(0, 4), (1, 5), (2, 6)]


BAD: list[tuple[Any, int, str | None]] = [
    (b"{", 400, None),
    (b"[" * 9_000, 400, None),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, None),
    (b"\xff\xfe", 400, None),
    (b"[]", 422, None),
    (b"null", 422, None),
    (b'"x"', 422, None),
    ({}, 422, "prompt"),
    ({"prompt": ""}, 422, "prompt"),
    ({"prompt": None}, 422, "prompt"),
    ({"prompt": ["x"]}, 422, "prompt"),
    ({"prompt": "x" * 101}, 422, "prompt"),
    (b'{"prompt": "\\ud800"}', 422, "prompt"),
    ({"prompt": "x" * 20_000}, 413, "prompt"),
    ({"negative_prompt": "x" * 101}, 422, "negative_prompt"),
    ({"n": 0}, 422, "n"),
    ({"n": 5}, 422, "n"),
    ({"n": "2"}, 422, "n"),
    ({"n": True}, 422, "n"),
    ({"n": 10**30}, 422, "n"),
    ({"size": "-64x64"}, 422, "size"),
    ({"size": "0x64"}, 422, "size"),
    ({"size": "64"}, 422, "size"),
    ({"size": "64x64\n"}, 422, "size"),
    ({"size": "99999x99999"}, 422, "size"),
    ({"size": "1024x512"}, 422, "size"),
    ({"size": "999999999999x8"}, 422, "size"),
    ({"steps": 0}, 422, "steps"),
    ({"steps": 201}, 422, "steps"),
    ({"steps": 3.5}, 422, "steps"),
    (b'{"prompt": "x", "guidance": NaN}', 422, "guidance"),
    (b'{"prompt": "x", "guidance": Infinity}', 422, "guidance"),
    (b'{"prompt": "x", "guidance": 1e999}', 422, "guidance"),
    ({"guidance": "high"}, 422, "guidance"),
    ({"high_noise_frac": 1.5}, 422, "high_noise_frac"),
    ({"seed": -1}, 422, "seed"),
    ({"seed": 2**63}, 422, "seed"),
    ({"seed": 2**63 - 1, "n": 2}, 422, "seed"),
    ({"timeout": 0}, 422, "timeout"),
    ({"timeout": 1e9}, 422, "timeout"),
    ({"stream": "yes"}, 422, "stream"),
    ({"response_format": "url"}, 422, "response_format"),
    ({"output_format": "webp"}, 422, "output_format"),
    ({"style": "vivid"}, 422, "style"),
    ({"__class__": "x"}, 422, "__class__"),
    (b'{"prompt": "x", "\\udfff": 1}', 422, None),
    ({"x" * 300: 1}, 422, "x" * 80),
    ({"model": "../../etc/passwd"}, 404, "model"),
    ({"model": "/etc/passwd"}, 404, "model"),
    ({"model": "a" * 300}, 422, "model"),
    ({"model": "file:///etc/passwd\x00"}, 404, "model"),
]


@pytest.mark.parametrize(
    ("body", "status", "field"), BAD, ids=lambda v: repr(v)[:40] if not isinstance(v, int) else ""
)
def test_bad_input_names_the_field(
    body: Any, status: int, field: str | None, server: Served, runner: FakeRunner
) -> None:
    if isinstance(body, dict):
        body = json.dumps({"prompt": "x", **body} if body else {})
    answer = server.client.post(
        "/v1/images/generations", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.text) < 700  # what came is not sent back
    assert "Traceback" not in answer.text
    assert runner.calls == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/images/generations", 405),
        ("POST", "/v1/images/edits", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_wrong_addresses(method: str, path: str, status: int, server: Served) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_form_from_a_foreign_page_is_no_request(server: Served, runner: FakeRunner) -> None:
    """A browser sends text/plain anywhere without asking; only JSON by name is taken."""
    answer = server.client.post(
        "/v1/images/generations", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 422
    assert runner.calls == []


def test_floods_of_headers_and_bodies(server: Served) -> None:
    flood = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(
        b"X-%d: %s\r\n" % (k, b"y" * 100) for k in range(3000)
    )
    assert server.raw(flood + b"\r\n")[:10] in (b"HTTP/1.1 4", b"")  # or cut off before the answer was read
    chunk = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 413 " in server.raw(head + chunk * 40 + b"0\r\n\r\n").split(b"\r\n")[0]
    assert server.client.get("/health").json() == {"status": "ok"}


def test_a_client_that_hangs_up_frees_the_device(server: Served, runner: FakeRunner) -> None:
    for stream in (False, True):
        runner.hold()
        body = json.dumps({"prompt": "x", "steps": 100, "stream": stream}).encode()
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        link = socket.create_connection(("127.0.0.1", server.port))
        link.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        runner.reached()
        runner.step()
        taken = runner.steps[-1]
        link.close()
        until(lambda: server.service.running == 0)
        runner.release()
        assert server.ask(seed=1).status_code == 200
        assert runner.steps[-2] - taken <= 2


def test_who_hangs_up_while_waiting_is_never_made(server: Served, runner: FakeRunner) -> None:
    runner.hold()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, seed=1, size="8x8")
        runner.reached()
        body = json.dumps({"prompt": "x", "seed": 77}).encode()
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        link = socket.create_connection(("127.0.0.1", server.port))
        link.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: server.service.waiting == 1)
        link.close()
        until(lambda: server.service.waiting == 0)
        runner.release()
        assert first.result().status_code == 200
    assert runner.calls == [[1]]


def test_a_full_queue_answers_429_and_when_to_come_again(
    server: Served, runner: FakeRunner, client: openai.OpenAI
) -> None:
    runner.hold()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.ask, seed=1)
        runner.reached()
        more = [pool.submit(server.ask, n=4, seed=10 * k) for k in (1, 2)]
        until(lambda: server.service.waiting == 8)
        refused = server.ask(seed=3)
        with pytest.raises(openai.RateLimitError, match="at most 8 may wait"):
            client.images.generate(prompt="x")
        runner.release()
        assert [len(one.result().json()["data"]) for one in (first, *more)] == [1, 4, 4]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_a_deadline_is_told(server: Served, runner: FakeRunner) -> None:
    runner.hold()
    answer = server.ask(timeout=0.2, steps=50)
    assert answer.status_code == 504
    assert answer.json()["error"]["param"] == "timeout"
    assert "still being made after 0.2 s" in answer.json()["error"]["message"]
    runner.release()
    until(lambda: server.ask(seed=1).status_code == 200)
    runner.hold()
    streamed = events_of(server.ask(timeout=0.2, steps=50, stream=True))
    assert streamed[-1]["error"]["code"] == "deadline_exceeded"


def test_metrics_count(server: Served) -> None:
    before = server.metric("latentrt_images_total")
    assert server.ask(n=3, seed=1, steps=5).status_code == 200
    server.ask(steps=0)
    assert server.metric("latentrt_images_total") == before + 3
    text = server.client.get("/metrics").text
    for line in (
        "latentrt_waiting_images 0.0",
        "latentrt_ready 1.0",
        'latentrt_stage_seconds_count{stage="base"}',
        'latentrt_batches_total{outcome="made"}',
        'latentrt_errors_total{kind="invalid_value"}',
        'latentrt_requests_total{method="POST",path="/v1/images/generations",status="200"}',
        "latentrt_steps_total",
        "latentrt_peak_memory_bytes",
    ):
        assert line in text


def test_requests_have_an_id_and_a_line_of_json(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "latentrt.access"):
        given = server.client.get("/health", headers={"X-Request-ID": "abc-1"})
        forged = server.client.get("/health", headers={"X-Request-ID": 'a" b'})
        until(lambda: len(caplog.records) >= 2)
    assert given.headers["x-request-id"] == "abc-1"
    assert len(forged.headers["x-request-id"]) == 16
    line = json.loads(JsonFormatter().format(caplog.records[0]))
    assert (line["request_id"], line["path"], line["status"]) == ("abc-1", "/health", 200)
    assert line["seconds"] >= 0


def test_faults_of_the_servers_own_tell_nothing() -> None:
    secret = "/secret/place"

    def fail(seeds: list[int]) -> Exception | None:
        return {1: ZeroDivisionError(secret), 2: MemoryError(secret)}.get(seeds[0])

    with served(lambda: FakeRunner(fail)) as server:
        internal, memory = server.ask(seed=1), server.ask(seed=2)
        assert server.ask(seed=3).status_code == 200
        assert server.metric("latentrt_errors_total", kind="internal") == 1
    assert internal.status_code == 500
    assert (memory.status_code, memory.json()["error"]["param"]) == (422, "size")
    assert secret not in internal.text + memory.text


def test_a_server_is_ready_when_it_is_warm_and_not_before() -> None:
    warm = threading.Event()

    class Slow(FakeRunner):
        def warm_up(self) -> None:
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
        raise CheckpointNotFoundError("'no-model' is no folder or file")

    with served(broken, ready=False) as server:
        until(lambda: "does not load" in server.client.get("/ready").text)
        answer = server.client.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the model does not load: 'no-model' is no folder or file"
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


def test_keys() -> None:
    with served(FakeRunner, api_keys=("first", "sécond")) as server:
        for path in ("/v1/models", "/metrics"):
            assert server.client.get(path).status_code == 401
        for header in (
            "Bearer wrong",
            "Bearer",
            "first",
            "Basic first",
            "Bearer firs",
            "Bearer first first",
        ):
            answer = server.client.get("/v1/models", headers={"Authorization": header})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.ask().status_code == 401
        for path in ("/health", "/ready", "/"):
            assert server.client.get(path).status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="first", max_retries=0) as client:
            assert client.images.generate(prompt="x", extra_body={"steps": 1}).data
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                client.with_options(api_key="wrong").images.generate(prompt="x")


def test_a_client_that_does_not_read_holds_nobody_up(runner: FakeRunner) -> None:
    """Big previews into a connection that nobody reads: its own request ends, others are served."""

    class Big(FakeRunner):
        def run(self, requests: Any, on_step: Any) -> Any:
            noise = PIL.Image.effect_noise((600, 600), 90).convert("RGB")
            return super().run(requests, lambda step, _: on_step(step, lambda k: noise))

    with served(Big, limits=Limits(write=0.5)) as server:
        body = json.dumps({"prompt": "x", "steps": 30, "stream": True}).encode()
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        link = socket.create_connection(("127.0.0.1", server.port))
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert server.ask(seed=1, size="8x8").status_code == 200
        name = "latentrt_requests_total"
        labels = {"method": "POST", "path": "/v1/images/generations", "status": "200"}
        until(lambda: server.metric(name, **labels) == 2)
        link.close()


def test_the_interface_is_described(server: Served) -> None:
    described = server.client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/v1/images/generations", "/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics"
    }  # fmt: skip
    fields = described["components"]["schemas"]["GenerationBody"]["properties"]
    assert {"seed", "steps", "guidance", "negative_prompt", "sampler", "high_noise_frac"} <= set(fields)


def test_the_page_needs_nothing_from_elsewhere(server: Served) -> None:
    answer = server.client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = answer.text
    assert re.findall(r"https?://|<link[^>]*stylesheet|<script[^>]+src|@import", page) == []
    named = set(re.findall(r'<label for="(\w+)"', page))
    fields = set(re.findall(r'<(?:input|textarea|select) id="(\w+)"', page))
    assert fields == named >= {"prompt", "size", "steps", "seed", "share"}
    used = set(re.findall(r'\$\("(\w+)"\)', page))
    assert used <= set(re.findall(r'\bid="(\w+)"', page))
