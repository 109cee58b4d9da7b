"""`runtime/serve/connection.py`: clients that hang up, flood, dawdle, or do not read."""

from __future__ import annotations

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest
import uvicorn
from helpers.fake_runner import FakeRunner, FakeTime, in_loop, pass_time
from helpers.served import Served, served
from helpers.waiting import until
from latentrt.runtime.serve.connection import Connection, bounded
from latentrt.runtime.serve.metrics import Metrics
from latentrt.runtime.serve.schema import Limits
from uvicorn.server import ServerState


def test_floods_of_headers_and_bodies(server: Served) -> None:
    flood = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(
        b"X-%d: %s\r\n" % (k, b"y" * 100) for k in range(3000)
    )
    assert server.raw(flood + b"\r\n")[:10] in (b"HTTP/1.1 4", b"")  # or cut off before the answer was read
    endless = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"y" * 40_000
    assert server.raw(endless, half_close=False)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")
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


def test_hanging_up_in_the_queue_cancels_the_request(server: Served, runner: FakeRunner) -> None:
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


def test_a_client_that_does_not_read_delays_no_other(runner: FakeRunner) -> None:
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


def test_others_are_answered_between_the_chunks_of_a_long_body(server: Served) -> None:
    """However small they are: the event loop takes only so many at once."""
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    sizes = []
    taken = Connection.data_received

    def count(self: Connection, data: bytes) -> None:
        sizes.append(len(data))
        taken(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "data_received", count)
        answer = server.raw(head + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n", half_close=False)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert max(sizes) <= 1 << 14
    assert (
        server.server.config.loop == "asyncio"
    )  # also where uvloop is installed, whose reads cannot be bounded


def test_an_answer_does_not_wait_for_the_last_one_s_acknowledgement(server: Served) -> None:
    """Which a client's system delays."""
    server.client.get("/health")
    sockets = [link.transport.get_extra_info("socket") for link in server.server.server_state.connections]
    assert sockets
    assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("begun", "answer"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-More: ", b"HTTP/1.1 408 "),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"HTTP/1.1 408 "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"HTTP/1.1 408 "),
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", b"HTTP/1.1 200 "),
    ],
)
def test_a_request_that_never_ends_holds_no_connection(begun: bytes, answer: bytes) -> None:
    with served(FakeRunner, limits=Limits(read=0.3)) as server:
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=120)) as link:
            link.sendall(begun)
            pieces = []
            while piece := link.recv(65536):  # until the server hangs up
                pieces.append(piece)
        assert b"".join(pieces)[: len(answer) or None] == answer
        assert server.service.waiting == 0


def test_an_unread_answer_holds_no_connection() -> None:
    class Big(FakeRunner):
        def run(self, requests: Any, on_step: Any) -> Any:
            noise = PIL.Image.effect_noise((300, 300), 90).convert("RGB")
            return [replace(result, image=noise) for result in super().run(requests, on_step)]

    with served(Big, limits=Limits(write=0.3), send_buffer=4096) as server:
        body = json.dumps({"prompt": "x", "steps": 1}).encode()
        with closing(socket.socket()) as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect(("127.0.0.1", server.port))
            link.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            labels = {"method": "POST", "path": "/v1/images/generations", "status": "200"}
            until(lambda: server.metric("latentrt_requests_total", **labels) == 1, 120)
            until(lambda: len(server.server.server_state.connections) <= 1, 120)  # the test's own


