"""Runs `latentrt serve` in a process, to measure it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx

from ..errors import BenchmarkError
from .stats import growth

__all__ = ["Memory", "ServerProcess", "run_server"]

_LOADING_SECONDS = 900.0
"""Time for a server to become ready after it listens."""


@dataclass(frozen=True)
class ServerProcess:
    """A running server."""

    url: str
    pid: int

    @property
    def resident(self) -> float:
        """The process's resident memory in MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def metric(self, name: str) -> float:
        """The value of one of its Prometheus metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


class Memory:
    """Samples a server's memory while it is at work.

    Attributes:
        resident: number of requests done -> MiB.
    """

    def __init__(self, server: ServerProcess, *, every: int) -> None:
        """Take a sample after every `every` requests."""
        self.resident: dict[int, float] = {}
        self._server = server
        self._every = every

    def sample(self, count: int) -> None:
        """Called with the number of requests that are done."""
        if count % self._every == 0:
            self.resident[count] = self._server.resident

    @property
    def slope(self) -> float:
        """Growth in KiB a request, over the last half of the samples."""
        last_half = slice(len(self.resident) // 2, None)
        return 1024 * growth(list(self.resident.values())[last_half], list(self.resident)[last_half])


@contextmanager
def run_server(max_batch: int, backend: str, checks: dict[str, bool]) -> Iterator[ServerProcess]:
    """Serve the demo, and wait until it is ready. At the end it gets SIGTERM, and `checks` whether it exited with 0."""
    command = [
        sys.executable,
        "-m",
        "latentrt.cli",
        "serve",
        "--model",
        "demo",
        "--backend",
        backend,
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--max-batch", str(max_batch), "--max-queue", "64"], stderr=subprocess.PIPE, text=True
    )
    try:
        yield ServerProcess(_ready(process), process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(120)
        checks[f"the server with batches of {max_batch} ended with 0"] = process.poll() == 0
    finally:
        process.kill()
        process.wait()


def _ready(process: subprocess.Popen[str]) -> str:
    """Wait until a server takes requests, and return its address."""
    log = process.stderr
    if log is None:
        raise AssertionError("it is piped")
    seen: list[str] = []
    for line in log:
        seen.append(line)
        if (url := _url(line)) is not None:
            # Read on, so that the pipe does not fill up.
            threading.Thread(target=lambda: [None for _ in log], daemon=True).start()
            break
    else:
        raise BenchmarkError(f"the server ended: {''.join(seen[-5:])}")
    deadline = time.monotonic() + _LOADING_SECONDS
    last_response = ""
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):  # a busy server may not answer in time
            response = httpx.get(f"{url}/ready")
            if response.status_code == 200:
                return url
            last_response = response.text
            if "does not load" in last_response:
                break
        time.sleep(0.2)
    raise BenchmarkError(f"the server is not ready: {last_response or 'no answer'}")


def _url(line: str) -> str | None:
    """The server's address, if this line of its log has it. Libraries log lines that are not JSON."""
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError, TypeError):
        return None
