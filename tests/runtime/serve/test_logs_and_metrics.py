"""`runtime/serve/logs.py` and `metrics.py`: what operators read, the interface's description, and the page."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import pytest
from helpers.fake_runner import FakeRunner
from helpers.served import Served, events_of, served
from helpers.waiting import until
from latentrt.runtime.serve.logs import JsonFormatter
from latentrt.runtime.serve.metrics import Metrics
from latentrt.runtime.serve.schema import Limits


def test_metrics_count(server: Served) -> None:
    before = server.metric("latentrt_images_total")
    assert server.ask(n=3, seed=1, steps=5).status_code == 200
    server.ask(steps=0)
    assert server.metric("latentrt_images_total") == before + 3
    assert server.metric("latentrt_stage_seconds_count", stage="queue") == before + 3
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


def test_the_largest_peak_of_memory_is_a_metric() -> None:
    metrics = Metrics()
    for peak in (3, 7, 5):
        metrics.memory(peak)
    assert metrics.registry.get_sample_value("latentrt_peak_memory_bytes") == 7


def test_the_access_log_names_a_request_s_error(
    server: Served, runner: FakeRunner, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a stream too, whose status was sent long before."""
    with caplog.at_level(logging.INFO, "latentrt.access"):
        runner.hold()
        events_of(server.ask(timeout=0.2, steps=50, stream=True))
        runner.release()
        server.ask(steps=0)
        server.client.get("/nowhere")
        until(lambda: len(caplog.records) >= 3)
    told = [(record.fields["status"], record.fields["error"]) for record in caplog.records]
    assert told == [(200, "deadline_exceeded"), (422, "invalid_value"), (404, "http_404")]


POST = b"POST /v1/images/generations HTTP/1.1\r\nConnection: close\r\nHost: x\r\n"
GET = b"GET %s HTTP/1.1\r\nConnection: close\r\nHost: %s\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "path", "status"),
    [
        (POST + b"Content-Length: 100\r\n\r\n{", "/v1/images/generations", 408),
        (POST + b"X-", "other", 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "/v1/images/generations", 400),
        (b"\x16\x03\x01\r\n\r\n", "other", 400),
        (POST + b"Content-Length: 90000\r\n\r\n" + b"x" * 90_000, "/v1/images/generations", 413),
        (GET % (b"/v1/models/x?y", b"x"), "/v1/models/{model:path}", 401),
        (GET % (b"/health", b"evil"), "/health", 403),
        (GET % (b"/nowhere", b"evil"), "other", 403),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_refusals_are_counted_and_logged_as_they_were_answered(
    sent: bytes, path: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Be it before the application, or in its place."""
    limits = Limits(read=0.3, body=10_000)
    keys = ("key",) if status == 401 else ()
    with (
        caplog.at_level(logging.INFO, "latentrt.access"),
        served(FakeRunner, limits=limits, hosts=("x", "127.0.0.1"), api_keys=keys) as server,
    ):
        answer = server.raw(sent, half_close=False)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        line = until(lambda: next((one for one in _access(caplog) if one["status"] == status), None))
        labels = {"method": line["method"] or "other", "path": path, "status": str(status)}
        assert server.metric("latentrt_requests_total", **labels) == 1
        assert server.metric("latentrt_errors_total", kind=f"http_{status}") == 1
    assert line["error"] == f"http_{status}"
    assert b"\r\nx-request-id: %s\r\n" % line["request_id"].encode() in answer
    assert line["seconds"] >= (0.3 if status == 408 else 0.0)


def _access(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The access log's lines so far."""
    return [record.fields for record in caplog.records if record.name == "latentrt.access"]  # type: ignore[attr-defined]


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
