"""Entries of the store of built models, of a few bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentrt.runtime.cache import Store

__all__ = ["DESCRIPTION", "KEY", "OTHER", "leftovers", "never", "writes"]

KEY = "ab" * 32
OTHER = "cd" * 32
DESCRIPTION = {"name": "unet"}


def writes(text: str = "weights") -> Callable[[Path], Mapping[str, Any]]:
    """A build that writes two files, one of them in a folder."""

    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "model.onnx").write_text(text)
        (folder / "more").mkdir()
        (folder / "more" / "model.onnx.data").write_text(text * 2)
        return {"error": 1e-6}

    return build


def never(folder: Path) -> Mapping[str, Any]:
    """A build that must not be called."""
    raise AssertionError(f"built in {folder}, though a whole entry is there")


def leftovers(store: Store) -> list[str]:
    """Files of builds that have not ended."""
    return [path.name for path in (store.root / "partial").iterdir()]
