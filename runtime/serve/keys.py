"""API keys: bearer tokens, compared in constant time, byte by byte as they came."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import RequestError

if TYPE_CHECKING:  # what the server is made of may not be installed, which is said after the file was read
    from starlette.datastructures import Headers

__all__ = ["Keys", "keys_of"]


def keys_of(path: Path) -> list[str]:
    """The API keys in a file, one a line.

    Raises:
        RequestError: it holds none.
    """
    keys = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not keys:
        raise RequestError(f"--api-key-file {str(path)!r} holds no key; write one on each line")
    return keys


class Keys:
    """One of these must come; none for no such check."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Clients send what ASCII lacks as UTF-8 or, where it goes, as Latin-1."""
        self._keys = [key.encode() for key in keys]
        self._keys += [key.encode("latin-1") for key in keys if not key.isascii() and _is_latin(key)]

    def fit(self, headers: Headers) -> bool:
        """Whether a request with these headers may come in."""
        if not self._keys:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip(" \t").encode("latin-1")
        # All are compared, whichever fits.
        fits = sum(hmac.compare_digest(given, key) for key in self._keys)
        return scheme.lower() == "bearer" and fits > 0


def _is_latin(text: str) -> bool:
    return all(ord(character) < 256 for character in text)
