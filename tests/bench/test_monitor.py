"""`bench/monitor.py`: memory and other processes, sampled while a case is measured."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch
from helpers.fake_nvml import FakeNvml
from helpers.waiting import until
from latentrt.bench.monitor import BusyElsewhere, MemorySampler, Span, memory_now, peak_within
from latentrt.bench.nvml import GpuShare, Nvml

CPU = torch.device("cpu")


def test_gpu_memory_is_sampled_where_there_is_nvml() -> None:
    with MemorySampler(CPU, GpuShare(Nvml(FakeNvml(), object()))) as sampler:
        pass
    assert sampler.peaks()["gpu"] == 123
    assert len(sampler.series["gpu"]) == len(sampler.series["seconds"]) >= 2


def test_memory_of_a_gpu_is_reported_at_rest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 77)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 99)
    found = memory_now(torch.device("cuda"), GpuShare(Nvml(FakeNvml(), object())))
    assert (found["allocated"], found["reserved"], found["gpu"]) == (77, 99, 123)
    assert found["resident"] > 1e7
    assert "allocated" not in memory_now(CPU, None)


def test_peaks_of_pytorch_s_allocator_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts them between samples too, from when the sampler begins."""
    device = torch.device("cuda")
    counted = {"memory_allocated": 77, "memory_reserved": 99}
    before = {"max_memory_allocated": 7000, "max_memory_reserved": 9000}
    since = {"max_memory_allocated": 700, "max_memory_reserved": 900}
    for name in (*counted, *before):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _, name=name: (counted | before)[name])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _: before.update(since))
    with MemorySampler(device, None) as sampler:
        pass
    assert (max(sampler.series["allocated"]), max(sampler.series["reserved"])) == (77, 99)
    peaks = sampler.peaks()
    assert (peaks["allocated"], peaks["reserved"]) == (700, 900)


def test_a_stage_that_runs_twice_has_the_larger_peak() -> None:
    """As the text encoders do, for the base and for the refiner."""
    with MemorySampler(CPU, None) as sampler:
        pass
    sampler.series = {"seconds": [0.0, 1.0, 2.0], "resident": [5.0, 9.0, 3.0]}
    at = [
        Span(name, sampler.started + t - 0.1, sampler.started + t + 0.1)
        for t, name in enumerate(("text", "text", "base"))
    ]
    assert sampler.peaks_by_stage(at) == {"text": {"resident": 9.0}, "base": {"resident": 3.0}}
    assert sampler.peaks_by_stage(at[::-1]) == {"text": {"resident": 9.0}, "base": {"resident": 3.0}}


def test_a_stage_has_its_own_peak() -> None:
    series = {"seconds": [0.0, 1.0, 2.0, 3.0], "resident": [1.0, 9.0, 5.0, 7.0]}
    for begin, end, peak in ((0, 1.5, 9), (1.5, 2.5, 5), (2.1, 2.4, 5), (2.6, 2.7, 7), (9, 10, 7)):
        assert peak_within(series, Span("x", 100 + begin, 100 + end), 100) == {"resident": peak}


def test_own_work_is_not_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's clocks of others and of this process, which a test cannot hold still itself."""
    clocks = iter([(10.0, 100.0, 5.0), (14.0, 106.0, 7.0), (16.0, 107.0, 9.0)])
    monkeypatch.setattr("latentrt.bench.monitor._clocks", lambda: next(clocks))
    elsewhere = BusyElsewhere()
    assert elsewhere.lap() == (6 - 2) / 4
    assert elsewhere.lap() == 0  # clocks that tick apart


def test_another_process_that_works_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            elsewhere = BusyElsewhere()
            process = psutil.Process(busy.pid)
            begun = process.cpu_times().user
            until(lambda: process.cpu_times().user > begun + 0.2)  # tenfold the kernel's tick
            assert elsewhere.lap() > 0
        finally:
            busy.kill()
