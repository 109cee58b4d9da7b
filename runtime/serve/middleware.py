"""ASGI middleware that gives every request an id, checks its host and key, bounds its body, logs it and counts it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import error_response
from .hosts import Hosts
from .keys import Keys
from .metrics import Metrics
from .schema import Limits

__all__ = ["RequestMiddleware", "request_id_of"]

_log = logging.getLogger("latentrt.access")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DISCARD = 64 << 20
"""A body that is too long is read on to this many bytes, so that its sender gets to read the answer."""
_OPEN = frozenset({"/", "/health", "/ready", "/openapi.json"})
"""Paths that need no key."""


def request_id_of(headers: Headers) -> str:
    """The client's x-request-id if it is safe to log, else a new random one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else secrets.token_hex(8)


class RequestMiddleware:
    """Wraps an application. Lifespan and websocket scopes pass through."""

    def __init__(self, app: ASGIApp, *, limits: Limits, metrics: Metrics, hosts: Hosts, keys: Keys) -> None:
        self._app = app
        self._hosts = hosts
        self._keys = keys
        self._limits = limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, log={})
        begun = time.perf_counter()
        status: int | None = None

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                answered["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            stranger = self._hosts.refused(headers)
            if stranger is None and scope["path"] not in _OPEN and not self._keys.fit(headers):
                stranger = error_response(
                    401,
                    "the API key is missing or wrong; send Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            body, refusal = await self._body(
                scope, receive, _DISCARD if stranger is None else self._limits.body
            )
            if stranger is not None:
                self._metrics.error(f"http_{stranger.status_code}")
                refusal = stranger
            if refusal is None:
                await self._app(scope, _replayed(body, receive), answer)
            else:
                await refusal(scope, receive, answer)
        except asyncio.CancelledError:
            status = status or 499  # the client left: in a replica that cancels the task
            raise
        finally:
            status = status or 500
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(scope["method"], route, status, seconds)
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
                "client": (scope.get("client") or ("",))[0],
                **state["log"],
            }
            _log.info("request", extra={"fields": fields})

    async def _body(self, scope: Scope, receive: Receive, discard: int) -> tuple[bytes, Response | None]:
        """The whole body, or the response that refuses it; at most `discard` bytes of one that is too long are read."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b"", None
        most = self._limits.body
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"", Response(status_code=499)
            size += len(message.get("body", b""))
            if size <= most:
                body += message.get("body", b"")
            if not message.get("more_body", False) or size > discard:
                break
        if size > most:
            return b"", error_response(
                413, f"the body is longer than {most} bytes; ask for less at once", "prompt"
            )
        return bytes(body), None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what still comes: the client's disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
