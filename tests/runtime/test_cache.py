"""The store of built models: whole or absent, built once, verified, and clear about what stops it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.faults import disk_full
from helpers.tiny_entries import DESCRIPTION, KEY, OTHER, leftovers, never, writes
from latentrt.errors import CacheError
from latentrt.runtime import cache, manifests
from latentrt.runtime.cache import Store, cache_root
from latentrt.runtime.manifests import damage_of, write_beside
from latentrt.runtime.sha256 import digest_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def test_built_once_then_read(store: Store) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    assert (entry / "more" / "model.onnx.data").read_text() == "weightsweights"
    assert store.get_or_build(KEY, DESCRIPTION, never) == entry
    assert leftovers(store) == []


def test_keys_do_not_share_entries(store: Store) -> None:
    first = store.get_or_build(KEY, DESCRIPTION, writes("a"))
    second = store.get_or_build(OTHER, DESCRIPTION, writes("b"))
    assert (first / "model.onnx").read_text() == "a"
    assert (second / "model.onnx").read_text() == "b"


def test_manifest_says_what_the_entry_is(store: Store) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["key"] == KEY
    assert manifest["description"] == DESCRIPTION
    assert manifest["figures"] == {"error": 1e-6}
    assert manifest["files"]["model.onnx"] == {
        "size": 7,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    assert set(manifest["files"]) == {"model.onnx", "more/model.onnx.data"}


def change_a_byte(entry: Path) -> None:
    path = entry / "more" / "model.onnx.data"
    path.write_bytes(b"W" + path.read_bytes()[1:])


def truncate(entry: Path) -> None:
    (entry / "model.onnx").write_text("weigh")


def remove(entry: Path) -> None:
    (entry / "model.onnx").unlink()


def blank_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("")


def list_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("[]")


def changed_manifest(entry: Path) -> None:
    path = entry / "manifest.json"
    path.write_text(path.read_text().replace('"name": "unet"', '"name": "unit"'))


def foreign_manifest(entry: Path) -> None:
    other = Store(entry.parent.parent).get_or_build(OTHER, DESCRIPTION, writes("earlier"))
    (entry / "manifest.json").write_bytes((other / "manifest.json").read_bytes())


def older_manifest(entry: Path) -> None:
    path = entry / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (change_a_byte, "more/model.onnx.data has another SHA-256"),
        (truncate, "model.onnx has 5 bytes, should have 7"),
        (remove, "model.onnx is missing"),
        (blank_manifest, "manifest.json cannot be read"),
        (list_manifest, "manifest.json cannot be read"),
        (changed_manifest, "manifest.json has another SHA-256"),
        (foreign_manifest, "manifest.json is of another entry"),
        (older_manifest, "manifest.json has format 1, and this version of latentrt writes 2"),
        (lambda entry: (entry / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_entry_is_built_again_with_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], named: str
) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes("earlier"))
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert store.get_or_build(KEY, DESCRIPTION, writes("rebuilt")) == entry
    assert (entry / "model.onnx").read_text() == "rebuilt"
    (record,) = caplog.records
    assert "cached unet is damaged" in record.getMessage()
    assert named in record.getMessage()
    assert leftovers(store) == []
    assert store.get_or_build(KEY, DESCRIPTION, never) == entry


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ({"model\0": {"size": 0, "sha256": ""}}, "is missing"),
        ({".": {"size": 0, "sha256": ""}}, ". is missing"),
        ({"/dev/zero": {"size": 0, "sha256": ""}}, "/dev/zero is missing"),
        ({"m" * 5000: {"size": 0, "sha256": ""}}, "File name too long"),
        ({"model.onnx": {"size": math.inf, "sha256": ""}}, "manifest.json cannot be read: OverflowError"),
        ({"model.onnx": 7}, "manifest.json cannot be read: TypeError"),
    ],
)
def test_a_whole_manifest_of_nonsense_is_damage(store: Store, file: dict[str, Any], named: str) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    manifest = json.loads((entry / "manifest.json").read_text())
    del manifest["sha256"]
    write_beside(entry, "manifest.json", {**manifest, "files": file})
    assert named in str(damage_of(entry))


@pytest.mark.parametrize("name", ["manifest.json", "verdict.json"])
def test_a_flipped_bit_anywhere_is_seen(store: Store, name: str) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    write_beside(entry, "verdict.json", {"passed": False, "psnr": 3.5})
    path = entry / name
    whole = path.read_bytes()
    for k in range(len(whole)):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :])
        assert damage_of(entry) is not None, whole[max(0, k - 20) : k + 20]
    path.write_bytes(whole)
    assert damage_of(entry) is None


@pytest.mark.parametrize("name", ["manifest.json", "verdict.json"])
def test_json_that_is_too_deep_is_damage(store: Store, name: str) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    (entry / "verified.json").write_text("[" * 100_000)
    assert damage_of(entry) is None  # what was remembered is no part of the entry
    (entry / name).write_text("[" * 100_000)
    assert str(damage_of(entry)).startswith(f"{name} cannot be read: RecursionError")


def test_get_reads_and_never_builds(store: Store) -> None:
    assert store.get(KEY) is None
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    assert store.get(KEY) == entry
    change_a_byte(entry)
    with pytest.raises(
        CacheError, match=r"is damaged \(more/model.onnx.data has another SHA-256.*build it again"
    ):
        store.get(KEY)


def test_again_replaces_a_whole_entry(store: Store) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes("earlier"))

    def fails(folder: Path) -> Mapping[str, Any]:
        raise ValueError("shapes")

    with pytest.raises(ValueError, match="shapes"):
        store.get_or_build(KEY, DESCRIPTION, fails, again=True)
    assert (entry / "model.onnx").read_text() == "earlier"  # a build that fails takes nothing away
    assert store.get_or_build(KEY, DESCRIPTION, writes("later"), again=True) == entry
    assert (entry / "model.onnx").read_text() == "later"
    assert leftovers(store) == []


def test_the_old_one_is_there_until_the_new_one_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes("earlier"))
    rmtree = shutil.rmtree

    def slowly(path: Path, **options: Any) -> None:  # gigabytes take a second
        assert (entry / "model.onnx").read_text() == "later"
        rmtree(path, **options)

    monkeypatch.setattr(cache.shutil, "rmtree", slowly)
    store.get_or_build(KEY, DESCRIPTION, writes("later"), again=True)
    assert leftovers(store) == []


def test_large_files_are_hashed_once_until_they_are_touched(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manifests, "_REMEMBER_FROM", 10)
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    hashed: list[str] = []
    sha256 = manifests.sha256_of

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(manifests, "sha256_of", counting)
    for _ in range(3):
        store.get_or_build(KEY, DESCRIPTION, never)
    assert hashed.count("model.onnx.data") == 0  # 14 bytes: remembered since it was written
    assert hashed.count("model.onnx") == 3  # 7 bytes: verified each time

    path = entry / "more" / "model.onnx.data"
    before = path.stat()
    with path.open("r+b") as file:  # the same size, inode and mtime; the ctime gives it away
        file.write(b"W")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    store.get_or_build(KEY, DESCRIPTION, writes())
    assert "model.onnx.data has another SHA-256" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full")
def test_full_disk(store: Store) -> None:
    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "model.onnx").write_text("half of it")
        with Path("/dev/full").open("w") as file:
            file.write("the other half")
        return {}

    with pytest.raises(CacheError, match=r"no space left .* free some, or set LATENTRT_CACHE") as caught:
        store.get_or_build(KEY, DESCRIPTION, build)
    assert str(store.root) in str(caught.value)
    assert leftovers(store) == []
    assert list((store.root / "entries").iterdir()) == []
    assert (store.get_or_build(KEY, DESCRIPTION, writes()) / "model.onnx").exists()  # once there is room


def test_full_disk_while_the_manifest_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == "manifest.json":
            raise disk_full(self)
        return write_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CacheError, match="no space left"):
        store.get_or_build(KEY, DESCRIPTION, writes())
    assert leftovers(store) == []
    assert list((store.root / "entries").iterdir()) == []


def refuse_writes(monkeypatch: pytest.MonkeyPatch, code: int = errno.EROFS) -> None:
    """As on a read-only file system; a test may run as root, whom permissions do not stop."""

    def refused(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    for name in ("mkdir", "write_text", "rename", "replace", "unlink"):
        monkeypatch.setattr(Path, name, refused)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOENT], ids=errno.errorcode.get)
def test_a_cache_that_cannot_be_made(code: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In some file systems, such as /proc, a new folder's name is not found."""
    refuse_writes(monkeypatch, code)
    with pytest.raises(CacheError, match=r"cannot be written .* make it writable, or set LATENTRT_CACHE"):
        store.get_or_build(KEY, DESCRIPTION, never)


