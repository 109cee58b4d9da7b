"""`runtime/digests.py`: digests of weights: right, remembered, and only as long as the file stays as it was."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from helpers.faults import disk_full
from latentrt import Pipeline
from latentrt.runtime.digests import DigestMemory, combined


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_is_sha256_of_the_contents(file: Path, tmp_path: Path) -> None:
    assert DigestMemory(tmp_path / "cache").digest(file) == sha256(file)


def test_a_digest_is_remembered(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = DigestMemory(tmp_path / "cache").digest(file)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read the file again"))
    assert DigestMemory(tmp_path / "cache").digest(file) == digest


def test_a_link_and_its_file_are_remembered_as_one(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = DigestMemory(tmp_path / "cache").digest(file)
    (tmp_path / "link").symlink_to(file)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read the file again"))
    assert DigestMemory(tmp_path / "cache").digest(tmp_path / "link") == digest


def test_a_changed_file_has_another_digest(file: Path, tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "cache")
    before, stat = memory.digest(file), file.stat()
    file.write_bytes(b"weightz" * 1000)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same mtime
    assert memory.digest(file) == sha256(file) != before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}'])
def test_a_damaged_memory_is_written_anew(file: Path, tmp_path: Path, text: str) -> None:
    memory = DigestMemory(tmp_path / "cache")
    memory.digest(file)
    (tmp_path / "cache" / "digests.json").write_text(text)
    assert memory.digest(file) == sha256(file)
    assert str(file) in json.loads((tmp_path / "cache" / "digests.json").read_text())


def test_a_damaged_entry_is_not_believed(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for entry in (None, 7, [], "text", [1, 2, 3, 4, "0" * 64]):
        (tmp_path / "cache" / "digests.json").write_text(json.dumps({str(file): entry}))
        assert DigestMemory(tmp_path / "cache").digest(file) == sha256(file)


def test_files_that_are_gone_are_forgotten(file: Path, tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "cache")
    memory.digest(file)
    file.unlink()
    (tmp_path / "other").write_bytes(b"other")
    memory.digest(tmp_path / "other")
    assert list(json.loads((tmp_path / "cache" / "digests.json").read_text())) == [str(tmp_path / "other")]


def test_a_file_on_a_mount_that_is_gone_keeps_no_other_from_being_remembered(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / "far.safetensors"
    far.write_bytes(b"far")
    DigestMemory(tmp_path / "cache").digest(far)
    stat = os.stat

    def unmounted(path: Any, **options: Any) -> os.stat_result:
        if str(path) == str(far):
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", unmounted)
        digest = DigestMemory(tmp_path / "cache").digest(file)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read the file again"))
    assert DigestMemory(tmp_path / "cache").digest(file) == digest


def test_a_cache_that_cannot_be_written_costs_time_only(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert DigestMemory(tmp_path / "cache").digest(file) == sha256(file)
    assert "cannot remember digests in" in caplog.text


def test_without_a_cache_weights_are_hashed_at_the_load_alone_and_one_warning_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their digests are asked for again when a network is built."""
    hashed: list[str] = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, name: hashed.append(f.name) or file_digest(f, name))
    (tmp_path / "cache").write_text("a file where the folder should be")
    pipe = Pipeline.from_pretrained("demo", "demo", backend="eager", cache_dir=tmp_path / "cache")
    assert any("unet" in name for name in hashed)
    hashed.clear()
    pipe("a red circle", num_inference_steps=5, height=64, width=64, output_type="latent")
    assert hashed == []
    assert caplog.text.count("cannot remember digests") == 1


def test_a_full_disk_leaves_nothing_half_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, *_: object) -> int:
        self.write_bytes(b"half")
        raise disk_full()

    monkeypatch.setattr(Path, "write_text", full)
    with caplog.at_level(logging.WARNING):
        assert DigestMemory(tmp_path / "cache").digest(file) == sha256(file)
    assert "No space left on device" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def _digest(file: Path, cache: Path) -> str:
    return DigestMemory(cache).digest(file)


def test_processes_do_not_lose_each_others_entries(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in range(12)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 1000)
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        digests = list(pool.map(_digest, files, [tmp_path / "cache"] * len(files)))
    assert digests == [sha256(file) for file in files]
    known = json.loads((tmp_path / "cache" / "digests.json").read_text())
    assert {name: entry[-1] for name, entry in known.items()} == dict(
        zip(map(str, files), digests, strict=True)
    )


def test_a_combined_digest_knows_every_part_and_their_order() -> None:
    assert len({combined(["a", "b"]), combined(["b", "a"]), combined(["ab"]), combined(["a"])}) == 4
