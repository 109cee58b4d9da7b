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
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import error_response
from .hosts import Hosts
from .keys import Keys
from .metrics import Metrics
from .schema import Limits

__all__ = ["REFUSED", "RequestMiddleware", "request_id_of", "tell"]

_log = logging.getLogger("latentrt.access")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DISCARD = 64 << 20
"""A body that is too long is read on to this many bytes, so that its sender gets to read the answer."""
_LEFT = 499
"""The status where the client left, and nobody is answered."""
_OPEN = frozenset({"/", "/health", "/ready", "/openapi.json"})
"""Paths that need no key."""
REFUSED = "refused"
"""In a request's state: the status with which its connection answered in the application's place."""


def request_id_of(headers: Headers) -> str:
    """The client's x-request-id if it is safe to log, else a new random one."""
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else secrets.token_hex(8)


def tell(metrics: Metrics, *, route: str, method: str, status: int, seconds: float, **fields: Any) -> None:
    """Count an answer, and log it with these fields."""
    metrics.request(method, route, status, seconds)
    fields = {"method": method, "status": status, "seconds": round(seconds, 4), **fields}
    _log.info("request", extra={"fields": fields})


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
        state: dict[str, Any] = scope.setdefault("state", {})
        request_id = state.setdefault("request_id", request_id_of(headers))
        state["log"] = {}
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
            body, refusal = await self._body(scope, receive, self._stranger(headers, scope["path"]))
            if refusal is None:
                # RFC 9110, section 9.3.2; the server leaves the body out.
                inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
                await self._app(inner, _replayed(body, receive), answer)
            else:
                if refusal.status_code != _LEFT:
                    state["log"]["error"] = f"http_{refusal.status_code}"
                    self._metrics.error(state["log"]["error"])
                await refusal(scope, receive, answer)
        except asyncio.CancelledError:
            status = status or _LEFT  # in a replica that cancels the task
            raise
        finally:
            status = status or 500
            if REFUSED in state:
                status = state[REFUSED]
                state["log"]["error"] = f"http_{status}"
            tell(
                self._metrics,
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                route=_route(scope),
                status=status,
                seconds=time.perf_counter() - begun,
                client=(scope.get("client") or ("",))[0],
                **state["log"],
            )

    def _stranger(self, headers: Headers, path: str) -> Response | None:
        """The answer to a request that may not come in."""
        refusal = self._hosts.refused(headers)
        if refusal is None and path not in _OPEN and not self._keys.fit(headers):
            return error_response(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return refusal

    async def _body(
        self, scope: Scope, receive: Receive, stranger: Response | None
    ) -> tuple[bytes, Response | None]:
        """The whole body, or the response that refuses it: `stranger`, for whom less of a long one is read."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b"", stranger
        most = self._limits.body
        discard = _DISCARD if stranger is None else most
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"", Response(status_code=_LEFT)
            size += len(message.get("body", b""))
            if size <= most:
                body += message.get("body", b"")
            if not message.get("more_body", False) or size > discard:
                break
        if stranger is None and size > most:
            return b"", error_response(
                413, f"the body is longer than {most} bytes; ask for less at once", "prompt"
            )
        return bytes(body), stranger


def _route(scope: Scope) -> str:
    """The path as the application has it, by which requests are counted: clients may invent any number of others."""
    matching = (route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE)
    return getattr(next(matching, None), "path", "other")


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