@pytest.mark.parametrize("path", [None, "model.onnx"], ids=["of no file", "of its own"])
def test_what_a_build_does_not_find_is_not_the_caches_fault(path: str | None, store: Store) -> None:
    """Such as a temporary folder, or what another process has removed meanwhile."""

    def build(folder: Path) -> dict[str, Any]:
        where = () if path is None else (str(folder / path),)
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory", *where)

    with pytest.raises(FileNotFoundError, match="No usable temporary directory"):
        store.get_or_build(KEY, DESCRIPTION, build)


def test_read_only_cache_that_has_the_entry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = store.get_or_build(KEY, DESCRIPTION, writes())
    monkeypatch.setattr(manifests, "_REMEMBER_FROM", 10)  # it also fails to remember a digest, harmlessly
    refuse_writes(monkeypatch)
    assert store.get_or_build(KEY, DESCRIPTION, never) == entry
    assert store.get(KEY) == entry


def test_a_file_where_the_cache_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(CacheError, match=r"is not a folder .* set LATENTRT_CACHE or cache_dir"):
        Store(tmp_path / "cache").get_or_build(KEY, DESCRIPTION, never)


@pytest.mark.parametrize(
    "error",
    [ValueError("shapes"), PermissionError(errno.EACCES, "denied", "/somewhere/else"), KeyboardInterrupt()],
    ids=repr,
)
def test_what_a_build_raises_passes_and_nothing_is_kept(store: Store, error: BaseException) -> None:
    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "model.onnx").write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        store.get_or_build(KEY, DESCRIPTION, build)
    assert caught.value is error
    assert leftovers(store) == []
    assert list((store.root / "entries").iterdir()) == []


def test_digests_do_not_depend_on_order() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "from_environment"))
    assert cache_root() == tmp_path / "from_environment"
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("LATENTRT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "latentrt"
