"""uvicorn's HTTP/1.1 connection with two deadlines, for a request to come and for its answer to be taken, and not more
than so many at once.

uvicorn bounds the time between requests alone: headers that never end, or an answer that nobody reads, would hold
a connection, and what was made for it, for good. Nor does it bound connections: once no file is left for the next one,
asyncio tries to accept it thousands of times a second, and logs each.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
from typing import cast

import h11
from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

from .answers import error_body
from .metrics import Metrics
from .middleware import REFUSED, request_id_of, tell
from .schema import Limits

__all__ = ["Connection", "bounded"]

_log = logging.getLogger(__name__)
_EARLY = 1 << 16
"""Bytes read of what a client sends after a request and before its answer."""
_AT_ONCE = 1 << 14
"""Bytes read at once: in asyncio's 256 KiB of chunks of one byte the event loop would be lost for a second."""
_QUIET = 60.0
"""Seconds in which it is logged only once that there are too many connections."""


class Connection(H11Protocol):
    """One client's connection, within `limits.read` and `limits.write`; closed at once if there are `most` others."""

    limits: Limits
    metrics: Metrics
    most: int
    _quiet_until = -math.inf  # of all connections
    _arriving: asyncio.TimerHandle | None = None
    _leaving: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._say_full()
            transport.abort()
            return
        if hasattr(transport, "max_size"):  # of asyncio's for selectors, not of Windows' for completions
            transport.max_size = _AT_ONCE
        transport.set_write_buffer_limits(high=0)  # any byte that waits is known of, and so has its deadline
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arriving, self._leaving):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._asked_nothing and not self.conn.trailing_data[0] and self._arriving is not None:
            self._arriving.cancel()  # it waited for the first byte, and waits for the last from here on
            self._arriving = None
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _EARLY:
            self.flow.resume_reading()  # of a client that is not read from nobody learns that it hangs up
        self._watch_arrival()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_arrival()  # of what may have come already of the next request

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_departure(self._unsent)

    def resume_writing(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    @property
    def _asked_nothing(self) -> bool:
        """Whether no request has come yet."""
        return self.cycle is None

    @property
    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    def _say_full(self) -> None:
        now = self.loop.time()
        if now >= self._quiet_until:
            type(self)._quiet_until = now + _QUIET
            _log.warning("%d connections are open, the most there may be; others are closed", self.most)

    def _watch_arrival(self) -> None:
        """Keep a deadline while a request is on its way, or the first one is awaited."""
        partly = self.conn.their_state is h11.SEND_BODY or (
            self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        )
        if not (self._asked_nothing or partly):
            if self._arriving is not None:
                self._arriving.cancel()
                self._arriving = None
        elif self._arriving is None:
            self._arriving = self.loop.call_later(self.limits.read, self._not_arrived)

    def _not_arrived(self) -> None:
        if self.transport.is_closing():
            return
        said_something = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if said_something:
            self._refuse(
                408, f"the request did not come whole within {self.limits.read:g} s; send it at once"
            )
        else:
            self.transport.close()

    def _watch_departure(self, unsent: int) -> None:
        self._leaving = self.loop.call_later(self.limits.write, self._not_left, unsent)

    def _not_left(self, unsent: int) -> None:
        if self._unsent < unsent:
            self._watch_departure(self._unsent)
            return
        _log.warning(
            "a client read nothing for %g s; closing its connection with %d bytes unsent",
            self.limits.write,
            unsent,
        )
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no whole request, where no answer has begun, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self.metrics.error(f"http_{status}")
        if self.cycle is None or self.cycle.response_complete:
            request_id = secrets.token_hex(8)
            self._tell_refused(status, request_id)
        else:
            self.cycle.disconnected = True  # for the application there is nothing left to answer
            state = self.scope["state"]
            state[REFUSED] = status
            # The application may not have begun, and takes this one then.
            request_id = state.setdefault("request_id", request_id_of(Headers(raw=self.headers)))
        body = json.dumps(error_body(status, message)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", request_id.encode()),
        ]
        events: list[h11.Event] = [
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        self.transport.write(b"".join(cast(bytes, self.conn.send(event)) for event in events))
        self.transport.close()

    def _tell_refused(self, status: int, request_id: str) -> None:
        """Of what did not get as far as the application: nothing is known of it."""
        now = self.loop.time()
        begun = now if self._arriving is None else self._arriving.when() - self.limits.read
        tell(
            self.metrics,
            request_id=request_id,
            method="",
            path="",
            route="other",
            status=status,
            seconds=now - begun,
            client=self.client[0] if self.client else "",
            error=f"http_{status}",
        )


def bounded(limits: Limits, metrics: Metrics, most: int) -> type[Connection]:
    """Connections within these limits, and so many at once; `metrics` are told what they answer themselves."""

    class Bounded(Connection):
        pass

    Bounded.limits = limits
    Bounded.metrics = metrics
    Bounded.most = most
    return Bounded
