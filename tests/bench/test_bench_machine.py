"""What is read of the machine: NVML through a stand-in, memory estimates, cases and their steps."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentrt.bench.cases import CASES, DTYPES, SIDES, default_sides, sides_named
from latentrt.bench.machine import describe_machine
from latentrt.bench.models import needed_bytes, too_little
from latentrt.bench.monitor import BusyElsewhere, MemorySampler, Span, peak_within
from latentrt.bench.nvml import GpuShare, Nvml, open_nvml
from latentrt.bench.side import factory
from latentrt.runtime.weights import open_checkpoint

CPU = torch.device("cpu")


class Library:
    """As much of pynvml as is asked."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.asked = 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=1, usedGpuMemory=7), SimpleNamespace(pid=os.getpid(), usedGpuMemory=123)]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(used=456)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        self.asked += 1
        raise self.NVMLError("not supported")

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:  # noqa: N802
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:  # noqa: N802
        return 350_500

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:  # noqa: N802
        return 41

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"


def test_nvml_in_its_units_and_what_a_gpu_lacks_is_asked_once() -> None:
    library = Library()
    nvml = Nvml(library, object())
    assert (nvml.process_bytes(), nvml.device_bytes(), nvml.driver()) == (123, 456, "580.1")
    assert nvml.state() == {"sm_mhz": 1980, "memory_mhz": 2619, "power_w": 350.5, "temperature_c": 41}
    assert [nvml.joules(), nvml.joules(), library.asked] == [None, None, 1]
    assert open_nvml(CPU) is None


class InContainer(Library):
    """The driver tells numbers of processes that mean nothing here."""

    used = 1000

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=-1, usedGpuMemory=7)]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.used)


def test_a_share_of_the_gpu_is_told_by_turns_where_processes_are_not_told_apart() -> None:
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
    known = GpuShare(Nvml(Library(), object()))
    assert turn(known, 0) == [123]
    assert known.series == "gpu"


def test_the_machine_is_told_of_the_device_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: f"GPU at {device}")
    assert describe_machine(torch.device("cuda:1"))["gpu"] == "GPU at cuda:1"
    on_cpu = describe_machine(CPU)
    assert (on_cpu["device"], "gpu" in on_cpu) == ("cpu", False)


def test_gpu_memory_is_sampled_where_there_is_nvml() -> None:
    with MemorySampler(CPU, GpuShare(Nvml(Library(), object()))) as sampler:
        pass
    assert sampler.peaks()["gpu"] == 123
    assert len(sampler.series["gpu"]) == len(sampler.series["seconds"]) >= 2


def test_a_stage_has_its_own_peak() -> None:
    series = {"seconds": [0.0, 1.0, 2.0, 3.0], "resident": [1.0, 9.0, 5.0, 7.0]}
    for begin, end, peak in ((0, 1.5, 9), (1.5, 2.5, 5), (2.1, 2.4, 5), (2.6, 2.7, 7), (9, 10, 7)):
        assert peak_within(series, Span("x", 100 + begin, 100 + end), 100) == {"resident": peak}


def test_own_work_is_not_elsewhere() -> None:
    elsewhere = BusyElsewhere()
    sum(k * k for k in range(200_000))
    assert 0 <= elsewhere.lap() <= (os.cpu_count() or 1) + 0.5


def test_memory_is_estimated_before_a_case_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = sides_named(["diffusers", "latentrt-eager"])
    demo = needed_bytes(CASES["demo"], sides)
    assert 2 << 30 < demo < 4 << 30
    # Both have 3.5 billion parameters in float16, and 4 GiB to decode 1024x1024 pixels.
    assert needed_bytes(CASES["sdxl"], sides) == pytest.approx(2 * (2 * 3.47e9 + 5 * 2**30), rel=0.02)
    in_float32 = sides_named(["diffusers@float32", "latentrt-eager@float32"])
    assert needed_bytes(CASES["sdxl"], in_float32) - needed_bytes(CASES["sdxl"], sides) == pytest.approx(
        2 * 2 * 3.47e9, rel=0.02
    )
    monkeypatch.setattr("latentrt.bench.models._free_bytes", lambda device: demo)
    assert too_little(CASES["demo"], sides, CPU) == ""
    monkeypatch.setattr("latentrt.bench.models._free_bytes", lambda device: demo - 1)
    assert "take fewer with --side" in too_little(CASES["demo"], sides, CPU)


def test_the_tables_fit_together() -> None:
    for spec in SIDES.values():
        assert callable(factory(spec))
    for case in CASES.values():
        assert case.dtype in DTYPES
        for device in (CPU, torch.device("cuda")):
            assert sides_named(default_sides(case, device))[0].is_eager_diffusers
    assert "diffusers@float32" in default_sides(CASES["sdxl"], torch.device("cuda"))


def test_steps_are_split_as_the_schedule_splits_them() -> None:
    scheduler = open_checkpoint("demo").config("scheduler")
    assert CASES["demo"].split_steps(scheduler) == {"base": 24, "refiner": 6}
    leading = {**scheduler, "timestep_spacing": "leading"}  # 0.8 of 1000 timesteps, not of 30 steps
    assert CASES["demo"].split_steps(leading) == {"base": 23, "refiner": 7}
    assert CASES["demo-base"].split_steps(scheduler) == {"base": 30}
    assert replace(CASES["demo"], high_noise_frac=1.0).split_steps(scheduler) == {"base": 30, "refiner": 0}
