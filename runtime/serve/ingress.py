"""In front of replicas: a request gets its seed here, and where its replica is lost another one makes the same image.

It knows no Ray: `Send` takes a request to some replica that has the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ...errors import DeadlineError, DrainingError, QueueFullError
from .answers import Refusal, error_response, refusal
from .hosted import Forwarded, Head
from .hosts import Hosts
from .middleware import request_id_of
from .retries import Accepted, NotServingError, ReplicaLostError, SentParts, is_stream, settled, until
from .schema import Limits
from .service import NotReadyError

__all__ = ["Ingress", "Send"]

_log = logging.getLogger(__name__)
_access = logging.getLogger("latentrt.access")
_IMAGES = "/v1/images/generations"
_FULL = 5
"""Pauses between two tries where the queues are full, or a replica serves nothing."""
_LATELY = 60.0
"""Seconds for which a model that was served counts as one that some replica serves."""

Send = Callable[[str, Forwarded], AsyncIterator[Head | bytes]]
"""(model's id, request) -> head and body. Raises ReplicaLostError where the replica dies on the way."""


class Ingress:
    """One for any number of models and replicas."""

    def __init__(
        self,
        models: Sequence[str],
        send: Send,
        *,
        hosts: Sequence[str] = (),
        limits: Limits | None = None,
        tries: int = 5,
        pause: float = 0.2,
    ) -> None:
        """
        Args:
            models: ids; the first is taken where a request names none that is known.
            hosts: one of these names must be asked for; none for no such check.
            tries: replicas a request may lose before it is given up, for it may be what kills them.
            pause: seconds before the second try, doubled for each one after it.
        """
        self._models = list(models)
        self._send = send
        self._hosts = Hosts(hosts)
        self._limits = limits or Limits()
        self._tries = tries
        self._pause = pause
        self._served: dict[str, float] = {}  # when, by the loop's clock
        self._open = 0  # requests for images that were taken
        self._left = asyncio.Event()  # one of them
        self._draining = False

    async def answer(self, request: Request) -> Response:
        """Any request of the application's."""
        path = request.url.path
        request_id = request_id_of(request.headers)
        if (stranger := self._hosts.refused(request.headers)) is not None:
            return _own(stranger, request, request_id)
        if path == "/health":
            return Response('{"status":"ok"}', media_type="application/json")
        if path == "/ready" and self._draining:
            return JSONResponse({"ready": False, "reason": "it is shutting down"}, 503)
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
            Accepted.of(asked, self._limits.timeout) if request.method == "POST" and path == _IMAGES else None
        )
        if accepted is not None and accepted.fields.get("model") in self._models:
            model = accepted.fields["model"]
        pieces = self._tried(model, asked, accepted, request_id)
        try:
            head = await anext(pieces)
            if not isinstance(head, Head):
                raise AssertionError("an answer begins with its head")
            if is_stream(head):
                streamed = StreamingResponse(_bytes(pieces), head.status)
                streamed.raw_headers = list(head.headers)
                return streamed
            whole = b"".join([piece async for piece in _bytes(pieces)])
        except Exception as error:
            return _own(_refusal(error, request_id).response(), request, request_id)
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
        self, model: str, asked: Forwarded, accepted: Accepted | None, request_id: str
    ) -> AsyncGenerator[Head | bytes]:
        """The answer of the first replica that lives to give it, and none of it twice."""
        tries = self._tries if accepted is not None or asked.method in ("GET", "HEAD") else 1
        given = None if accepted is None else accepted.timeout
        clock = asyncio.get_running_loop().time
        deadline = clock() + (self._limits.timeout if given is None else given)
        sent = SentParts()
        lost = 0
        with contextlib.nullcontext() if accepted is None else self._taken():
            while True:
                try:
                    request = asked if accepted is None else accepted.request(again=lost > 0)
                    parts = until(deadline, self._send(model, request))
                    last = lost == tries - 1 or accepted is None
                    async for part in sent.new(settled(parts, last=last, taken=lost > 0), last=last):
                        if accepted is not None and isinstance(part, Head) and part.status == 200:
                            self._served[model] = clock()
                        yield part
                    return
                except Exception as error:
                    served = clock() - self._served.get(model, -math.inf) < _LATELY
                    unready = isinstance(error, NotServingError | NotReadyError)
                    if unready and served and accepted is not None:
                        pauses = _FULL  # another replica serves it: it waits for that one, until its deadline
                    elif isinstance(error, ReplicaLostError) and lost < tries - 1:
                        lost += 1
                        pauses = 2 ** (lost - 1)
                        _log.warning(
                            "%s (lost replica %d of at most %d for this request)", error, lost, tries
                        )
                    elif isinstance(error, QueueFullError) and lost and accepted is not None:
                        pauses = _FULL  # it was taken: it waits for a place, until its deadline
                    elif sent.begun:
                        yield _refusal(error, request_id).event().encode()
                        return
                    else:
                        raise
                await asyncio.sleep(self._pause * pauses)

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        if self._draining:
            raise DrainingError("the server is shutting down; send the request to another one")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._left.set()


async def _bytes(pieces: AsyncIterator[Head | bytes]) -> AsyncIterator[bytes]:
    async for piece in pieces:
        if isinstance(piece, bytes):
            yield piece


def _named(answer: bytes, model: str) -> bytes:
    """What the first model's application says of itself, for another."""
    return json.dumps({**json.loads(answer), "id": model}).encode()


def _listed(answer: bytes, models: Sequence[str]) -> bytes:
    listed = json.loads(answer)
    (entry,) = listed["data"]
    return json.dumps({**listed, "data": [{**entry, "id": model} for model in models]}).encode()


def _described(answer: bytes, models: Sequence[str]) -> bytes:
    """The OpenAPI document: wherever it allows the first model, all of them."""

    def widened(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "enum": list(models)} if part.get("enum") == [models[0]] else part

    return json.dumps(json.loads(answer, object_hook=widened)).encode()


def _own(answer: Response, request: Request, request_id: str) -> Response:
    """An answer of the ingress itself, logged as those of replicas are."""
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


def _refusal(error: Exception, request_id: str) -> Refusal:
    if isinstance(error, ReplicaLostError):
        code = "not_ready" if isinstance(error, NotServingError) else "replica_lost"
        return Refusal(503, str(error), None, code, {"Retry-After": "5"})
    if isinstance(error, TimeoutError):
        error = DeadlineError("no replica answered in time; try again, or give it more")
    refused = refusal(error)
    if refused.status == 500:
        _log.error("a request failed", exc_info=error, extra={"fields": {"request_id": request_id}})
    return refused
