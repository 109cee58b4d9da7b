"""A server in a thread of the test's own process, over any runner, and ways to talk to it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
from latentrt.runtime.serve.app import create_app
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.metrics import Metrics
from latentrt.runtime.serve.runner import Runner
from latentrt.runtime.serve.schema import Limits
from latentrt.runtime.serve.server import Server, listen
from latentrt.runtime.serve.service import Service

from .waiting import until


@dataclass
class Served:
    """A running server."""

    url: str
    port: int
    client: httpx.Client
    service: Service
    server: Server
    metrics: Metrics

    def ask(self, **fields: Any) -> httpx.Response:
        """POST an image request; `prompt` and a few steps unless told otherwise."""
        return self.client.post("/v1/images/generations", json={"prompt": "a cat", "steps": 3, **fields})

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def raw(self, data: bytes, *, half_close: bool = True) -> bytes:
        """Bytes in, bytes out, as far as the server takes and gives them, over a connection of its own.

        Where the sending half is closed uvicorn may hang up before it answers; where it is not, only the server ends.
        """
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout=240)) as link:
            pieces = []
            try:
                link.sendall(data)
                if half_close:
                    link.shutdown(socket.SHUT_WR)
            except TimeoutError:
                raise
            except OSError:
                pass  # the server has hung up (reset, broken pipe, not connected); what it said can still be read
            with suppress(ConnectionError):
                while piece := link.recv(65536):
                    pieces.append(piece)
            return b"".join(pieces)


@contextmanager
def served(
    make_runner: Callable[[], Runner],
    *,
    limits: Limits | None = None,
    hosts: tuple[str, ...] = (),
    api_keys: tuple[str, ...] = (),
    ready: bool = True,
    drain_seconds: float = 120.0,
    send_buffer: int | None = None,
    **engine: Any,
) -> Iterator[Served]:
    """`make_runner` is called as the model is loaded; `engine` are AsyncEngine's options.

    `send_buffer` bytes are what the system takes of an answer that nobody reads yet; megabytes if not told.
    """
    metrics = Metrics()
    service = Service("cat-model", lambda: AsyncEngine(make_runner(), on_batch=metrics.batch, **engine))
    app = create_app(
        service,
        metrics=metrics,
        limits=limits,
        hosts=hosts,
        api_keys=api_keys,
        drain_seconds=drain_seconds,
    )
    link = listen("127.0.0.1", 0)
    if send_buffer is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = link.getsockname()[1]
    server = Server(app, service, metrics=metrics, drain_seconds=drain_seconds, limits=limits)
    thread = threading.Thread(target=server.run, args=([link],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=240.0) as client:
        try:
            until(lambda: server.started)
            if ready:
                until(lambda: client.get("/ready").status_code == 200)
            yield Served(url, port, client, service, server, metrics)
        finally:
            server.should_exit = True
            thread.join(120)
    assert not thread.is_alive()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of server-sent events."""
    lines = response.text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]
