"""Memory and the GPU's clocks during a call, sampled in a thread, and how busy other processes kept the machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil
import torch

from .nvml import GpuShare, Nvml

__all__ = ["BusyElsewhere", "GpuSampler", "MemorySampler", "Series", "Span", "memory_now", "peak_within"]

Series = dict[str, list[float]]
"""`seconds` since the start, and for each kind of memory as many values in bytes:

- `resident`: of the process on the host;
- `allocated`: PyTorch's tensors on the GPU;
- `reserved`: what PyTorch's allocator holds for them and for recorded graphs;
- `gpu` or `gpu by turns`: everything of the process on the GPU (see `nvml.GpuShare`).
"""

_PROCESS = psutil.Process()
_INTERVAL = 0.005  # seconds between samples
_GPU_INTERVAL = 0.1  # the same of the GPU's state, in calls that are timed


@dataclass(frozen=True)
class Span:
    """A stage of a run, in seconds of `time.perf_counter`."""

    name: str
    begin: float
    end: float


class MemorySampler:
    """`with MemorySampler(device, share) as sampler:` and then `sampler.series`."""

    def __init__(self, device: torch.device, share: GpuShare | None) -> None:
        self._device = device
        self._share = share
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.started = 0.0
        self.series: Series = {"seconds": []}

    def __enter__(self) -> MemorySampler:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.started = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        # A kind that could not be read every time cannot be matched with the seconds.
        count = len(self.series["seconds"])
        self.series = {name: values for name, values in self.series.items() if len(values) == count}

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        values = memory_now(self._device, self._share)
        self.series["seconds"].append(time.perf_counter() - self.started)
        for name, value in values.items():
            self.series.setdefault(name, []).append(value)

    def peaks(self) -> dict[str, float]:
        """The largest value of each kind in bytes. PyTorch's allocator counts its own peaks, also between samples."""
        peaks = {name: max(values) for name, values in self.series.items() if name != "seconds"}
        if self._device.type == "cuda":
            peaks["allocated"] = float(torch.cuda.max_memory_allocated(self._device))
            peaks["reserved"] = float(torch.cuda.max_memory_reserved(self._device))
        return peaks

    def peaks_by_stage(self, spans: Sequence[Span]) -> dict[str, dict[str, float]]:
        """Stage -> the largest sample of each kind while it ran, over all of its runs.

        A stage that is shorter than the sampling interval gets the nearest sample. Peaks shorter than the interval are
        missed here, but not by `peaks`.
        """
        by_stage: dict[str, dict[str, float]] = {}
        for span in spans:
            peaks = by_stage.setdefault(span.name, {})
            for kind, value in peak_within(self.series, span, self.started).items():
                peaks[kind] = max(value, peaks.get(kind, 0.0))
        return by_stage


def peak_within(series: Series, span: Span, started: float) -> dict[str, float]:
    """The largest sample of each kind within a stage; the nearest one if the stage is too short to have any."""
    times = [t + started for t in series["seconds"]]
    inside = [k for k, t in enumerate(times) if span.begin <= t <= span.end]
    midpoint = (span.begin + span.end) / 2
    inside = inside or [min(range(len(times)), key=lambda k: abs(times[k] - midpoint))]
    return {name: max(values[k] for k in inside) for name, values in series.items() if name != "seconds"}


class GpuSampler:
    """`with GpuSampler(nvml) as sampler:` and then `sampler.state()`.

    It samples only inside the block: the clocks of a GPU at its power limit recover as soon as it has no work.
    """

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._samples: list[dict[str, float]] = []

    def __enter__(self) -> GpuSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_GPU_INTERVAL):
            self._samples.append(self._nvml.state())

    def state(self) -> dict[str, float]:
        """The median of each value of `Nvml.state`; empty if the block was shorter than 0.1 s."""
        names = dict.fromkeys(name for sample in self._samples for name in sample)
        return {name: median(sample[name] for sample in self._samples if name in sample) for name in names}


def memory_now(device: torch.device, share: GpuShare | None) -> dict[str, float]:
    """Bytes of this process by kind (see `Series`), without those that the driver does not report."""
    values = {"resident": float(_PROCESS.memory_info().rss)}
    if device.type == "cuda":
        values["allocated"] = float(torch.cuda.memory_allocated(device))
        values["reserved"] = float(torch.cuda.memory_reserved(device))
    used = None if share is None else share.used()
    if share is not None and used is not None:
        values[share.series] = float(used)
    return values


class BusyElsewhere:
    """Cores that other processes kept busy: the machine's busy time less this process's."""

    def __init__(self) -> None:
        self._since = _clocks()

    def lap(self) -> float:
        """Mean number of cores that others kept busy since the last call, at least 0."""
        before, self._since = self._since, _clocks()
        wall, busy, own = (b - a for a, b in zip(before, self._since, strict=True))
        return max(0.0, (busy - own) / wall)


def _clocks() -> tuple[float, float, float]:
    """Seconds of wall time, of all cores' busy time, and of this process's CPU time."""
    return time.perf_counter(), _busy_seconds(), time.process_time()


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
