"""In front of replicas: a request gets its seed here, and where its replica is lost another one makes the same image.

It knows no Ray: `Send` takes a request to some replica that has the model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from ...errors import DeadlineError, LatentRTError, QueueFullError, ServiceError
from .answers import error_response, refusal, sse
from .hosted import Forwarded, Head
from .schema import Limits

__all__ = ["Ingress", "ReplicaLostError", "Send"]

_log = logging.getLogger(__name__)
_IMAGES = "/v1/images/generations"

Send = Callable[[str, Forwarded], AsyncIterator[Head | bytes]]
"""(model's id, request) -> head and body. Raises ReplicaLostError where the replica dies on the way."""


class ReplicaLostError(ServiceError):
    """A replica died before its answer was whole."""


class Ingress:
    """One for any number of models and replicas."""

    def __init__(
        self,
        models: Sequence[str],
        send: Send,
        *,
        limits: Limits | None = None,
        tries: int = 5,
        pause: float = 0.2,
    ) -> None:
        """
        Args:
            models: ids; the first is taken where a request names none that is known.
            tries: replicas a request may lose before it is given up, for it may be what kills them.
            pause: seconds before the second try, doubled for each one after it.
        """
        self._models = list(models)
        self._send = send
        self._limits = limits or Limits()
        self._tries = tries
        self._pause = pause

    async def answer(self, request: Request) -> Response:
        """Any request of the application's."""
        path = request.url.path
        if path == "/health":
            return Response('{"status":"ok"}', media_type="application/json")
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        model, shown = self._models[0], None
        if path.startswith("/v1/models/") and path.removeprefix("/v1/models/") in self._models:
            shown = [path.removeprefix("/v1/models/")]
            path = f"/v1/models/{model}"
        elif path == "/v1/models":
            shown = self._models
        headers = list(request.headers.raw)
        if "x-request-id" not in request.headers:
            headers.append((b"x-request-id", secrets.token_hex(8).encode()))
        asked = Forwarded(request.method, path, request.url.query, tuple(headers), body)
        accepted = _Accepted.of(asked) if request.method == "POST" and path == _IMAGES else None
        if accepted is not None and accepted.fields.get("model") in self._models:
            model = accepted.fields["model"]
        pieces = self._tried(model, asked, accepted)
        try:
            head = await anext(pieces)
        except (LatentRTError, TimeoutError) as error:
            return _refused(error)
        if not isinstance(head, Head):
            raise AssertionError("an answer begins with its head")
        if _is_stream(head):
            streamed = StreamingResponse(_bytes(pieces), head.status)
            streamed.raw_headers = list(head.headers)
            return streamed
        try:
            whole = b"".join([piece async for piece in _bytes(pieces)])
        except (LatentRTError, TimeoutError) as error:
            return _refused(error)
        if shown is not None and head.status == 200:
            whole, head = _listed(whole, shown, path == "/v1/models"), Head(200)
        response = Response(whole, head.status, media_type=None if head.headers else "application/json")
        if head.headers:
            response.raw_headers = list(head.headers)
        return response

    async def _body(self, request: Request) -> bytes | Response:
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.read):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self._limits.body:
                        return error_response(
                            413, f"the body is longer than {self._limits.body} bytes; ask for less", "prompt"
                        )
        except ClientDisconnect:
            return Response(status_code=499)
        except TimeoutError:
            return error_response(
                408, f"the body did not come within {self._limits.read:g} s; send it at once"
            )
        return bytes(body)

    async def _tried(
        self, model: str, asked: Forwarded, accepted: _Accepted | None
    ) -> AsyncIterator[Head | bytes]:
        """The answer of the first replica that lives to give it, and none of it twice."""
        tries = self._tries if accepted is not None or asked.method == "GET" else 1
        deadline = asyncio.get_running_loop().time() + self._limits.timeout
        events: _Events | None = None
        for k in range(1, tries + 1):
            try:
                request = asked if accepted is None else accepted.request()
                parts = _until(deadline, self._send(model, request))
                async for part in _settled(parts, last=k == tries or accepted is None):
                    if not isinstance(part, Head):
                        piece = part if events is None else events.new(part)
                        if piece:
                            yield piece
                    elif events is None:
                        yield part
                        events = _Events() if _is_stream(part) else None
                    elif _is_stream(part):
                        events.again()
                    else:
                        raise ReplicaLostError("the replica was lost, and no other one could go on")
                return
            except (ReplicaLostError, QueueFullError) as error:
                full = isinstance(error, QueueFullError) and events is None
                if k < tries and not full:
                    _log.warning("try %d of %d: %s", k, tries, error)
                    await asyncio.sleep(self._pause * 2 ** (k - 1))
                elif events is None:
                    raise
                else:
                    yield _ended(error)


