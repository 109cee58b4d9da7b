"""The store seen as a whole: listed, verified, pruned, and the commands over it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from latentrt.cli import main
from latentrt.errors import CacheError
from latentrt.runtime import cache_contents, manifests
from latentrt.runtime.cache import Store
from latentrt.runtime.cache_contents import Entry, contents, prune, verify
from latentrt.runtime.manifests import damage_of
from latentrt.runtime.sha256 import file_identity

ENGINE = {
    "name": "unet",
    "kind": "engine",
    "dtype": "float16",
    "product": "tensorrt-rtx",
    "version": "1.7.1",
    "archs": [89, 120],
    "profiles": [{"batch": [1, 2, 8, 1], "height": [64, 128, 160, 8]}],
}


def writes(size: int) -> Callable[[Path], Mapping[str, Any]]:
    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "model.onnx").write_bytes(bytes(size))
        return {"seconds": 1.5}

    return build


def add(store: Store, digit: str, size: int, used: int, **description: Any) -> Path:
    """An entry of that size, last asked for `used` seconds after the epoch."""
    about = description or {"name": "unet", "kind": "onnx", "dtype": "float16"}
    entry = store.get_or_build(digit * 64, about, writes(size))
    os.utime(entry / "manifest.json", (used, used))
    return entry


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three entries of a thousand bytes and a manifest, `a` used last and `c` longest ago."""
    store = Store(tmp_path / "cache")
    for digit, used in (("b", 2000), ("a", 3000), ("c", 1000)):
        add(store, digit, 1000, used)
    return store


def keys(entries: list[Any]) -> str:
    return "".join(entry.key[0] for entry in entries)


def test_listed_by_last_use(store: Store) -> None:
    entries = contents(store)
    assert keys(entries) == "abc"
    assert entries[0].used == "1970-01-01T00:50:00.000+00:00"
    assert entries[0].figures == {"seconds": 1.5}
    assert entries[0].summary == "onnx unet float16"
    assert 1000 < entries[0].bytes < 2000


def test_asking_for_an_entry_is_using_it(store: Store) -> None:
    store.get_or_build("c" * 64, {}, writes(0))
    assert keys(contents(store)) == "cab"
    store.get("b" * 64)
    assert keys(contents(store))[0] in "bc"  # the clock may not have moved


def test_engines_say_what_they_are_for(store: Store) -> None:
    add(store, "d", 10, 4000, **ENGINE)
    assert contents(store)[0].summary == (
        "engine unet float16 tensorrt-rtx 1.7.1 sm_89,sm_120 (batch 1..8, height 64..160 step 8)"
    )
    add(store, "e", 10, 5000, **{**ENGINE, "dtype": "float32", "tf32": True})
    assert contents(store)[0].summary.startswith("engine unet float32 with TF32 tensorrt-rtx 1.7.1 ")


def test_an_entry_that_is_removed_while_it_is_listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def removed(path: Any) -> Any:
        if os.fspath(path).endswith("a" * 64):
            raise FileNotFoundError(errno.ENOENT, "removed", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed)
    assert keys(contents(store)) == "abc"


def test_two_prunes_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(store: Store) -> list[Entry]:
        found = contents(store)
        monkeypatch.setattr(cache_contents, "contents", contents)
        assert len(prune(store, 0)) == 3  # the other one, between this one's list and its removals
        return found

    monkeypatch.setattr(cache_contents, "contents", listed)
    assert len(prune(store, 0)) == 3
    assert contents(store) == []


