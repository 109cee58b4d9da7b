"""How processes of the benchmarks end: by SIGTERM and SIGHUP as by Ctrl-C, and with the one that began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["end_with_parent", "signals_as_ctrl_c"]


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into one KeyboardInterrupt.

    `timeout` sends the first, a terminal that is gone the second. Later signals are ignored until the block ends, so
    that results can be written; a signal already ignored (`nohup`) stays so. Only in the main thread, which alone is
    told of signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = (signal.SIGTERM, signal.SIGHUP)
    before = {number: was for number in asked if (was := signal.getsignal(number)) is not signal.SIG_IGN}

    def interrupt(*_: Any) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


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