async def _until(deadline: float, parts: AsyncIterator[Head | bytes]) -> AsyncIterator[Head | bytes]:
    """Each part by then. Bounded one by one: a stream may be begun in one task and read in another."""
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()


async def _settled(parts: AsyncIterator[Head | bytes], *, last: bool) -> AsyncIterator[Head | bytes]:
    """As it comes where it is a stream, else when it is there to its end; 503 is another replica's to answer."""
    held: list[Head | bytes] | None = None
    async for part in parts:
        if isinstance(part, Head):
            if part.status == 503 and not last:
                raise ReplicaLostError("a replica is not ready, or is leaving")
            if not _is_stream(part):
                held = []
        if held is None:
            yield part
        else:
            held.append(part)
    for part in held or ():
        yield part


def _is_stream(head: Head) -> bool:
    return head.header("content-type").startswith("text/event-stream")


class _Accepted:
    """A request for images with its seed, and what is left of its time."""

    def __init__(self, asked: Forwarded, fields: dict[str, Any]) -> None:
        self.fields = fields
        self._asked = asked
        self._begun = time.monotonic()

    @classmethod
    def of(cls, asked: Forwarded) -> _Accepted | None:
        """None where it is for the application to refuse: no JSON, or no object."""
        try:
            fields = json.loads(asked.body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict):
            return None
        if fields.get("seed") is None:
            fields["seed"] = secrets.randbits(32)
        return cls(asked, fields)

    def request(self) -> Forwarded:
        """
        Raises:
            DeadlineError: none is left.
        """
        fields, timeout = self.fields, self.fields.get("timeout")
        if isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0:
            left = timeout - (time.monotonic() - self._begun)
            if left <= 0:
                raise DeadlineError(f"the image was still being made after {timeout:g} s; give it more time")
            fields = {**fields, "timeout": left}
        body = json.dumps(fields).encode()
        headers = [
            (k, v)
            for k, v in self._asked.headers
            if k.lower() not in (b"content-length", b"transfer-encoding")
        ]
        headers.append((b"content-length", str(len(body)).encode()))
        return Forwarded(self._asked.method, self._asked.path, self._asked.query, tuple(headers), body)


class _Events:
    """Which of a stream's events a second replica tells again."""

    def __init__(self) -> None:
        self._held = b""
        self._steps: dict[int, int] = {}
        self._made: set[int] = set()

    def again(self) -> None:
        """Another replica begins; half an event of the one before is nothing."""
        self._held = b""

    def new(self, piece: bytes) -> bytes:
        """Those that end in this piece and were not told."""
        *events, self._held = (self._held + piece).split(b"\n\n")
        return b"".join(event + b"\n\n" for event in events if self._is_new(event))

    def _is_new(self, event: bytes) -> bool:
        data = event.partition(b"data: ")[2]
        if not data.startswith(b"{"):
            return True
        told = json.loads(data)
        image, step = told.get("image", 0), told.get("step")
        if told.get("type") == "image_generation.completed":
            known = image in self._made
            self._made.add(image)
            return not known
        if step is None:
            return True
        known = image in self._made or step <= self._steps.get(image, 0)
        self._steps[image] = max(step, self._steps.get(image, 0))
        return not known


async def _bytes(pieces: AsyncIterator[Head | bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        if isinstance(piece, bytes):
            yield piece


def _listed(answer: bytes, models: Sequence[str], as_list: bool) -> bytes:
    """What the first model's application says of itself, for each."""
    told = json.loads(answer)
    entry = told["data"][0] if as_list else told
    entries = [{**entry, "id": model} for model in models]
    return json.dumps({**told, "data": entries} if as_list else entries[0]).encode()


def _refused(error: Exception) -> Response:
    if isinstance(error, ReplicaLostError):
        return error_response(503, str(error), None, "replica_lost", {"Retry-After": "5"})
    if isinstance(error, TimeoutError):
        return error_response(504, "no replica answered in time; try again", "timeout", "deadline_exceeded")
    status, message, param, code, headers = refusal(error)
    return error_response(status, message, param, code, headers)


def _ended(error: Exception) -> bytes:
    body = {"message": str(error), "param": None, "code": "replica_lost", "type": "server_error"}
    return sse("error", {"error": body}).encode()
