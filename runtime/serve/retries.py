"""One answer out of several replicas': what is left of a request's time, and what its client already has."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from ...errors import DeadlineError, QueueFullError, ServiceError
from .hosted import Forwarded, Head

__all__ = ["Accepted", "NotServingError", "ReplicaLostError", "SentParts", "is_stream", "settled", "until"]

_GRACE = 1.0
"""Seconds in which a replica can tell that a request's time has ended, and what was made in time can come."""
_ENDED = frozenset({"draining", "not_ready", "stopped"})
"""Codes of errors that end a stream because its engine has ended: 503 in a plain answer."""


class ReplicaLostError(ServiceError):
    """A replica died before its answer was whole."""


class NotServingError(ReplicaLostError):
    """A replica lives, and took nothing: its model is not loaded, or its engine has stopped."""


async def until(deadline: float, parts: AsyncIterator[Head | bytes]) -> AsyncIterator[Head | bytes]:
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


async def settled(
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
            if not is_stream(part):
                held = []
        if held is None:
            yield part
        else:
            held.append(part)
    for part in held or ():
        yield part


def is_stream(head: Head) -> bool:
    """Whether server-sent events follow."""
    return head.header("content-type").startswith("text/event-stream")


class Accepted:
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
    def of(cls, asked: Forwarded, most: float) -> Accepted | None:
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
            remaining = self.timeout - (time.monotonic() - self._begun)
            if remaining <= 0:
                raise DeadlineError(
                    f"the image was still being made after {self.timeout:g} s; give it more time"
                )
            fields = {**fields, "timeout": remaining}
        body = json.dumps(fields).encode()
        headers = [
            (k, v)
            for k, v in self._asked.headers
            if k.lower() not in (b"content-length", b"transfer-encoding")
        ]
        headers.append((b"content-length", str(len(body)).encode()))
        return Forwarded(self._asked.method, self._asked.path, self._asked.query, tuple(headers), body, again)


class SentParts:
    """The parts of an answer that its client has already: a second replica sends some events of a stream again.

    Attributes:
        begun: whether the client has any part.
    """

    def __init__(self) -> None:
        self.begun = False
        self._steps: dict[int, int] = {}
        self._done: set[int] = set()  # images that were made, or failed

    async def new(self, parts: AsyncIterator[Head | bytes], *, last: bool) -> AsyncIterator[Head | bytes]:
        """The parts of a replica's answer that the client does not have yet.

        Raises:
            ReplicaLostError: its engine ended before the stream did, and it is not the `last` to be asked.
        """
        streams = False
        held = b""  # half an event; that of the replica before was dropped
        async for part in parts:
            if isinstance(part, Head):
                streams = is_stream(part)
                if self.begun and not streams:
                    raise ReplicaLostError("the replica was lost, and no other one could go on")
                if not self.begun:
                    self.begun = True
                    yield part
            elif not streams:
                yield part
            else:
                *events, held = (held + part).split(b"\n\n")
                for event in events:
                    fields = _fields(event)
                    if not last and fields.get("error", {}).get("code") in _ENDED:
                        raise ReplicaLostError("a replica's engine ended before its stream did")
                    if self._is_new(fields):
                        yield event + b"\n\n"

    def _is_new(self, fields: dict[str, Any]) -> bool:
        failed: int | None = fields.get("error", {}).get("image")  # the others go on
        image, step = fields.get("image", 0) if failed is None else failed, fields.get("step")
        if failed is not None or fields.get("type") == "image_generation.completed":
            known = image in self._done
            self._done.add(image)
            return not known
        if step is None:
            return True
        known = image in self._done or step <= self._steps.get(image, 0)
        self._steps[image] = max(step, self._steps.get(image, 0))
        return not known


def _fields(event: bytes) -> dict[str, Any]:
    """The data of an event; nothing of one that has none, or is the last."""
    data = event.partition(b"data: ")[2]
    fields: dict[str, Any] = json.loads(data) if data.startswith(b"{") else {}
    return fields
