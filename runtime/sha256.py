"""SHA-256 of files and of descriptions, and what says that a file is the one that was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["digest_of", "digest_of_files", "file_identity", "sha256_of"]


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's contents, in hex; large ones are read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_identity(file: Path) -> list[int]:
    """What changes when a file is written to: its size, its inode, and two times in nanoseconds."""
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def digest_of_files(files: Iterable[Path], root: Path) -> str:
    """One digest, in hex, over the names below `root` and the contents of files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def digest_of(description: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over a description that JSON can hold; the order of its keys does not matter."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
