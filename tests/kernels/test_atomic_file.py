"""What is written is there whole, or what was there before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from latentrt.kernels import tuning
from latentrt.kernels.atomic_file import write_atomic, write_json


def test_a_file_and_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "a.json"
    write_json(file, {"a": [1, None]})
    assert json.loads(file.read_text("utf-8")) == {"a": [1, None]}
    write_atomic(file, "é\n")
    assert file.read_bytes() == b"\xc3\xa9\n"
    assert list(file.parent.iterdir()) == [file]


def test_a_write_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned sizes are merged into a file that every launch reads."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    file = tuning.save(90, "attention", {"16/a": {"BLOCK_M": 64}})
    before = file.read_bytes()
    write = Path.write_text

    def torn(path: Path, text: str, *more: str, **options: str) -> int:
        write(path, text[: len(text) // 2], *more, **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="no space"):
        tuning.save(90, "attention", {"16/b": {"BLOCK_M": 32}})
    assert file.read_bytes() == before
