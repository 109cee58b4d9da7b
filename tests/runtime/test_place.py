"""Where a pipeline runs, against a stand-in for a machine with two GPUs; amounts of memory, and how a want of it is
told."""

from __future__ import annotations

import threading

import latentrt
import pytest
import torch
from latentrt.errors import RequestError
from latentrt.runtime.place import memory_ran_out, parse_bytes, parse_device


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """`current.index`: the current GPU, of each thread its own."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    return current


@pytest.mark.parametrize("name", [None, "cuda", torch.device("cuda")])
def test_a_gpu_is_said_by_its_number(name: torch.device | str | None, current: threading.local) -> None:
    current.index = 1
    assert parse_device(name) == torch.device("cuda", 1)
    assert parse_device("cuda:0") == torch.device("cuda", 0)
    assert parse_device("cpu") == torch.device("cpu")


def test_a_gpu_that_there_is_not(current: threading.local) -> None:
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    for name in ("cuda:2", torch.device("cuda", 2)):
        with pytest.raises(RequestError, match=r"'cuda:2'; PyTorch sees 2 of .* 'cuda:1'"):
            parse_device(name)


def test_a_pipeline_stays_on_its_gpu(current: threading.local, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has more names than one, of which one means another GPU in another thread."""
    pipe = latentrt.Pipeline.from_pretrained("demo", backend="eager", device="cpu", graphs=False)
    pipe.to("cuda")
    moved: list[torch.device] = []
    monkeypatch.setattr(pipe._loader, "move", moved.append)
    pipe.to("cuda:0")
    pipe.to("cuda")
    assert moved == []
    current.index = 1
    assert pipe.device == torch.device("cuda:0")
    pipe.to("cuda")
    assert moved == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("20GB", 20 * 10**9),
        ("1.5 g", 15 * 10**8),
        ("500M", 5 * 10**8),
        ("7kb", 7000),
        ("1e9", 10**9),
        ("2T", 2 * 10**12),
        ("8GiB", 8 * 2**30),
        ("1.5 mib", 3 * 2**19),
        ("4Ki", 4096),
    ],
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text, "memory_limit") == count


@pytest.mark.parametrize("text", ["", "much", "GB", "-1", "1.2.3G", "20iB", "20GGB"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"memory_limit: .* is no amount of memory; write such as 20GB or 500MB"
    ):
        parse_bytes(text, "memory_limit")


@pytest.mark.parametrize("text", ["1e999", "9" * 400, "1e308T"])
def test_more_memory_than_there_is(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"memory_limit: .* is more memory than there is; write such as 20GB"
    ):
        parse_bytes(text, "memory_limit")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"
        ),
    ],
)
def test_out_of_memory_errors_of_every_library_are_recognised(error: Exception) -> None:
    assert memory_ran_out(error)
    assert not memory_ran_out(RuntimeError("an illegal memory access was encountered"))