class Wire(asyncio.Transport):
    """A transport that sends nothing, and remembers what became of it."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self.written = b""
        self.end: str | None = None
        self.reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.end is not None

    def close(self) -> None:
        self.end = self.end or "closed"

    def abort(self) -> None:
        self.end = "aborted"


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def connected(wire: Wire, app: Any = answer_ok, server: tuple[Any, ServerState] | None = None) -> Any:
    """A connection of a server over it, on the running loop, with 30 s to ask and 60 s to read."""
    kind, state = server or (bounded(Limits(read=30.0, write=60.0), Metrics(), 1), ServerState())
    config = uvicorn.Config(app, http=kind, log_config=None)
    config.load()
    link = config.http_protocol_class(config=config, server_state=state, app_state={})
    link.connection_made(wire)
    return link


@pytest.mark.parametrize("whole", [False, True])
def test_nonsense_after_the_answer_began_closes_the_connection(whole: bool) -> None:
    async def hasty(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok" if whole else b"o", "more_body": not whole})
        await asyncio.Event().wait()

    async def main() -> None:
        wire = Wire()
        link = connected(wire, hasty)
        link.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await pass_time(0.0)
        answered = wire.written
        assert answered.endswith(b"ok" if whole else b"o")
        for nonsense in (b"zz\r\n", b"more"):
            link.data_received(nonsense)
        assert wire.end == "closed"
        assert wire.written == answered

    in_loop(main(), loop=FakeTime)


def test_what_comes_after_a_request_does_not_hide_that_its_client_leaves() -> None:
    """It is read on, for only who reads learns of that; but not a flood."""
    left = []

    async def until_left(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.append(scope)

    async def main() -> None:
        wire = Wire()
        link = connected(wire, until_left)
        link.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        await pass_time(0.0)
        for early in (b"\r\n", b"G" * 60_000):
            link.data_received(early)
            assert wire.reading
        link.data_received(b"G" * 10_000)
        assert not wire.reading
        link.connection_lost(None)
        await pass_time(0.0)
        assert left

    in_loop(main(), loop=FakeTime)


def test_the_time_for_a_request_begins_with_its_first_byte() -> None:
    async def main() -> None:
        wire = Wire()
        link = connected(wire)
        await pass_time(29.0)
        link.data_received(b"GET / HTTP/1.1\r\n")
        await pass_time(29.0)
        link.data_received(b"Host: x\r\n\r\n")
        await pass_time(0.0)
        assert wire.written.endswith(b"ok")
        assert wire.end is None

    in_loop(main(), loop=FakeTime)


def test_slow_readers_are_kept_and_those_that_stop_are_not() -> None:
    async def main() -> None:
        wire = Wire()
        link = connected(wire)
        link.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await pass_time(0.0)
        wire.unsent = 1000
        link.pause_writing()
        for _ in range(5):
            await pass_time(59.0)
            wire.unsent -= 1
        assert wire.end != "aborted"
        link.resume_writing()
        await pass_time(1000.0)
        assert wire.end != "aborted"
        link.pause_writing()
        await pass_time(59.0)
        assert wire.end != "aborted"
        await pass_time(2.0)
        assert wire.end == "aborted"

    in_loop(main(), loop=FakeTime)


def test_a_request_may_take_its_time_but_not_more() -> None:
    async def main() -> None:
        wire = Wire()
        link = connected(wire)
        for piece in (b"GET / HT", b"TP/1.1\r\n", b"Host: x\r\n\r\n"):
            await pass_time(9.0)
            link.data_received(piece)
        await pass_time(1.0)
        assert wire.written.endswith(b"ok")
        assert wire.end is None
        link.data_received(b"GET / HT")  # the next one has time of its own, from its first byte
        await pass_time(29.0)
        assert wire.end is None
        link.data_received(b"TP/1.1\r\nX: ")
        await pass_time(2.0)
        assert wire.end == "closed"
        assert b"HTTP/1.1 408 " in wire.written
        assert b"did not come whole within 30 s" in wire.written

    in_loop(main(), loop=FakeTime)


def test_garbage_gets_400(server: Served) -> None:
    answer = server.raw(half_close=False, data=b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["message"] == "Invalid HTTP request received."


def test_one_connection_too_many_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    """Until others have gone; those that there are go on."""

    async def main() -> None:
        server = bounded(Limits(), Metrics(), 2), ServerState()

        def connect() -> tuple[Wire, Any]:
            wire = Wire()
            return wire, connected(wire, server=server)

        (first, link), (second, _) = connect(), connect()
        refused = [connect() for _ in range(3)]
        assert [wire.end for wire, _ in refused] == ["aborted"] * 3
        for _, gone in refused:
            gone.connection_lost(None)
        assert (first.end, second.end) == (None, None)
        link.connection_lost(None)
        assert connect()[0].end is None
        assert [record.getMessage() for record in caplog.records] == [
            "2 connections are open, the most there may be; others are closed"
        ]
        await pass_time(60.0)
        connect()
        assert len(caplog.records) == 2

    in_loop(main(), loop=FakeTime)
