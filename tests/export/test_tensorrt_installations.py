"""`runtime/engines/products.py`: TensorRT and TensorRT for RTX where they are absent or of another version, and
engines for one GPU, by a stand-in."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import util
from pathlib import Path

import pytest
import tensorrt_rtx_bindings as rtx
from helpers import tiny_onnx
from helpers.faults import disk_full
from latentrt.errors import BackendUnavailableError, BuildError
from latentrt.export import tensorrt as builder
from latentrt.export.tensorrt import EngineRequest, build_engine
from latentrt.runtime.engines import products


def nothing(phase: str) -> None:
    pass


@pytest.fixture
def request_(tmp_path: Path) -> EngineRequest:
    """To build one ReLU."""
    model, shapes = tiny_onnx.relu(tmp_path / "model.onnx"), {"x": [[1, 8], [2, 8], [4, 8]]}
    return EngineRequest("unet", "tensorrt-rtx", model, str(tmp_path / "model.plan"), (shapes,), (89,))


def test_a_product_that_is_not_installed(request_: EngineRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *a: None if "tensorrt" in name else find_spec(name, *a)
    )
    with pytest.raises(
        BackendUnavailableError, match=r'TensorRT for RTX is not installed; pip install "latentrt\[rtx\]"'
    ):
        build_engine(request_, nothing)


def test_all_objects_of_a_product_have_one_logger() -> None:
    """The second of another logger is warned of it, and what the first had is used when that is gone."""
    log = products.logger(rtx)
    log.clear()
    runtimes = [products.make(rtx.Runtime, products.logger(rtx)) for _ in range(2)]
    assert log.warnings == []
    for runtime in runtimes:
        assert runtime.deserialize_cuda_engine(b"no engine" * 99) is None
    assert "magicTag" in log.why()


def test_what_went_wrong_is_of_the_thread_that_asks() -> None:
    """Two engines are loaded at once."""
    log, both = products.logger.__wrapped__(rtx), threading.Barrier(2)

    def work(name: str) -> tuple[str, list[str]]:
        log.clear()
        both.wait()
        log.log(rtx.ILogger.ERROR, f"{name}\n broke")
        log.log(rtx.ILogger.WARNING, f"beware of {name}")
        both.wait()
        told = log.why(), log.warnings
        both.wait()
        log.clear()
        return told

    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(work, ["one", "two"]))
    assert told == [("one broke", ["beware of one"]), ("two broke", ["beware of two"])]
    log.clear()
    assert (log.errors, log.warnings) == ([], [])
    with ThreadPoolExecutor(1) as threads:  # such as TensorRT's own
        threads.submit(log.log, rtx.ILogger.ERROR, "it broke").result()
        assert log.why() == "it broke"
        log.clear()  # and not of what comes after
        assert log.errors == []


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`tensorrt(text)` installs a module of that text as tensorrt."""

    def install(text: str) -> None:
        (tmp_path / "tensorrt.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    before = sys.modules.pop("tensorrt", None)
    yield install
    sys.modules.pop("tensorrt", None)
    if before is not None:
        sys.modules["tensorrt"] = before


@pytest.mark.parametrize("version", ["9.30.0", "10.9.0", "10.13.3.9", "12.0.1"])
def test_versions_too_old_and_too_new(version: str, tensorrt: Callable[[str], None]) -> None:
    tensorrt(f"__version__ = {version!r}")
    with pytest.raises(
        BackendUnavailableError,
        match=rf"TensorRT {version} is installed, and latentrt drives 10\.14 to 11\.x; pip install",
    ):
        products.load(products.product("tensorrt"))


def test_the_oldest_version(tensorrt: Callable[[str], None]) -> None:
    tensorrt("__version__ = '10.14.1.48'")
    assert products.load(products.product("tensorrt")).__version__ == "10.14.1.48"


def test_a_product_whose_libraries_are_missing(tensorrt: Callable[[str], None]) -> None:
    tensorrt("raise ImportError('libnvinfer.so.11: cannot open')")
    with pytest.raises(
        BackendUnavailableError, match=r"cannot be imported \(libnvinfer.so.11: cannot open\)"
    ):
        products.load(products.product("tensorrt"))


# --- for the GPU that it is on

STAND_IN = """
import tensorrt_rtx_bindings
globals().update(vars(tensorrt_rtx_bindings))
__version__ = "11.4.0"
del ComputeCapability
"""


# In TensorRT for RTX they do nothing, and it says so.
no_ops = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")


@pytest.fixture
def for_one_gpu(request_: EngineRequest, tensorrt: Callable[[str], None]) -> EngineRequest:
    """Asks TensorRT, which has no architectures to choose from; TensorRT for RTX builds in its place."""
    tensorrt(STAND_IN)
    timings = Path(request_.plan).parent / "timings" / "0.cache"
    return replace(request_, product="tensorrt", archs=(90,), timing_cache=str(timings))


@no_ops
def test_tensorrt_builds_for_its_own_gpu(for_one_gpu: EngineRequest) -> None:
    for _ in range(2):  # the second takes the timings of the first
        figures = build_engine(for_one_gpu, nothing)
        assert Path(for_one_gpu.plan).stat().st_size == figures["engine_bytes"]
        assert figures["layers"] == 1
        assert Path(str(for_one_gpu.timing_cache)).stat().st_size > 0


def test_a_gpu_that_does_not_start_is_a_build_error(
    request_: EngineRequest, tensorrt: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt(f"""{STAND_IN}
class Builder:
    def __init__(self, log):
        log.log(ILogger.ERROR, "CUDA initialization failure with error: 3")
        raise TypeError("pybind11::init(): factory function returned nullptr")
""")
    with pytest.raises(
        BuildError,
        match=r"unet: TensorRT 11.4.0 cannot start \(CUDA initialization failure with error: 3\); see that its GPU and",
    ):
        build_engine(replace(request_, product="tensorrt", archs=(90,)), nothing)


@no_ops
def test_timings_that_are_damaged_are_not_taken(for_one_gpu: EngineRequest) -> None:
    file = Path(str(for_one_gpu.timing_cache))
    file.parent.mkdir()
    file.write_bytes(b"not timings")
    build_engine(for_one_gpu, nothing)
    assert len(file.read_bytes()) > len(b"not timings")


def test_two_at_once_keep_their_timings_in_one_file(for_one_gpu: EngineRequest) -> None:
    def keep(k: int) -> None:
        plan = tmp / str(k) / "model.plan"
        plan.parent.mkdir()
        begin.wait()
        for _ in range(200):
            builder._keep(bytes([k]) * 10_000, file, plan)

    tmp, file, begin = (
        Path(for_one_gpu.plan).parent,
        Path(str(for_one_gpu.timing_cache)),
        threading.Barrier(2),
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(keep, (1, 2)))
    assert file.read_bytes() in (b"\1" * 10_000, b"\2" * 10_000)
    assert [path.name for path in tmp.rglob("*.timings")] == []


@no_ops
def test_timings_that_a_full_disk_does_not_take_cost_no_engine(
    for_one_gpu: EngineRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:1])
        raise disk_full(path)

    monkeypatch.setattr(Path, "write_bytes", full)
    figures = build_engine(for_one_gpu, nothing)
    assert Path(for_one_gpu.plan).stat().st_size == figures["engine_bytes"]
    assert f"cannot keep timings in {for_one_gpu.timing_cache}: [Errno {errno.ENOSPC}]" in caplog.text
    files = [path.name for path in Path(for_one_gpu.plan).parent.rglob("*") if path.is_file()]
    assert sorted(set(files) - {"tensorrt.py"}) == ["model.onnx", "model.plan"]
