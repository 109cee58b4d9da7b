"""`bench/null_cuda/driver.c`: the stand-in for CUDA's libraries: what a device would refuse, it refuses."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from latentrt.bench.null_cuda.build import compiled, environment

pytestmark = pytest.mark.full  # for want of a compiler in some places


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    found = importlib.util.find_spec("triton")
    assert found is not None
    assert found.origin is not None
    headers = Path(found.origin).parent / "backends" / "nvidia" / "include"
    library = compiled(tmp_path_factory.mktemp("null_cuda"), ["cudaMalloc", "cudaSomethingElse"], [headers])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(library, bytes=1 << 30).items():
            if name.startswith("NULL_CUDA_"):
                patch.setenv(name, value)
        yield ctypes.CDLL(str(library))


def pointer() -> ctypes.c_void_p:
    return ctypes.c_void_p()


def test_memory_is_bounded(cuda: ctypes.CDLL) -> None:
    one, two = pointer(), pointer()
    assert cuda.cudaMalloc(ctypes.byref(one), ctypes.c_size_t(700 << 20)) == 0
    assert cuda.cudaMalloc(ctypes.byref(two), ctypes.c_size_t(400 << 20)) == 2
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cudaMemGetInfo(ctypes.byref(left), ctypes.byref(total))
    assert (left.value, total.value) == (324 << 20, 1 << 30)
    assert cuda.cudaFree(one) == 0
    assert cuda.cudaFree(one) == 1
    assert cuda.cudaMalloc(ctypes.byref(two), ctypes.c_size_t(1 << 30)) == 0
    assert cuda.cudaFree(two) == 0
    assert cuda.cudaSomethingElse() == 0


def test_waiting_or_allocating_during_capture_fails(cuda: ctypes.CDLL) -> None:
    stream, graph, memory, status = pointer(), pointer(), pointer(), ctypes.c_int()
    cuda.cudaStreamCreate(ctypes.byref(stream))
    for breaks, how in (
        (lambda: 0, 0),
        (lambda: cuda.cudaStreamSynchronize(stream), 900),
        (lambda: cuda.cudaMalloc(ctypes.byref(memory), ctypes.c_size_t(8)), 900),
        (cuda.cudaDeviceSynchronize, 900),
    ):
        assert cuda.cudaStreamBeginCapture(stream, 1) == 0
        cuda.cudaStreamIsCapturing(stream, ctypes.byref(status))
        assert status.value == 1
        assert cuda.cudaMemsetAsync(None, 0, ctypes.c_size_t(0), stream) == 0
        assert breaks() == how
        assert cuda.cudaStreamEndCapture(stream, ctypes.byref(graph)) == (901 if how else 0)
        assert bool(graph) is not bool(how)
    assert cuda.cudaStreamSynchronize(stream) == 0


def test_a_stream_joins_the_capture_that_it_waits_for(cuda: ctypes.CDLL) -> None:
    one, two, event, graph, status = pointer(), pointer(), pointer(), pointer(), ctypes.c_int()
    for handle, create in (
        (one, cuda.cudaStreamCreate),
        (two, cuda.cudaStreamCreate),
        (event, cuda.cudaEventCreate),
    ):
        create(ctypes.byref(handle))
    cuda.cudaStreamBeginCapture(one, 1)
    cuda.cudaEventRecord(event, one)
    assert cuda.cudaStreamWaitEvent(two, event, 0) == 0
    cuda.cudaStreamIsCapturing(two, ctypes.byref(status))
    assert status.value == 1
    assert cuda.cudaEventSynchronize(event) == 907
    assert cuda.cudaStreamEndCapture(one, ctypes.byref(graph)) == 901
    cuda.cudaStreamIsCapturing(two, ctypes.byref(status))
    assert status.value == 0


def test_a_device_uses_nothing_of_anothers(cuda: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NULL_CUDA_DEVICES", "2")
    stream, event, mine, found = pointer(), pointer(), pointer(), ctypes.c_int()
    zero, one = ctypes.c_size_t(0), (ctypes.c_uint * 3)(1, 1, 1)
    assert cuda.cudaSetDevice(2) == 101
    assert cuda.cudaSetDevice(1) == 0
    cuda.cudaGetDevice(ctypes.byref(found))
    assert found.value == 1
    cuda.cudaStreamCreate(ctypes.byref(stream))
    cuda.cudaEventCreate(ctypes.byref(event))
    assert cuda.cudaMalloc(ctypes.byref(mine), ctypes.c_size_t(1 << 30)) == 0

    def launch() -> int:
        return int(cuda.cuLaunchKernel(b"kernel", *one, *one, 0, stream, None, None))

    assert (launch(), cuda.cudaEventRecord(event, stream), cuda.cudaEventRecord(event, None)) == (0, 0, 0)
    assert cuda.cuPointerGetAttribute(ctypes.byref(zero), 3, mine) == 0
    cuda.cudaSetDevice(0)
    assert (launch(), cuda.cudaEventRecord(event, stream), cuda.cudaEventRecord(event, None)) == (400, 0, 400)
    assert cuda.cuPointerGetAttribute(ctypes.byref(zero), 3, mine) == 400
    other = pointer()
    assert cuda.cudaMalloc(ctypes.byref(other), ctypes.c_size_t(1 << 30)) == 0  # it has memory of its own
    assert cuda.cudaFree(mine) == cuda.cudaFree(other) == 0
