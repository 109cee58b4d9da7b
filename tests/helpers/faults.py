"""Errors of the operating system, as tests plant them."""

from __future__ import annotations

import errno
import os

__all__ = ["disk_full"]


def disk_full(path: object = None) -> OSError:
    """What writing to `path`, where one is given, raises on a disk that is full."""
    where = () if path is None else (str(path),)
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *where)
