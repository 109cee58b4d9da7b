"""Work in several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

__all__ = ["in_threads"]


def in_threads(works: Iterable[Callable[[], object]], seconds: float = 80) -> None:
    """Each in a thread of its own, until all have ended.

    Raises:
        BaseException: the first that one of them raised.
        AssertionError: one of them hangs.
    """
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    for failure in failures:
        raise failure
    assert not any(thread.is_alive() for thread in threads)
