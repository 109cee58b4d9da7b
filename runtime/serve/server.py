"""uvicorn, with bounds on its connections; on SIGTERM it lets the engine finish, answering 503 to what is new."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from .connection import bounded
from .metrics import Metrics
from .schema import Limits
from .service import Service

if sys.platform != "win32":  # where open files have no such limit
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit

__all__ = ["Server", "allow_files", "listen", "url_of"]

_log = logging.getLogger(__name__)
_ANSWERING = 5
"""Seconds for answers to be written and read when the images are made; more where draining has some left."""
_QUEUE = 2048
"""Connections that the system holds until they are accepted."""
_BURST = 16
"""Connections accepted in one turn of the event loop. They are counted, or closed again, up to four turns later."""
_FILES = 1 << 13
"""Files that a server has a use for; the most that clients may make it open."""
_NO_CONNECTIONS = 256
"""Files of them that are left for bursts, the model and the device."""


def allow_files() -> None:
    """Let this process open as many files as a server has a use for, as far as the system lets it."""
    if sys.platform != "win32":
        soft, hard = getrlimit(RLIMIT_NOFILE)
        wanted = _FILES if hard == RLIM_INFINITY else min(hard, _FILES)
        if soft != RLIM_INFINITY and soft < wanted:
            setrlimit(RLIMIT_NOFILE, (wanted, hard))


def _most_connections() -> int:
    """How many fit into the files that this process may open."""
    files = _FILES
    if sys.platform != "win32" and (soft := getrlimit(RLIMIT_NOFILE)[0]) != RLIM_INFINITY:
        files = min(soft, _FILES)
    return files - min(_NO_CONNECTIONS, files // 2)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 for any.

    Raises:
        OSError: it is taken, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.create_server((host, port), family=family, backlog=_QUEUE)
    # Connections have it from their listener: without it each answer after a connection's first waits for the client's
    # delayed acknowledgement, 40 ms on Linux. asyncio sets it only where a socket names its protocol.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def url_of(host: str, port: int) -> str:
    """Where clients find what listens at an address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """One server over one service."""

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        *,
        metrics: Metrics,
        drain_seconds: float,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(limits or Limits(), metrics, _most_connections()),
                loop="asyncio",  # uvloop, which Ray brings along, reads 256 KiB at once whatever it is told
                backlog=_BURST,
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
            one.listen(_QUEUE)  # asyncio lets as many wait as it accepts at once
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
