"""SHA-256 of files, remembered.

Hashing five gigabytes takes seconds and the weights rarely change, so a digest is kept in `digests.json` with
the file's size, inode, mtime and ctime, and holds while all four stay the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from filelock import FileLock

from ..kernels.atomic_file import write_json
from .cache import cache_root
from .sha256 import file_identity, sha256_of

__all__ = ["DigestMemory", "combined"]

_log = logging.getLogger(__name__)


class DigestMemory:
    """Digests of files, in `digests.json` under the cache folder. Safe for several threads and processes.

    Args:
        cache_dir: as for `cache.cache_root`. When it cannot be written, digests are remembered by this object alone,
            and a warning says so.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self._file = cache_root(cache_dir) / "digests.json"
        self._unwritten: dict[str, list[int | str]] = {}

    def digest(self, file: Path) -> str:
        """SHA-256 of the file's contents, in hex."""
        path = file.resolve()
        stamp = file_identity(path)
        known = self._unwritten.get(str(path)) or self._load().get(str(path))
        if isinstance(known, list) and known[:-1] == stamp:
            return str(known[-1])
        digest = sha256_of(path)
        # Else it changed while it was read: what was read is not to be remembered.
        if file_identity(path) == stamp:
            self._remember(path, [*stamp, digest])
        return digest

    def _load(self) -> dict[str, object]:
        try:
            known = json.loads(self._file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}  # absent or damaged: it only saves time, and is written anew
        return known if isinstance(known, dict) else {}

    def _remember(self, path: Path, entry: list[int | str]) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock")):
                known = {
                    name: old for name, old in self._load().items() if os.path.exists(name)
                }  # raises nothing
                write_json(self._file, {**known, str(path): entry})
        except OSError as error:
            self._unwritten[str(path)] = entry
            _warn_once(self._file, str(error))


@cache
def _warn_once(file: Path, error: str) -> None:
    """Of a cache that cannot be written: a checkpoint has several files, and a pipeline two checkpoints."""
    _log.warning("cannot remember digests in %s (%s): weights are hashed at each start", file, error)


def combined(digests: Iterable[str]) -> str:
    """One digest over several, in their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
