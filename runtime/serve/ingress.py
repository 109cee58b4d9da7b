"""In front of replicas: a request gets its seed here, and where its replica is lost another one makes the same image.

It knows no Ray: `Send` takes a request to some replica that has the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ...errors import DeadlineError, DrainingError, QueueFullError, ServiceError
from .answers import error_event, error_response, refusal, sse
from .doors import request_id_of
from .hosted import Forwarded, Head
from .schema import Limits

__all__ = ["Ingress", "ReplicaLostError", "Send"]

_log = logging.getLogger(__name__)
_access = logging.getLogger("latentrt.access")
_IMAGES = "/v1/images/generations"
_FULL = 5
"""Pauses between two tries where the queues are full."""
_GRACE = 1.0
"""Seconds in which a replica can tell that a request's time has ended, and what was made in time can come."""

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
        self._open = 0  # requests for images that were taken
        self._left = asyncio.Event()  # one of them
        self._draining = False

    async def answer(self, request: Request) -> Response:
        """Any request of the application's."""
        path = request.url.path
        if path == "/health":
            return Response('{"status":"ok"}', media_type="application/json")
        if path == "/ready" and self._draining:
            return JSONResponse({"ready": False, "reason": "it is shutting down"}, 503)
        request_id = request_id_of(request.headers)
        body = await self._body(request)
        if isinstance(body, Response):
            return _own(body, request, request_id)
        model, edit = self._models[0], None
        if path.startswith("/v1/models/") and path.removeprefix("/v1/models/") in self._models:
            edit = partial(_named, model=path.removeprefix("/v1/models/"))
            path = f"/v1/models/{model}"
        elif path == "/v1/models":
            edit = partial(_listed, models=self._models)
        elif path == "/openapi.json":
            edit = partial(_described, models=self._models)
        headers = [(key, value) for key, value in request.headers.raw if key != b"x-request-id"]
        headers.append((b"x-request-id", request_id.encode()))
        asked = Forwarded(request.method, path, request.url.query, tuple(headers), body)
        accepted = (
            _Accepted.of(asked, self._limits.timeout)
            if request.method == "POST" and path == _IMAGES
            else None
        )
        if accepted is not None and accepted.fields.get("model") in self._models:
            model = accepted.fields["model"]
        pieces = self._tried(model, asked, accepted, request_id)
        try:
            head = await anext(pieces)
            if not isinstance(head, Head):
                raise AssertionError("an answer begins with its head")
            if _is_stream(head):
                streamed = StreamingResponse(_bytes(pieces), head.status)
                streamed.raw_headers = list(head.headers)
                return streamed
            whole = b"".join([piece async for piece in _bytes(pieces)])
        except Exception as error:
            return _own(_refused(error, request_id), request, request_id)
        if edit is not None and head.status == 200:
            whole = edit(whole)
        response = Response(status_code=head.status)
        response.body = whole
        response.raw_headers = [(k, v) for k, v in head.headers if k.lower() != b"content-length"]
        response.headers["content-length"] = str(len(whole))
        return response

    async def drain(self, timeout: float) -> bool:
        """Take nothing new, and wait until what was taken is answered; False if not within `timeout` seconds."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                while self._open:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            _log.error("%d requests are not answered after %g s", self._open, timeout)
        return not self._open

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
        self, model: str, asked: Forwarded, accepted: _Accepted | None, request_id: str
    ) -> AsyncGenerator[Head | bytes]:
        """The answer of the first replica that lives to give it, and none of it twice."""
        tries = self._tries if accepted is not None or asked.method == "GET" else 1
        given = None if accepted is None else accepted.timeout
        deadline = asyncio.get_running_loop().time() + (self._limits.timeout if given is None else given)
        told = _Told()
        lost = 0
        with contextlib.nullcontext() if accepted is None else self._taken():
            while True:
                try:
                    request = asked if accepted is None else accepted.request(again=lost > 0)
                    parts = _until(deadline, self._send(model, request))
                    last = lost == tries - 1 or accepted is None
                    async for part in told.new(_settled(parts, last=last, taken=lost > 0)):
                        yield part
                    return
                except Exception as error:
                    if isinstance(error, ReplicaLostError) and lost < tries - 1:
                        lost += 1
                        pauses = 2 ** (lost - 1)
                        _log.warning("%s, the %d. of at most %d", error, lost, tries)
                    elif isinstance(error, QueueFullError) and lost and accepted is not None:
                        pauses = _FULL  # it was taken: it waits for a place, until its deadline
                    elif told.begun:
                        yield _ended(error, request_id)
                        return
                    else:
                        raise
                await asyncio.sleep(self._pause * pauses)

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        if self._draining:
            raise DrainingError("the server is shutting down and takes nothing new; ask another one")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._left.set()


async def _until(deadline: float, parts: AsyncIterator[Head | bytes]) -> AsyncIterator[Head | bytes]:
    """Each part by then, or soon after it is asked for: who reads slowly is sent what was made in time. Bounded one by
    one: a stream may be begun in one task and read in another."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            async with asyncio.timeout_at(max(deadline, loop.time()) + _GRACE):
                try:
                    part = await anext(parts)
                except StopAsyncIteration:
                    return
            yield part
    finally:
        if isinstance(parts, AsyncGenerator):
            await parts.aclose()


