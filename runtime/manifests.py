"""What the store's entries say of themselves: their manifests, and what is kept beside these.

Each is JSON with its own digest at its end. The form of an entry, and what of it is verified when, is in `cache`.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import CacheError
from .sha256 import digest_of, file_identity, sha256_of

__all__ = [
    "MANIFEST",
    "VERDICT",
    "Manifest",
    "damage_of",
    "read_beside",
    "read_manifest",
    "write_beside",
    "write_manifest",
]

_log = logging.getLogger(__name__)

_FORMAT = 2
MANIFEST = "manifest.json"
VERDICT = "verdict.json"
_VERIFIED = "verified.json"
_REMEMBER_FROM = 256 << 20  # bytes

# What reading a file as JSON of a known form may raise, whatever is in it.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Manifest:
    """What an entry's manifest says.

    Attributes:
        description: what the entry was made of.
        figures: what its build measured.
        created: when it was written, in UTC.
        files: size and SHA-256 of each.
    """

    description: dict[str, Any]
    figures: dict[str, Any]
    created: str
    files: dict[str, tuple[int, str]]


def write_manifest(
    folder: Path, key: str, description: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Say what all files in a folder are, which is then an entry; the arguments are those of `Store.get_or_build`.

    Raises:
        OSError: it cannot be written.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in paths
    }
    manifest = {
        "format": _FORMAT,
        "key": key,
        "description": dict(description),
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "figures": dict(figures),
        "files": files,
    }
    (folder / MANIFEST).write_text(_signed(manifest), encoding="utf-8")
    if large := [path for path in paths if path.stat().st_size >= _REMEMBER_FROM]:
        identities = {path.relative_to(folder).as_posix(): file_identity(path) for path in large}
        write_beside(folder, _VERIFIED, identities)


def read_manifest(entry: Path) -> Manifest:
    """An entry's manifest, as it was written.

    Raises:
        CacheError: what is wrong with it, without the entry's name.
    """
    content = read_beside(entry, MANIFEST)
    if content is None:
        raise CacheError(f"{MANIFEST} is missing")
    try:
        if content["key"] != entry.name:
            raise CacheError(f"{MANIFEST} is of another entry")
        return Manifest(
            dict(content["description"]),
            dict(content["figures"]),
            str(content["created"]),
            {str(name): (int(f["size"]), str(f["sha256"])) for name, f in content["files"].items()},
        )
    except _UNREADABLE as error:
        raise CacheError(f"{MANIFEST} cannot be read: {error!r}") from error


def damage_of(entry: Path, *, trust: bool = True) -> str | None:
    """What is wrong with an entry, naming the file; None when it is as it was written.

    Args:
        trust: take large files whose digest was right, and which were not written to since, for unchanged.
    """
    try:
        files = read_manifest(entry).files
        read_beside(entry, VERDICT)  # damaged, it may have been the word that the rest is not to be used
    except CacheError as error:
        return str(error)
    remembered = _read_verified(entry)
    verified: dict[str, list[int]] = {}
    for name, (size, sha256) in files.items():
        path = entry / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            identity = file_identity(path)
            if identity[0] != size:
                return f"{name} has {identity[0]} bytes, should have {size}"
            known = trust and remembered.get(name) == identity
            if not known and sha256_of(path) != sha256:
                return f"{name} has another SHA-256 than when it was written"
        except OSError as error:
            return f"{name} cannot be read: {error!r}"
        if size >= _REMEMBER_FROM:
            verified[name] = identity
    if verified != remembered:
        write_beside(entry, _VERIFIED, verified)
    return None


def _signed(content: Mapping[str, Any]) -> str:
    """The text of a file of the store's own, with the digest of the rest of it at its end."""
    return json.dumps({**content, "sha256": digest_of(content)}, indent=2) + "\n"


def _read_verified(entry: Path) -> dict[str, Any]:
    try:
        return read_beside(entry, _VERIFIED) or {}
    except CacheError:
        return {}


def read_beside(entry: Path, name: str) -> dict[str, Any] | None:
    """What `write_beside` kept of an entry, or its manifest; None where there is no such file.

    Raises:
        CacheError: it is damaged; how, without the entry's name.
    """
    try:
        text = (entry / name).read_text(encoding="utf-8")
        content: dict[str, Any] = json.loads(text)
        found = content.get("format", _FORMAT)
        if found != _FORMAT:
            raise CacheError(f"{name} has format {found}, and this version of latentrt writes {_FORMAT}")
        content.pop("sha256")
        if text != _signed(content):
            raise CacheError(f"{name} has another SHA-256 than when it was written")
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        raise CacheError(f"{name} cannot be read: {error!r}") from error
    return content


def write_beside(entry: Path, name: str, content: Mapping[str, Any]) -> None:
    """Keep what was found out about an entry since it was written, whole or not at all; if it cannot be, do without."""
    aside = entry / f"{name}.{secrets.token_hex(8)}"
    try:
        aside.write_text(_signed(content), encoding="utf-8")
        aside.replace(entry / name)
    except OSError as error:  # it is found out again when it is needed
        with suppress(OSError):  # a read-only file system refuses this even where there is nothing
            aside.unlink()
        _log.debug("cannot keep %s of %s: %s", name, entry, error)
