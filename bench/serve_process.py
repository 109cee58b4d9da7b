"""`latentrt serve` as a process to measure: started, ready, looked at, ended."""

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

__all__ = ["Memory", "Running", "serving"]

_LOADING_SECONDS = 900.0
"""In which a server has to be ready once it listens."""


@dataclass(frozen=True)
class Running:
    """A server process."""

    url: str
    pid: int

    @property
    def resident(self) -> float:
        """MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def counted(self, name: str) -> float:
        """A figure of its metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


class Memory:
    """A server's, while it is at work: requests that have ended -> MiB."""

    def __init__(self, server: Running, *, every: int) -> None:
        """`every` so many requests it is looked at."""
        self.resident: dict[int, float] = {}
        self._server = server
        self._every = every

    def sample(self, count: int) -> None:
        """So many have ended."""
        if count % self._every == 0:
            self.resident[count] = self._server.resident

    @property
    def slope(self) -> float:
        """KiB a request, over the last half of them."""
        late = slice(len(self.resident) // 2, None)
        return 1024 * growth(list(self.resident.values())[late], list(self.resident)[late])


@contextmanager
def serving(max_batch: int, backend: str, checks: dict[str, bool]) -> Iterator[Running]:
    """The demo behind a port, warm; told to end by SIGTERM, and `checks` whether it did."""
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
        yield Running(_ready(process), process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(120)
        checks[f"the server with batches of {max_batch} ended with 0"] = process.poll() == 0
    finally:
        process.kill()  # nothing, where it has ended
        process.wait()


def _ready(process: subprocess.Popen[str]) -> str:
    """Its address, once it takes requests."""
    log = process.stderr
    if log is None:
        raise AssertionError("it is piped")
    seen: list[str] = []
    for line in log:
        seen.append(line)
        if (url := _url(line)) is not None:
            threading.Thread(target=lambda: [None for _ in log], daemon=True).start()  # or it would fill up
            break
    else:
        raise BenchmarkError(f"the server ended: {''.join(seen[-5:])}")
    deadline = time.monotonic() + _LOADING_SECONDS
    answer = ""
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):  # a busy one may take longer than one question waits
            response = httpx.get(f"{url}/ready")
            if response.status_code == 200:
                return url
            answer = response.text
            if "does not load" in answer:
                break
        time.sleep(0.2)
    raise BenchmarkError(f"the server is not ready: {answer or 'no answer'}")


def _url(line: str) -> str | None:
    """The address, if this line of the log has it; libraries write lines there that are no JSON."""
    try:
        return str(json.loads(line)["url"])
    except (ValueError, KeyError, TypeError):
        return None
