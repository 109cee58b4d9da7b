"""How processes of the benchmarks end: by SIGTERM as by Ctrl-C, and with the one that began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["end_with_parent", "sigterm_as_ctrl_c"]


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, which `timeout` sends, raises KeyboardInterrupt too, once; no other signal of its kind disturbs what is
    written down then. In the main thread, which alone is told of signals."""

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """From now on this process and its group end when its parent is gone, also while it computes.

    For a process of `multiprocessing` that leads its group.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise AssertionError("only a process that another one began can end with it")

    def watch() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="ends with its parent", daemon=True).start()
