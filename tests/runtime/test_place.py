"""Where a pipeline runs, against a stand-in for a machine with two GPUs."""

from __future__ import annotations

import threading

import latentrt
import pytest
import torch
from latentrt.runtime.place import device_named


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """`current.index`: the current GPU, of each thread its own."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "index", 0))
    return current


@pytest.mark.parametrize("name", [None, "cuda", torch.device("cuda")])
def test_a_gpu_is_said_by_its_number(name: torch.device | str | None, current: threading.local) -> None:
    current.index = 1
    assert device_named(name) == torch.device("cuda", 1)
    assert device_named("cuda:0") == torch.device("cuda", 0)
    assert device_named("cpu") == torch.device("cpu")


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
