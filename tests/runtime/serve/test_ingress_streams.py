"""`runtime/serve/ingress.py` and `retries.py`: streams whose replica is lost or ends: none tells anything twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2 as httpx
import pytest
from helpers.fake_runner import FakeTime, in_loop, pass_time
from helpers.replicas import FULL, IMAGES, LOST, Replicas, body, with_ingress
from helpers.served import events_of
from latentrt.errors import BackendError, DrainingError, StoppedError
from latentrt.runtime.serve.answers import Refusal, refusal
from latentrt.runtime.serve.hosted import Forwarded, Head
from latentrt.runtime.serve.ingress import Ingress
from latentrt.runtime.serve.schema import Limits
from starlette.requests import Request
from starlette.responses import StreamingResponse

STREAM = Head(200, ((b"content-type", b"text/event-stream"),))
EVENT = b'event: x\ndata: {"type": "image_generation.partial_image", "image": 0, "step": 1}\n\n'


def events_in(answer: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream's events, which ends once at most."""
    assert answer.text.splitlines().count("data: [DONE]") <= 1
    return events_of(answer)


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_stream_continues_at_another_replica_without_repeated_events(after: int) -> None:
    """It is lost after so many pieces: its head, and events."""
    replicas = Replicas(after)

    async def test(client: httpx.AsyncClient) -> None:
        answer = await client.post(IMAGES, json=body(n=2, stream=True, steps=8))
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_in(answer)
        made = [event["image"] for event in events if event["type"] == "image_generation.completed"]
        assert sorted(made) == [0, 1]
        for image in (0, 1):
            steps = [event["step"] for event in events if event["image"] == image and "step" in event]
            assert steps == sorted(set(steps))
        assert answer.text.endswith("data: [DONE]\n\n")
        assert len({sent["seed"] for sent in replicas.bodies()}) == 1
        assert len(replicas.sent) == 2

    with_ingress(replicas, test)


def test_a_stream_that_no_replica_ends_says_so() -> None:
    async def test(client: httpx.AsyncClient) -> None:
        events = events_in(await client.post(IMAGES, json=body(stream=True)))
        assert events[-1]["error"]["code"] == "replica_lost"
        assert events[-1]["error"]["type"] == "server_error"

    with_ingress(Replicas(*[2] * 9), test, tries=3)


def beginning(*parts: Head | bytes) -> Replicas:
    """The first try comes to these parts."""
    replicas = Replicas()
    well = replicas.send

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        if replicas.sent:
            async for part in well(model, request):
                yield part
        else:
            replicas.sent.append((model, request))
            for part in parts:
                yield part

    replicas.send = send  # type: ignore[method-assign]
    return replicas


@pytest.mark.parametrize("error", [StoppedError("a fault"), DrainingError("it leaves"), BackendError("no")])
@pytest.mark.parametrize("tries", [1, 2])
def test_a_stream_whose_engine_ends_continues_at_another_replica(error: Exception, tries: int) -> None:
    """As a plain answer with 503 does; what failed otherwise would fail there as well."""
    refused = refusal(error)
    ended = refused.event(image=0).encode()
    replicas = beginning(STREAM, EVENT + ended, b"data: [DONE]\n\n")

    async def test(client: httpx.AsyncClient) -> None:
        first, *others, last = events_in(await client.post(IMAGES, json=body(stream=True)))
        assert first["step"] == 1
        if tries == 2 and refused.status == 503:
            assert all(event["step"] > 1 for event in others)
            assert last["type"] == "image_generation.completed"
        else:
            assert (others, last["error"]["code"]) == ([], refused.code)

    with_ingress(replicas, test, tries=tries)


def test_an_image_that_failed_is_not_made_for_the_client_at_another_replica() -> None:
    """Which makes all of them again: each comes to one end, an error or a picture."""
    failed, lost = (
        Refusal(500, "no", None, code).event(image).encode()
        for image, code in ((1, "internal"), (0, "stopped"))
    )

    async def test(client: httpx.AsyncClient) -> None:
        first, *others = events_in(await client.post(IMAGES, json=body(stream=True, n=2)))
        assert first["error"]["image"] == 1
        assert {event["image"] for event in others} == {0}
        assert others[-1]["type"] == "image_generation.completed"

    with_ingress(beginning(STREAM, failed, lost), test)


def test_a_truncated_event_is_not_forwarded() -> None:
    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        yield STREAM
        if not tried:
            tried.append(1)
            yield EVENT[:20]
            raise LOST
        yield EVENT + b"data: [DO"
        yield b"NE]\n\n"

    tried: list[int] = []
    replicas = Replicas()
    replicas.send = send  # type: ignore[method-assign]

    async def test(client: httpx.AsyncClient) -> None:
        assert (await client.post(IMAGES, json=body(stream=True))).content == EVENT + b"data: [DONE]\n\n"

    with_ingress(replicas, test)


def test_who_reads_slowly_is_sent_what_was_made_in_time() -> None:
    """And who waits for what was not is told of the deadline."""
    made = [EVENT.replace(b'"step": 1', b'"step": %d' % step) for step in (1, 2, 3)]

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        yield STREAM
        for event in made:
            await asyncio.sleep(0)  # as for what is there
            yield event
        await asyncio.Event().wait()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"prompt": "x", "timeout": 20, "stream": true}'}

    async def main() -> None:
        request = Request({"type": "http", "method": "POST", "path": IMAGES, "headers": []}, receive)
        answer = await Ingress(["cat"], send).answer(request)
        assert isinstance(answer, StreamingResponse)
        pieces = answer.body_iterator
        for event in made:
            await pass_time(15)  # a slow reader's
            assert await anext(pieces) == event
        last = asyncio.ensure_future(anext(pieces))
        await pass_time(1.1)
        assert b"deadline_exceeded" in last.result()

    in_loop(main(), loop=FakeTime)


def streamed_then(*, limits: Limits, after: Callable[[], Awaitable[None]]) -> list[dict[str, Any]]:
    """The events of a stream whose replica is lost after the first of them, and what its other tries come to."""
    replicas = Replicas()

    async def send(model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        replicas.sent.append((model, request))
        if len(replicas.sent) > 1:
            await after()
        yield STREAM
        yield EVENT
        raise LOST

    replicas.send = send  # type: ignore[method-assign]
    events = []

    async def test(client: httpx.AsyncClient) -> None:
        events.extend(events_in(await client.post(IMAGES, json=body(stream=True))))

    with_ingress(replicas, test, limits=limits)
    return events


def test_a_stream_whose_time_ends_at_another_replica_says_so() -> None:
    async def late() -> None:
        await asyncio.sleep(60)

    async def full() -> None:
        raise FULL

    for after in (late, full):  # in the replica; at the ingress
        first, last = streamed_then(limits=Limits(timeout=0.3), after=after)
        assert first["step"] == 1
        assert last["error"]["code"] == "deadline_exceeded"


def test_a_fault_of_a_replica_hides_its_text_in_a_stream() -> None:
    async def fault() -> None:
        raise RuntimeError("the secret")

    last = streamed_then(limits=Limits(), after=fault)[-1]
    assert last["error"]["code"] == "internal"
    assert "secret" not in last["error"]["message"]
