"""`runtime/cache.py`: several threads and processes that write one entry, and writers that are killed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.tiny_entries import DESCRIPTION, KEY, OTHER, leftovers, never, writes
from latentrt.runtime import cache
from latentrt.runtime.cache import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def test_threads_build_once(store: Store) -> None:
    built: list[Path] = []

    def build(folder: Path) -> Mapping[str, Any]:
        built.append(folder)
        return writes()(folder)

    threads = [threading.Thread(target=store.get_or_build, args=(KEY, DESCRIPTION, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_waiting_for_another_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    held = FileLock(store.root / "locks" / f"{KEY}.lock")
    held.acquire()
    told: list[str] = []

    def warning(text: str, *values: object) -> None:
        told.append(text % values)
        held.release()

    monkeypatch.setattr(cache._log, "warning", warning)
    store.get_or_build(KEY, DESCRIPTION, writes())
    assert told == ["waiting for another process, which is building unet"]


BUILDER = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    from latentrt.runtime.cache import Store

    root, key, how = sys.argv[1:]

    def build(folder):
        with open(Path(root).parent / "builds", "a") as log:
            log.write("built\\n")
        (folder / "model.onnx").write_text("weights")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        return {}

    Store(Path(root)).get_or_build(key, {"name": "unet"}, build)
""")


def builder(store: Store, key: str, how: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(store.root), key, how])


def test_processes_build_once(store: Store) -> None:
    processes = [builder(store, KEY, "slowly") for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (store.root.parent / "builds").read_text() == "built\n"
    store.get_or_build(KEY, DESCRIPTION, never)


@pytest.mark.parametrize("then", [KEY, OTHER], ids=["the same entry", "another entry"])
def test_what_a_killed_writer_leaves_is_removed(store: Store, then: str) -> None:
    assert builder(store, KEY, "killed").wait(60) != 0
    assert len(leftovers(store)) == 1
    entry = store.get_or_build(then, DESCRIPTION, writes("rebuilt"))
    assert (entry / "model.onnx").read_text() == "rebuilt"
    assert leftovers(store) == []


def test_the_sweep_leaves_a_living_writer_alone(store: Store) -> None:
    seen: list[list[str]] = []

    def build(folder: Path) -> Mapping[str, Any]:
        thread = threading.Thread(target=store.get_or_build, args=(OTHER, DESCRIPTION, writes()))
        thread.start()
        thread.join()
        seen.append(leftovers(store))
        return writes()(folder)

    entry = store.get_or_build(KEY, DESCRIPTION, build)
    assert [[name.partition(".")[0] for name in names] for names in seen] == [[KEY]]
    assert (entry / "model.onnx").exists()