async def _settled(
    parts: AsyncIterator[Head | bytes], *, last: bool, taken: bool
) -> AsyncIterator[Head | bytes]:
    """As it comes where it is a stream, else when it is there to its end.

    503 is another replica's to answer, and 429 is none where the request was `taken` before.
    """
    held: list[Head | bytes] | None = None
    async for part in parts:
        if isinstance(part, Head):
            if part.status == 503 and not last:
                raise ReplicaLostError("a replica is not ready, or is leaving")
            if part.status == 429 and taken:
                raise QueueFullError("a replica was lost, and the queue of another one is full", 1.0)
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
    """A request for images with its seed, and what is left of its time.

    Attributes:
        timeout: seconds it has from its acceptance; None where what it names is for the application to refuse.
    """

    def __init__(self, asked: Forwarded, fields: dict[str, Any], most: float) -> None:
        self.fields = fields
        self._asked = asked
        self._begun = time.monotonic()
        given = fields["timeout"]
        known = isinstance(given, int | float) and not isinstance(given, bool) and 0 < given <= most
        self.timeout: float | None = given if known else None

    @classmethod
    def of(cls, asked: Forwarded, most: float) -> _Accepted | None:
        """None where it is for the application to refuse: no JSON, or no object. It has `most` where it names none."""
        try:
            fields = json.loads(asked.body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict):
            return None
        if fields.get("seed") is None:
            fields["seed"] = secrets.randbits(32)
        if fields.get("timeout") is None:
            fields["timeout"] = most
        return cls(asked, fields, most)

    def request(self, *, again: bool) -> Forwarded:
        """
        Args:
            again: a replica that had taken it was lost.

        Raises:
            DeadlineError: none is left.
        """
        fields = self.fields
        if self.timeout is not None:
            left = self.timeout - (time.monotonic() - self._begun)
            if left <= 0:
                raise DeadlineError(
                    f"the image was still being made after {self.timeout:g} s; give it more time"
                )
            fields = {**fields, "timeout": left}
        body = json.dumps(fields).encode()
        headers = [
            (k, v)
            for k, v in self._asked.headers
            if k.lower() not in (b"content-length", b"transfer-encoding")
        ]
        headers.append((b"content-length", str(len(body)).encode()))
        return Forwarded(self._asked.method, self._asked.path, self._asked.query, tuple(headers), body, again)


class _Told:
    """What a client has of an answer; of a stream a second replica tells some events again.

    Attributes:
        begun: whether it has any of it.
    """

    def __init__(self) -> None:
        self.begun = False
        self._held = b""
        self._steps: dict[int, int] = {}
        self._made: set[int] = set()

    async def new(self, parts: AsyncIterator[Head | bytes]) -> AsyncIterator[Head | bytes]:
        """Of a replica's answer."""
        streams = False
        self._held = b""  # half an event of the one before is nothing
        async for part in parts:
            if isinstance(part, Head):
                streams = _is_stream(part)
                if self.begun and not streams:
                    raise ReplicaLostError("the replica was lost, and no other one could go on")
                if not self.begun:
                    self.begun = True
                    yield part
            elif piece := self._unknown(part) if streams else part:
                yield piece

    def _unknown(self, piece: bytes) -> bytes:
        """The events that end in this piece and were not told."""
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


def _named(answer: bytes, model: str) -> bytes:
    """What the first model's application says of itself, for another."""
    return json.dumps({**json.loads(answer), "id": model}).encode()


def _listed(answer: bytes, models: Sequence[str]) -> bytes:
    told = json.loads(answer)
    (entry,) = told["data"]
    return json.dumps({**told, "data": [{**entry, "id": model} for model in models]}).encode()


def _described(answer: bytes, models: Sequence[str]) -> bytes:
    """The OpenAPI document: wherever it allows the first model, all of them."""

    def widened(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "enum": list(models)} if part.get("enum") == [models[0]] else part

    return json.dumps(json.loads(answer, object_hook=widened)).encode()


def _own(answer: Response, request: Request, request_id: str) -> Response:
    """An answer of no replica's, told in the log as theirs are."""
    answer.headers["x-request-id"] = request_id
    fields = {
        "request_id": request_id,
        "method": request.method,
        "path": request.url.path,
        "status": answer.status_code,
        "client": request.client.host if request.client else "",
    }
    _access.info("request", extra={"fields": fields})
    return answer


def _refusal(error: Exception, request_id: str) -> tuple[int, str, str | None, str, dict[str, str]]:
    """(status, message, field, code, headers)"""
    if isinstance(error, ReplicaLostError):
        return 503, str(error), None, "replica_lost", {"Retry-After": "5"}
    if isinstance(error, TimeoutError):
        error = DeadlineError("no replica answered in time; try again, or give it more")
    told = refusal(error)
    if told[0] == 500:
        _log.error("a request failed", exc_info=error, extra={"fields": {"request_id": request_id}})
    return told


def _refused(error: Exception, request_id: str) -> Response:
    return error_response(*_refusal(error, request_id))


def _ended(error: Exception, request_id: str) -> bytes:
    _, message, param, code, _ = _refusal(error, request_id)
    return sse("error", error_event(message, param, code)).encode()
