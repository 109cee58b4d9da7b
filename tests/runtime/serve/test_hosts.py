"""`runtime/serve/hosts.py`: names under which a server is asked, before the application and before replicas."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from helpers.fake_runner import FakeRunner
from helpers.replicas import IMAGES, Replicas, body, with_ingress
from helpers.served import served
from latentrt.runtime.serve import commands, logs
from latentrt.runtime.serve.hosted import Deployed

Run = Callable[..., tuple[int, str, str]]
NAMES = (
    "localhost",
    "127.0.0.1",
    "::1",
    "Mine.example:8443",
    "2001:DB8::1",
    "[2001:DB8::2]",
    "full.example.",
)
OURS = [
    "localhost",
    "LOCALHOST:8000",
    "127.0.0.1",
    "127.0.0.1:8000",
    "[::1]",
    "[::1]:8000",
    "mine.example:80",
    "mine.example:8443",
    "localhost.:8000",
    "full.example",
    "[2001:db8::1]:8000",
    "[2001:DB8::1]",
    "[2001:db8::2]:8000",
]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.2",
    "[::2]:8000",
    "",
    ".",
    "localhost..",
    "x\xe9:8000",
]


def test_a_server_answers_for_its_own_names_alone() -> None:
    """A page of another origin would otherwise be of this one, once its name is pointed here."""
    with served(FakeRunner, hosts=NAMES) as server:
        for host in OURS + FOREIGN:
            for method, path in (("GET", "/ready"), ("GET", "/"), ("POST", "/v1/images/generations")):
                length = b"Content-Length: 2\r\n\r\n{}" if method == "POST" else b"\r\n"
                head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n".encode("latin-1")
                answer = server.raw(head + length, half_close=False)
                assert answer.startswith(b"HTTP/1.1 403 ") == (host in FOREIGN)
        told = "not known as 'x\xe9'; ask for localhost, or start it with --allowed-host"
        assert told in answer.decode()
        assert b'"type":"invalid_request_error"' in answer
        assert server.raw(b"GET /ready HTTP/1.0\r\n\r\n", half_close=False).startswith(b"HTTP/1.1 200 ")
        assert server.metric("latentrt_errors_total", kind="http_403") == 3 * len(FOREIGN)


def test_so_does_an_ingress() -> None:
    replicas = Replicas()

    async def test(client: httpx.AsyncClient) -> None:
        for host in OURS:
            assert (await client.get("/v1/models", headers={"Host": host})).status_code == 200
        replicas.sent.clear()
        answers = [await client.get(path, headers={"Host": "evil.example"}) for path in ("/health", "/")]
        answers.append(await client.post(IMAGES, json=body(), headers={"Host": "evil.example"}))
        assert [answer.status_code for answer in answers] == [403] * 3
        assert all(answer.headers["x-request-id"] for answer in answers)
        assert replicas.sent == []

    with_ingress(replicas, test, hosts=NAMES)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("localhost", "127.0.0.1", "::1", "127.0.0.1")),
        ({"host": "127.0.0.2"}, ("localhost", "127.0.0.1", "::1", "127.0.0.2")),
        ({"host": "0.0.0.0"}, ()),
        ({"api_key_file": Path("keys")}, ()),
        ({"allowed_host": ["a", "b"]}, ("localhost", "127.0.0.1", "::1", "127.0.0.1", "a", "b")),
        ({"host": "0.0.0.0", "allowed_host": ["a"]}, ("localhost", "127.0.0.1", "::1", "0.0.0.0", "a")),
    ],
)
def test_what_a_server_is_called(options: dict[str, Any], names: tuple[str, ...]) -> None:
    """Where only this machine reaches it and there are no keys, or it is told."""
    given = {"host": "127.0.0.1", "api_key_file": None, "allowed_host": [], **options}
    assert commands._hosts(Namespace(**given)) == names


def test_the_command_passes_the_names_on_to_ray(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def run(deployed: Deployed, **_: Any) -> None:
        told.append(deployed.hosts)

    monkeypatch.setitem(sys.modules, "latentrt.runtime.serve.ray_local", SimpleNamespace(run=run))
    monkeypatch.setattr(logs, "log_as_json", lambda: None)
    assert run_cli("serve", "--ray", "--allowed-host", "mine.example")[0] == 0
    assert told == [("localhost", "127.0.0.1", "::1", "127.0.0.1", "mine.example")]
