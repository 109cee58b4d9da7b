"""`runtime/serve/app.py` and `schema.py`: what is refused: bad bodies, addresses, forms, keys; a full queue, a passed
deadline."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from helpers.fake_runner import FakeRunner
from helpers.served import Served, events_of, served
from helpers.waiting import until
from latentrt.errors import DeadlineError, EngineSizeError, QueueFullError

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
    ({"prompt": "x" * 10_000_000}, 413, "prompt"),
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
        ("GET", "/health/", 404),
    ],
)
def test_wrong_addresses(method: str, path: str, status: int, server: Served) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/v1/models", "/openapi.json", "/v1/images/generations"]
)
def test_head_is_get_without_a_body(path: str, server: Served) -> None:
    """As monitors and proxies ask; over a connection that goes on."""
    get, head = server.client.get(path), server.client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    for name in ("content-length", "content-type"):
        assert head.headers[name] == get.headers[name]
    labels = {"method": "HEAD", "path": path, "status": str(get.status_code)}
    until(lambda: server.metric("latentrt_requests_total", **labels) == 1)
    assert server.client.head("/metrics").status_code == 200


def test_a_form_from_a_foreign_page_is_no_request(server: Served, runner: FakeRunner) -> None:
    """A browser sends text/plain anywhere without asking; only JSON by name is taken."""
    answer = server.client.post(
        "/v1/images/generations", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 422
    assert runner.calls == []


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
        with pytest.raises(openai.RateLimitError, match="of 8 places are taken"):
            client.images.generate(prompt="x")
        runner.release()
        assert [len(one.result().json()["data"]) for one in (first, *more)] == [1, 4, 4]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_a_passed_deadline_gets_504(server: Served, runner: FakeRunner) -> None:
    runner.hold()
    answer = server.ask(timeout=0.2, steps=50)
    assert answer.status_code == 504
    assert answer.json()["error"]["param"] == "timeout"
    assert re.search(r"still (waiting|being made) after 0.2 s", answer.json()["error"]["message"])
    runner.release()
    until(lambda: server.ask(seed=1).status_code == 200)
    runner.hold()
    streamed = events_of(server.ask(timeout=0.2, steps=50, stream=True))
    assert streamed[-1]["error"]["code"] == "deadline_exceeded"


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


def test_without_the_key_a_body_is_not_looked_at() -> None:
    with served(FakeRunner, api_keys=("key",)) as server:
        for body in (b"{", b"x" * (5 << 20)):
            answer = server.client.post("/v1/images/generations", content=body)
            assert answer.status_code == 401
        assert server.client.get("/nowhere").status_code == 401
        assert server.metric("latentrt_errors_total", kind="http_401") == 3


def test_server_faults_disclose_nothing() -> None:
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


def test_sizes_of_which_there_is_no_engine_are_the_field_size() -> None:
    why = "the engine of unet was built for other sizes than batch 2, height 9, width 9: it takes height 8"
    with served(lambda: FakeRunner(lambda _: EngineSizeError(why))) as server:
        answer = server.ask()
    error = {"message": why, "type": "invalid_request_error", "param": "size", "code": "invalid_value"}
    assert (answer.status_code, answer.json()["error"]) == (422, error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "invalid_request_error"),
        (QueueFullError("full", retry_after=2.0), "rate_limit_error"),
        (DeadlineError("late"), "server_error"),
    ],
)
def test_a_stream_says_whose_fault_an_error_is_as_a_plain_answer_does(error: Exception, kind: str) -> None:
    with served(lambda: FakeRunner(lambda _: error)) as server:
        plain = server.ask().json()["error"]
        *_, streamed = events_of(server.ask(stream=True))
    assert plain["type"] == kind
    assert streamed["error"] == {**plain, "image": 0}


def test_a_flood_of_fields_is_refused_before_each_is_looked_at() -> None:
    with served(FakeRunner) as server:
        answer = server.client.post("/v1/images/generations", json={f"x{k}": k for k in range(50_000)})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "the body: it has 50000 fields; at most 64 are read"


@pytest.mark.parametrize(
    ("key", "sent_as"),
    [("ключ", ["ключ".encode()]), ("clé", ["clé".encode(), "clé".encode("latin-1")]), ("key", [b"key"])],
)
def test_keys_are_compared_as_they_were_sent(key: str, sent_as: list[bytes]) -> None:
    """What goes over the wire are bytes: UTF-8 from most clients, Latin-1 from some."""
    with served(FakeRunner, api_keys=("other", key)) as server:
        for sent in sent_as:
            for ending, status in ((b"", 200), (b"x", 401)):
                headers = {"Authorization": b"Bearer " + sent + ending}
                assert server.client.get("/v1/models", headers=headers).status_code == status
