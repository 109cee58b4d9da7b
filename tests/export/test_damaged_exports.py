"""`export/folder.py` and `runtime/prepare.py`: disks that fill, bytes that flip, exports that are killed: what was
whole stays, and nothing damaged is loaded."""

from __future__ import annotations

import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import torch
from latentrt.errors import CacheError, ExportError
from latentrt.export.folder import export_model
from latentrt.runtime.cache import Store
from latentrt.runtime.cache_contents import verify
from latentrt.runtime.engine_store import EngineTarget
from latentrt.runtime.engines.base import Component
from latentrt.runtime.loading import load_components
from latentrt.runtime.prepare import find_or_build_engine, find_or_export_onnx
from latentrt.runtime.weights import open_checkpoint

TEXT = "text_encoder"
RTX = EngineTarget("tensorrt-rtx", (89,))


@pytest.fixture(scope="module")
def component() -> Component:
    return load_components(open_checkpoint("demo"), torch.float32)[TEXT]


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process or of its children grows beyond `size` bytes: the disk is full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> set[str]:
    """All there are but locks, the digests of weights, which were right, and ONNX Runtime's one file for all runs."""
    others = ("locks", "digests.json", "digests.lock", ".ses")
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.parts[0] not in others}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process and its children put temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


# --- a full disk


def test_a_disk_that_fills_while_a_folder_is_written(tmp_path: Path) -> None:
    def export() -> list[Path]:
        made = export_model("demo", tmp_path, dtype=torch.float32, components=[TEXT])
        return [one.file for one in made]

    with (
        files_end_at(200_000),  # the graph is smaller, the weights are larger
        pytest.raises(
            ExportError, match=rf"no room .* while writing {TEXT} to .*; free some, or write to another"
        ),
    ):
        export()
    assert left(tmp_path) == [".latentrt.lock"]
    onnx.checker.check_model(export()[0])  # once there is room


def test_a_disk_that_fills_while_the_cache_is_written(
    component: Component, tmp_path: Path, temporary: Path
) -> None:
    cache = tmp_path / "cache"
    with (
        files_end_at(200_000),
        pytest.raises(CacheError, match=r"no room .* free some, or set LATENTRT_CACHE"),
    ):
        find_or_build_engine(component, RTX, cache_dir=cache)
    assert (files(cache), files(temporary)) == (set(), set())
    assert left(cache / "partial") == []

    find_or_export_onnx(component, cache_dir=cache)
    exported = files(cache)
    with (
        files_end_at(200_000),
        pytest.raises(CacheError, match=r"no room .* free some, or set LATENTRT_CACHE"),
    ):
        find_or_build_engine(component, RTX, cache_dir=cache)  # in the process that builds
    assert (files(cache), files(temporary)) == (exported, set())
    assert left(cache / "partial") == []


# --- a flipped byte


@pytest.fixture(scope="module")
def whole(component: Component, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the component's model and engine; don't damage it."""
    folder = tmp_path_factory.mktemp("whole")
    find_or_build_engine(component, RTX, cache_dir=folder)
    return folder


@pytest.mark.parametrize("file", ["model.plan", "model.onnx", "model.onnx.data", "manifest.json"])
def test_a_flipped_byte_is_named_and_nothing_of_it_loaded(
    component: Component, whole: Path, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Path(shutil.copytree(whole, tmp_path / "cache"))
    store = Store(cache)
    found = [path for path in cache.rglob(file) if path.parent.parent == store.entries]
    for path in found:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    damage = verify(store)
    assert set(damage) == {path.parent.name for path in found} != set()
    assert all(file in what for what in damage.values())
    for key in damage:
        with pytest.raises(CacheError, match=rf"is damaged \({file} .*; build it again"):
            store.get(key)
    if file == "model.onnx.data":  # what is built again is as it was
        with caplog.at_level(logging.WARNING):
            again = find_or_export_onnx(component, cache_dir=cache).with_name(file)
        assert "is damaged (model.onnx.data has another SHA-256" in caplog.text
        assert again.read_bytes() == next(whole.rglob(file)).read_bytes()


# --- killed


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_an_export_killed_at_random_moments(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Builds that are killed, which export as well, are in tests/export/test_demo_engines.py."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "latentrt.cli", "export", str(tiny("sdxl")), "-o", str(out)]
    options = ["--component", "vae_decoder", "--component", "unet", "--dtype", "float32"]
    environment = {**os.environ, "LATENTRT_CACHE": str(tmp_path / "cache")}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL)

    def models() -> list[Path]:
        return [out / name / "model.onnx" for name in ("vae_decoder", "unet")]

    begun = time.monotonic()
    assert start().wait(900) == 0
    seconds = time.monotonic() - begun
    draw = random.Random(1)
    seen = set()
    for k in range(8):
        if k % 2:  # in place of what is there, or into an empty folder
            shutil.rmtree(out)
        process = start()
        time.sleep(draw.uniform(0.3, 1) * seconds)
        process.kill()
        process.wait()
        seen.add(tuple(path.exists() for path in models()))
        for path in models():
            if path.exists():  # whole
                onnx.checker.check_model(path, full_check=True)
        assert start().wait(900) == 0
        assert left(out) == [".latentrt.lock", "unet", "vae_decoder"]
    assert len(seen) > 1  # they were not all killed in the same place
