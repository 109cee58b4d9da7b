"""The store of what was built from a checkpoint: exported models and engines.

    <root>/entries/<key>/manifest.json    what it is, size and SHA-256 of each file, and the manifest's own digest
    <root>/entries/<key>/...              the files
    <root>/entries/<key>/verdict.json     what `latentrt verify` found, where it ran, and the digest of that
    <root>/partial/<key>.<random>/        being written
    <root>/locks/<key>.lock               held while an entry is written or replaced

An entry's key is a digest over everything that decides its contents, so an entry is never updated: it
is whole or absent. It is written aside, in the same filesystem, and renamed. Whole entries are read
without a lock or a write, so a read-only cache that has the entry works.

**What is verified.** Every file's size and SHA-256, each time the entry is asked for. Only for a file of
256 MB or more a digest that was right is remembered, with the file's size, inode, mtime and ctime, in
`verified.json` beside the manifest, and not computed again while those stay: up to 4 s a GB are too much
at each start. A disk that loses bits of such a file without a write is then noticed by `latentrt cache verify`
only.

A manifest's mtime says when its entry was last asked for, which decides what is pruned first.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import CacheError
from .manifests import MANIFEST, damage_of, write_manifest

__all__ = ["Store", "cache_root", "explained", "locked", "no_room"]

_log = logging.getLogger(__name__)

_LOOKS = 5
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_NOT_A_FOLDER = {errno.ENOTDIR, errno.EEXIST}


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir` if given, else the environment's LATENTRT_CACHE, else ~/.cache/latentrt; as an absolute path.

    Raises:
        CacheError: there is no home folder to put it in, as for the unnamed users of some containers.
    """
    chosen = cache_dir or os.environ.get("LATENTRT_CACHE") or "~/.cache/latentrt"
    try:
        return Path(chosen).expanduser().absolute()
    except RuntimeError as error:
        raise CacheError(
            f"the cache {os.fspath(chosen)} has no place, since this user has no home folder; "
            "set LATENTRT_CACHE or cache_dir to another folder"
        ) from error


class Store:
    """Folders of files, built once each, by key. Safe for several threads and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def entries(self) -> Path:
        """The folder of entries, by key."""
        return self.root / "entries"

    def get(self, key: str) -> Path | None:
        """The folder of the entry `key`, verified; None where there is none.

        Raises:
            CacheError: it is damaged, or the cache cannot be read.
        """
        entry = self.entries / key
        with explained(self.root):
            # Again, if another process has put a new one there meanwhile, or removed it.
            for _ in range(_LOOKS):
                seen = _inode(entry)
                if seen is None:
                    return None
                damage = damage_of(entry)
                if damage is None:
                    _mark_used(entry)
                    return entry
                if seen == _inode(entry):
                    break
        raise CacheError(
            f"{entry} is damaged ({damage}); build it again, or see `latentrt cache verify` for others"
        )

    def get_or_build(
        self,
        key: str,
        description: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any]],
        *,
        again: bool = False,
    ) -> Path:
        """The folder of the entry `key`, verified; built first where it is absent or damaged.

        Args:
            key: hex digest over everything that decides the contents, e.g. `digest_of(description)`.
            description: kept in the manifest, for people; "name" in it is used in messages.
            build: writes the files into the empty folder it is given; what it returns, e.g. the figures of a
                check, is kept in the manifest. When it raises, nothing is stored.
            again: build it though it is there; until it has been built the one that is there stays.

        Raises:
            CacheError: the disk is full, or the cache cannot be written.
        """
        entry = self.entries / key
        with explained(self.root):
            if not again and damage_of(entry) is None:
                _mark_used(entry)
                return entry
            try:
                for folder in ("entries", "partial", "locks"):
                    (self.root / folder).mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:  # as in /proc, where no folder can be made
                raise PermissionError(
                    errno.EACCES, f"no folder can be made ({error})", str(self.root)
                ) from None
            name = str(description.get("name", key[:12]))
            with locked(self._lock(key), f"building {name}"):
                damage = damage_of(entry)
                if damage is None and not again:
                    return entry
                if damage is not None and entry.exists():
                    _log.warning("cached %s is damaged (%s): building it again", name, damage)
                    self._discard(entry)
                self.sweep(key)
                self._build(entry, key, description, build)
        return entry

    def remove(self, key: str) -> bool:
        """Remove an entry, or find that another process has; False where one is writing it."""
        with explained(self.root), suppress(Timeout), self._lock(key).acquire(timeout=0):
            with suppress(FileNotFoundError):
                self._discard(self.entries / key)
            return True
        return False

    def _build(
        self,
        entry: Path,
        key: str,
        description: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any]],
    ) -> None:
        partial = self._partial(key)
        partial.mkdir()
        try:
            figures = dict(build(partial))
            write_manifest(partial, key, description, figures)
            if entry.exists():
                self._discard(entry, successor=partial)
            else:
                partial.rename(entry)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _lock(self, key: str) -> FileLock:
        return FileLock(self.root / "locks" / f"{key}.lock")

    def _partial(self, key: str) -> Path:
        return self.root / "partial" / f"{key}.{secrets.token_hex(8)}"

    def _discard(self, entry: Path, successor: Path | None = None) -> None:
        """Remove an entry, seen whole or not at all, and put another folder there first. Its lock must be held."""
        aside = self._partial(entry.name)
        aside.parent.mkdir(exist_ok=True)  # a cache may have been copied without it
        entry.rename(aside)
        if successor is not None:
            successor.rename(entry)
        shutil.rmtree(aside)

    def sweep(self, own_key: str | None = None) -> None:
        """Remove what writers that were killed left behind: whoever holds a key's lock is its only writer."""
        folder = self.root / "partial"
        for leftover in folder.iterdir() if folder.exists() else ():
            key = leftover.name.partition(".")[0]
            if key == own_key:
                shutil.rmtree(leftover, ignore_errors=True)
                continue
            with suppress(Timeout), self._lock(key).acquire(timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def locked(lock: FileLock, what: str) -> Iterator[None]:
    """Hold a lock. Where others hold it, it is said that they are `what`, such as "building unet"."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _log.warning("waiting for another process, which is %s", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _inode(entry: Path) -> int | None:
    """Which folder it is; None where there is none."""
    try:
        return entry.stat().st_ino
    except FileNotFoundError:
        return None


def _mark_used(entry: Path) -> None:
    with suppress(OSError):  # a read-only cache is nobody's to prune
        # By its own clock the kernel would write steps of milliseconds.
        os.utime(entry / MANIFEST, ns=(time.time_ns(),) * 2)


def no_room(error: OSError) -> str | None:
    """A full disk in words, or a file that its system has no room for; None for other errors."""
    if error.errno in _FULL:
        return "no space left on the device"
    if error.errno == errno.EFBIG:  # FAT32 ends at 4 GB, and `ulimit -f` where it was told to
        return "no room for so large a file"
    return None


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Errors of the filesystem under `root` as CacheErrors that say what to do; others pass as they are."""
    try:
        yield
    except OSError as error:
        code = error.errno
        elsewhere = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(root)
        other = "set LATENTRT_CACHE or cache_dir to another folder"
        if full := no_room(error):
            raise CacheError(
                f"{full} while writing the cache {root} ({error}); free some, or {other}"
            ) from error
        if code in _NOT_WRITABLE and not elsewhere:
            raise CacheError(
                f"the cache {root} cannot be written ({error}); make it writable, or {other}"
            ) from error
        if code in _NOT_A_FOLDER and not elsewhere:
            raise CacheError(f"the cache {root} is not a folder ({error}); {other}") from error
        raise
