"""Files written whole or not at all: the process may be ended at any time."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_atomic", "write_json"]


def write_atomic(path: Path, text: str) -> None:
    """Write a file, and its folder where that is missing; an earlier one stays until all of it is written.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        aside.write_text(text, "utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any], *, indent: int = 1) -> None:
    """`write_atomic` of an object."""
    write_atomic(path, json.dumps(content, indent=indent) + "\n")