def test_an_empty_cache(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert contents(store) == []
    assert verify(store) == {}
    assert prune(store, 0) == []
    assert not store.root.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", None])
def test_an_entry_without_a_readable_manifest_is_listed(store: Store, text: str | None) -> None:
    path = store.entries / ("a" * 64) / "manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    last = contents(store)[-1]
    assert last.key == "a" * 64
    assert last.summary == "unknown"


def test_what_no_entry_is_does_not_stop_the_rest(store: Store) -> None:
    (store.entries / ".DS_Store").write_text("")
    (store.entries / ("a" * 64) / "manifest.json").write_text("[" * 100_000)
    (store.entries / ("b" * 64) / "manifest.json").unlink()
    (store.entries / ("b" * 64) / "manifest.json").mkdir()
    add(store, "d", 10, 4000, kind="engine", name="unet")  # by a version with other fields
    assert sorted(keys(contents(store))) == ["a", "b", "c", "d"]
    assert contents(store)[0].summary == "engine unet ()"
    assert set(verify(store)) == {"a" * 64, "b" * 64}
    assert sorted(keys(prune(store, None))) == ["a", "b"]
    assert keys(contents(store)) == "dc"


def test_a_manifest_that_was_changed_is_not_believed(store: Store) -> None:
    path = store.entries / ("a" * 64) / "manifest.json"
    path.write_text(path.read_text().replace('"onnx"', '"onny"'))
    last = contents(store)[-1]
    assert (last.key, last.description, last.summary) == ("a" * 64, {}, "unknown")
    assert last.damage == "manifest.json has another SHA-256 than when it was written"


def test_a_cache_copied_without_its_folders_for_work(store: Store, tmp_path: Path) -> None:
    copy = Store(tmp_path / "copy")
    shutil.copytree(store.entries, copy.entries)
    (copy.entries / ("a" * 64) / "model.onnx").unlink()
    assert keys(prune(copy, None)) == "a"
    assert keys(contents(copy)) == "bc"


def test_verify_names_what_is_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(store) == {}
    (store.entries / ("b" * 64) / "model.onnx").write_bytes(bytes(999) + b"1")
    (store.entries / ("c" * 64) / "model.onnx").unlink()
    assert verify(store) == {
        "b" * 64: "model.onnx has another SHA-256 than when it was written",
        "c" * 64: "model.onnx is missing",
    }


def test_verify_reads_large_files_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_REMEMBER_FROM", 100)
    entry = add(store, "d", 1000, 4000)
    identity = file_identity(entry / "model.onnx")
    (entry / "model.onnx").write_bytes(bytes(999) + b"1")
    monkeypatch.setattr(manifests, "file_identity", lambda path: identity)  # bits lost without a write
    assert damage_of(entry) is None
    assert verify(store)["d" * 64] == "model.onnx has another SHA-256 than when it was written"


def test_pruning_takes_what_was_used_longest_ago(store: Store) -> None:
    each = contents(store)[0].bytes
    assert keys(prune(store, 3 * each)) == ""
    assert keys(prune(store, 2 * each)) == "c"
    assert keys(contents(store)) == "ab"
    assert keys(prune(store, 0)) == "ba"
    assert list((store.root / "partial").iterdir()) == []


def test_pruning_takes_damaged_entries_and_leftovers_first(store: Store) -> None:
    each = contents(store)[0].bytes
    (store.entries / ("a" * 64) / "model.onnx").unlink()
    leftover = store.root / "partial" / f"{'e' * 64}.0123"
    shutil.copytree(store.entries / ("b" * 64), leftover)
    assert keys(prune(store, 2 * each)) == "a"
    assert not leftover.exists()
    assert keys(prune(store, None)) == ""  # without a limit what is whole stays


def test_pruning_leaves_what_is_being_written(store: Store) -> None:
    with FileLock(store.root / "locks" / f"{'c' * 64}.lock"):
        assert keys(prune(store, 0)) == "ba"
    assert keys(contents(store)) == "c"


def test_a_file_where_the_cache_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "entries").write_text("")
    with pytest.raises(CacheError, match=r"is not a folder .* set LATENTRT_CACHE"):
        contents(Store(tmp_path / "cache"))


# --- the commands


@pytest.fixture
def run(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("LATENTRT_CACHE", str(store.root))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["cache", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_list_command(run: Callable[..., tuple[int, str, str]], store: Store) -> None:
    code, out, err = run("list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[3] for line in lines[:3]] == ["a" * 12, "b" * 12, "c" * 12]
    assert f"3 entries in {store.root}" in lines[3]
    rows = json.loads(run("list", "--json")[1])
    assert [row["key"][0] for row in rows] == ["a", "b", "c"]
    assert rows[0]["description"]["kind"] == "onnx"


def test_verify_command(run: Callable[..., tuple[int, str, str]], store: Store) -> None:
    assert run("verify")[0] == 0
    (store.entries / ("b" * 64) / "model.onnx").unlink()
    code, out, err = run("verify")
    assert code == 1
    assert "onnx unet float16  DAMAGED: model.onnx is missing" in out
    assert err == (
        "latentrt: 1 of 3 entries are damaged; they are built again when they are next needed, and `latentrt cache "
        "prune` removes them\n"
    )
    assert [row["damage"] for row in json.loads(run("verify", "--json")[1])] == [
        None,
        "model.onnx is missing",
        None,
    ]


def test_prune_command(run: Callable[..., tuple[int, str, str]], store: Store) -> None:
    code, out, _ = run("prune", "--max-size", "2kb")
    assert code == 0
    assert "removed 2, kept 1 entries" in out
    assert keys(contents(store)) == "a"
    assert "removed 0, kept 1 entries" in run("prune")[1]
    assert "--max-size is for `latentrt cache prune`, not for list" in run("list", "--max-size", "1")[2]
