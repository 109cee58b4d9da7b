"""uvicorn, with bounds on its connections; on SIGTERM it lets the engine finish, answering 503 to what is new."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .connection import bounded
from .schema import Limits
from .service import Service

__all__ = ["Server", "listen", "url_of"]

_log = logging.getLogger(__name__)
_ANSWERING = 5
"""Seconds for answers to be written and read when the images are made; more where draining has some left."""


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 for any.

    Raises:
        OSError: it is taken, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.create_server((host, port), family=family, backlog=2048)
    # Connections have their listener's protocol, and asyncio sets TCP_NODELAY where that is given, and not 0: without
    # it each answer after a connection's first waits for the client's delayed acknowledgement, 40 ms on Linux.
    return socket.socket(family, made.type, socket.IPPROTO_TCP, made.detach())


def url_of(host: str, port: int) -> str:
    """Where clients find what listens at an address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """One server over one service."""

    def __init__(
        self, app: FastAPI, service: Service, *, drain_seconds: float, limits: Limits | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(limits or Limits()),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,  # longer than clients keep one: who closes first spoils no request
                timeout_graceful_shutdown=_ANSWERING,
            )
        )
        self._service = service
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for one in sockets or []:
            url = url_of(*one.getsockname()[:2])
            _log.info("listening at %s", url, extra={"fields": {"url": url}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once. They are not raised again: ending so is no failure."""
        self._signals += 1
        if self._loop is None or self._signals > 1:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        _log.info("draining: %d images wait, %d are being made", self._service.waiting, self._service.running)
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        try:
            await self._service.drain(self._drain_seconds)
        finally:
            self.config.timeout_graceful_shutdown = max(_ANSWERING, math.ceil(end - loop.time()))
            self.should_exit = True
