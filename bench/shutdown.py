"""How the benchmarks' processes shut down: on SIGTERM and SIGHUP as on Ctrl-C, and together with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["exit_with_parent", "signals_as_ctrl_c"]


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and on SIGHUP.

    `timeout` sends the first, a closed terminal the second. After the first signal, further ones are ignored until
    the block ends, so that results can be written. A signal that was already ignored (`nohup`) stays ignored. Does
    nothing outside the main thread, which is the only one that may set signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def interrupt(*_: Any) -> None:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in handlers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_with_parent() -> None:
    """Kill this process and its process group as soon as the parent is gone, even in the middle of a computation.

    For a process of `multiprocessing` that leads its group.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise AssertionError("only a child process of multiprocessing has a parent to exit with")

    def watch() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="exits with its parent", daemon=True).start()
