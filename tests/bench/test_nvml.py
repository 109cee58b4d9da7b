"""`bench/nvml.py`: what NVML says of a GPU, through a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_nvml import FakeNvml
from helpers.planted_sides import CASE, PlantedSide, planted
from helpers.waiting import until
from latentrt.bench import worker
from latentrt.bench.nvml import GpuShare, Nvml, open_nvml
from latentrt.bench.side import SideOutput
from latentrt.bench.worker import Job, Worker

CPU = torch.device("cpu")


def test_nvml_in_its_units_and_what_a_gpu_lacks_is_asked_once() -> None:
    library = FakeNvml()
    nvml = Nvml(library, object())
    assert (nvml.process_bytes(), nvml.device_bytes(), nvml.driver()) == (123, 456, "580.1")
    assert nvml.state() == {
        "sm_mhz": 1980,
        "memory_mhz": 2619,
        "power_w": 350.5,
        "power_limit_w": 700,
        "temperature_c": 41,
    }
    assert [nvml.joules(), nvml.joules(), library.asked] == [None, None, 1]
    assert open_nvml(CPU) is None


def test_nvml_is_asked_again_after_an_error_that_may_pass() -> None:
    class Failing(FakeNvml):
        def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
            self.asked += 1
            if self.asked == 1:
                raise self.NVMLError(self.NVML_ERROR_UNKNOWN)
            return 5000

        def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:  # noqa: N802
            if kind == self.NVML_CLOCK_MEM:
                raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
            return 1980

    nvml = Nvml(Failing(), object())
    assert [nvml.joules(), nvml.joules()] == [None, 5.0]
    for _ in range(2):  # the memory's clock that is missing does not hide the SM's
        assert nvml.state().keys() == {"sm_mhz", "power_w", "power_limit_w", "temperature_c"}


class InContainer(FakeNvml):
    """The driver tells numbers of processes that mean nothing here."""

    used = 1000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=-1, usedGpuMemory=7)]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.used)


def test_gpu_memory_without_per_process_figures() -> None:
    library = InContainer()
    mine, theirs = (GpuShare(Nvml(library, object())) for _ in range(2))

    def turn(share: GpuShare, *changes: int) -> list[int | None]:
        share.begin()
        found = []
        for change in changes:
            library.used += change
            found.append(share.used())
        share.end()
        return found

    assert turn(mine, 100, 50, -20) == [100, 150, 130]
    assert turn(theirs, 400) == [400]
    assert turn(mine, 0, 30) == [130, 160]
    assert turn(theirs, -100) == [300]
    assert mine.series == "gpu by turns"
    known = GpuShare(Nvml(FakeNvml(), object()))
    assert turn(known, 0) == [123]
    assert known.series == "gpu"


def test_nvml_finds_the_gpu_that_pytorch_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    library, asked = FakeNvml(), []
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = lambda name: asked.append(name) or "handle"
    monkeypatch.setitem(sys.modules, "pynvml", library)
    uuid = "5c3c2a4e-0000-1111-2222-333344445555"
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    found = open_nvml(torch.device("cuda:1"))
    assert asked == [f"GPU-{uuid}"]
    assert found.process_bytes() == 123

    def absent() -> None:
        raise library.NVMLError(library.NVML_ERROR_UNKNOWN)

    library.nvmlInit = absent
    assert open_nvml(torch.device("cuda:1")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert open_nvml(torch.device("cuda:1")) is None


class AtItsPowerLimit(FakeNvml):
    """Its clock is lower while it has work."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = False
        self.sampled = 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:  # noqa: N802
        self.sampled += self.busy
        return 1400 if self.busy else 1980


def test_the_clock_of_a_timed_call_is_that_of_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = AtItsPowerLimit()
    monkeypatch.setattr(worker, "open_nvml", lambda device: Nvml(library, object()))
    side = Worker(Job(CASE, planted("side"), "cpu", tmp_path))
    side.open()
    generate = PlantedSide.__call__

    def working(self: PlantedSide, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
        made = generate(self, prompts, seeds)
        library.busy = True
        # More than there can be before it, and it stays so until the call is over: `joules` is read next.
        until(lambda: library.sampled > 20, 20, what="samples during the call")
        return made

    def over() -> float:
        library.busy = False
        return 0.0

    monkeypatch.setattr(PlantedSide, "__call__", working)
    monkeypatch.setattr(Nvml, "joules", lambda self: over())
    assert side.run(["a"], [0]).gpu["sm_mhz"] == 1400
