"""Waiting for what other threads and processes do, with a limit and a message."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = ["has_ended", "until", "written"]

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 120.0, *, what: str = "") -> T:
    """What `condition` returns, once that is true.

    Raises:
        AssertionError: it is not within `seconds`; it names `what`.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what or condition} did not come true in {seconds:g} s"
        time.sleep(0.005)
    return found


def written(path: Path, seconds: float = 60.0) -> str:
    """The text of a file that another process writes, once there is any; a longer one is to be renamed into place."""
    return until(lambda: path.exists() and path.read_text("utf-8"), seconds, what=f"a text in {path}") or ""


def has_ended(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process has gone, or is a zombie, by then; one that has not is killed."""

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    try:
        return until(ended, seconds)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        return False
