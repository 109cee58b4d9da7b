"""What the store holds, seen as a whole: listed, verified, pruned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import CacheError
from .cache import Store, explained
from .engines.sizes import Profile
from .manifests import MANIFEST, VERDICT, damage_of, read_beside, read_manifest

__all__ = ["Entry", "contents", "prune", "verify"]


@dataclass(frozen=True)
class Entry:
    """One entry, as its manifest has it; of the files nothing is verified.

    Attributes:
        key: its digest.
        description: what it was made of; empty where the manifest is damaged.
        figures: what its build measured.
        created, used: when it was written and last asked for, in UTC; empty where unknown.
        bytes: on the disk, all of it.
        verdict: what `latentrt verify` found last; None where it did not run.
        damage: what is wrong with the manifest.
    """

    key: str
    description: Mapping[str, Any]
    figures: Mapping[str, Any]
    created: str
    used: str
    bytes: int
    verdict: Mapping[str, Any] | None = None
    damage: str | None = None

    @property
    def failed(self) -> bool:
        """Whether `latentrt verify` found that it computes something else than PyTorch."""
        return self.verdict is not None and not self.verdict.get("passed")

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        d = self.description
        parts = [d.get("kind", "unknown"), d.get("name", ""), d.get("dtype", "")]
        if d.get("kind") == "engine":
            archs = ",".join(f"sm_{arch}" for arch in d.get("archs", ()))
            sizes = "; ".join(str(Profile.from_json(axes)) for axes in d.get("profiles", ()))
            tf32 = "with TF32" if d.get("tf32") else ""
            parts += [tf32, d.get("product", ""), d.get("version", ""), archs, f"({sizes})"]
        if self.verdict is not None:
            found = "FAILED" if self.failed else "passed"
            parts.append(f"[{found} on {self.verdict.get('backend')}, {self.verdict.get('device')}]")
        return " ".join(filter(None, parts))


def contents(store: Store) -> list[Entry]:
    """Every entry, the last used first.

    Raises:
        CacheError: the cache cannot be read.
    """
    with explained(store.root):
        found = list(store.entries.iterdir()) if store.entries.exists() else []
        entries = [entry for path in found if path.is_dir() and (entry := _entry(path)) is not None]
    return sorted(entries, key=lambda entry: (entry.used, entry.key), reverse=True)


def verify(store: Store) -> dict[str, str]:
    """Read every file of every entry -> what is wrong, by key; empty where all is as it was written.

    Raises:
        CacheError: the cache cannot be read.
    """
    with explained(store.root):
        found = {entry.key: damage_of(store.entries / entry.key, trust=False) for entry in contents(store)}
    return {key: damage for key, damage in found.items() if damage is not None}


def prune(store: Store, max_bytes: int | None) -> list[Entry]:
    """Remove leftovers, damaged entries, then those used longest ago until no more than `max_bytes` are left.

    Entries that another process is writing stay.

    Returns:
        What was removed, but for leftovers.

    Raises:
        CacheError: the cache cannot be written.
    """
    with explained(store.root):
        store.sweep()
        entries = contents(store)
        kept = sum(entry.bytes for entry in entries)
        removed = []
        damaged = {entry.key for entry in entries if damage_of(store.entries / entry.key) is not None}
        for entry in sorted(entries, key=lambda entry: (entry.key not in damaged, entry.used)):
            excess = max_bytes is not None and kept > max_bytes
            if (excess or entry.key in damaged) and store.remove(entry.key):
                removed.append(entry)
                kept -= entry.bytes
    return removed


def _entry(folder: Path) -> Entry | None:
    """None for one that was removed while it was read."""
    try:
        manifest = read_manifest(folder)
        stat = (folder / MANIFEST).stat()
    except (CacheError, FileNotFoundError) as error:
        if not folder.exists():
            return None
        return Entry(folder.name, {}, {}, "", "", _bytes(folder), damage=str(error))
    used = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="milliseconds")
    return Entry(
        folder.name,
        manifest.description,
        manifest.figures,
        manifest.created,
        used,
        _bytes(folder),
        _verdict(folder),
    )


def _verdict(folder: Path) -> dict[str, Any] | None:
    """None too where it is damaged: such an entry is not loaded."""
    with suppress(CacheError):
        return read_beside(folder, VERDICT)
    return None


def _bytes(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):  # which, unlike rglob, passes over folders that are being removed
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_size
    return total
