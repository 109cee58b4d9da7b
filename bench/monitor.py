"""Memory while something runs, sampled in a thread; what else the machine was doing meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from .nvml import GpuShare

__all__ = ["BusyElsewhere", "MemorySampler", "Series", "Span", "memory_now", "peak_within"]

Series = dict[str, list[float]]
"""`seconds` from the start, and beside it bytes: `resident` of the process on the host; on a GPU PyTorch's tensors,
`allocated`, what its allocator has `reserved` for them and for recorded graphs, and `gpu` or `gpu by turns`, which is
everything of the process there (see `nvml.GpuShare`)."""

_PROCESS = psutil.Process()
_INTERVAL = 0.005  # seconds between samples


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
        self.begun = 0.0
        self.series: Series = {"seconds": []}

    def __enter__(self) -> MemorySampler:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.begun = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        count = len(self.series["seconds"])  # what could not be read each time has no place in time
        self.series = {name: values for name, values in self.series.items() if len(values) == count}

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        values = memory_now(self._device, self._share)
        self.series["seconds"].append(time.perf_counter() - self.begun)
        for name, value in values.items():
            self.series.setdefault(name, []).append(value)

    def peaks(self) -> dict[str, float]:
        """The most of each in bytes; PyTorch's allocator counts its own, between samples too."""
        found = {name: max(values) for name, values in self.series.items() if name != "seconds"}
        if self._device.type == "cuda":
            found["allocated"] = float(torch.cuda.max_memory_allocated(self._device))
            found["reserved"] = float(torch.cuda.max_memory_reserved(self._device))
        return found

    def peaks_by_stage(self, spans: Sequence[Span]) -> dict[str, dict[str, float]]:
        """The most of each sampled while a stage ran, which may be several times; a stage shorter than the interval has
        the nearest sample. Samples miss what lasts less than an interval; `peaks` does not."""
        found: dict[str, dict[str, float]] = {}
        for span in spans:
            most = found.setdefault(span.name, {})
            for kind, value in peak_within(self.series, span, self.begun).items():
                most[kind] = max(value, most.get(kind, 0.0))
        return found


def peak_within(series: Series, span: Span, begun: float) -> dict[str, float]:
    """The largest sample of each kind in a stage; in a stage too short for one, the nearest."""
    times = [t + begun for t in series["seconds"]]
    inside = [k for k, t in enumerate(times) if span.begin <= t <= span.end]
    middle = (span.begin + span.end) / 2
    inside = inside or [min(range(len(times)), key=lambda k: abs(times[k] - middle))]
    return {name: max(values[k] for k in inside) for name, values in series.items() if name != "seconds"}


def memory_now(device: torch.device, share: GpuShare | None) -> dict[str, float]:
    """Bytes of this process by kind, see `Series`; what the driver does not tell is not in it."""
    found = {"resident": float(_PROCESS.memory_info().rss)}
    if device.type == "cuda":
        found["allocated"] = float(torch.cuda.memory_allocated(device))
        found["reserved"] = float(torch.cuda.memory_reserved(device))
    used = None if share is None else share.used()
    if share is not None and used is not None:
        found[share.series] = float(used)
    return found


class BusyElsewhere:
    """Cores that others kept busy since the last `lap`: what the machine did less what this process did."""

    def __init__(self) -> None:
        self._since = _clocks()

    def lap(self) -> float:
        """Mean number of busy cores besides this process's, at least 0."""
        before, self._since = self._since, _clocks()
        wall, busy, own = (b - a for a, b in zip(before, self._since, strict=True))
        return max(0.0, (busy - own) / wall)


def _clocks() -> tuple[float, float, float]:
    """Seconds of the wall, of all busy cores and of this process's."""
    return time.perf_counter(), _busy_seconds(), time.process_time()


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
