"""Measures the gaps between the denoising steps on a GPU, with PyTorch's profiler.

`python -m latentrt.bench.timeline --case sdxl` profiles one picture, and writes the gaps as JSON and prints them as a
table.

A step is one launch of a recorded CUDA graph. In the profiler's trace, the call that launches it on the host and the
kernels that it runs on the device have the same correlation number. That gives for each launch its begin and end on the
device, the time between them in which a kernel ran or none did, and the idle time until the next launch.

The profiler slows down the host, and a little the device. So real gaps are at most as long as those measured here, and
for the time of steps see `latentrt bench`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..errors import BenchmarkError
from ..kernels.atomic_file import write_json
from .cases import CASES, DTYPES, Case, case_named
from .latentrt_side import open_side
from .machine import describe_machine
from .markup import as_markdown
from .models import resolve_models

__all__ = ["Launch", "Run", "launches_of", "profile", "runs_of", "table"]

SCHEMA = 1
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
_LAUNCH = "GraphLaunch"  # cudaGraphLaunch, cuGraphLaunch
_WAIT = ("EventSynchronize", "StreamSynchronize", "DeviceSynchronize")


@dataclass(frozen=True)
class Launch:
    """One launch of a recorded graph. Times are microseconds of the trace.

    Attributes:
        kernels: how many kernels and copies it ran.
        begin, end: of the first and the last of them.
        busy: time in which at least one ran.
        given: when the host's call to launch it returned.
        waited: for how long the host waited for the device since the previous launch.
    """

    kernels: int
    begin: float
    end: float
    busy: float
    given: float
    waited: float


@dataclass(frozen=True)
class Run:
    """Consecutive launches with the same number of kernels, which are the steps of one loop. Times are medians in
    microseconds.

    Attributes:
        launches: how many.
        kernels: of each launch.
        step: from its begin to its end.
        idle_within: time in a step in which nothing ran.
        gap, gap_most: median and maximum from the end of a launch to the begin of the next one in this run; None for a
            single launch.
        gap_after: from the end of the last launch to the begin of the next graph, if there is one.
        host: the host's time from launch to launch, without waiting for the device; None for a single launch.
    """

    launches: int
    kernels: int
    step: float
    idle_within: float
    gap: float | None
    gap_most: float | None
    gap_after: float | None
    host: float | None


def launches_of(trace: Mapping[str, Any]) -> list[Launch]:
    """The launches in a trace in Chrome's format, in the device's order.

    Raises:
        BenchmarkError: the trace has none.
    """
    events = [event for event in trace.get("traceEvents", ()) if event.get("ph") == "X"]
    launched_at = {
        event["args"]["correlation"]: event["ts"] + event["dur"]
        for event in events
        if event.get("cat") in _HOST and _LAUNCH in event["name"] and "correlation" in event.get("args", {})
    }
    waits = sorted(
        (event["ts"], event["dur"])
        for event in events
        if event.get("cat") in _HOST and event["name"].endswith(_WAIT)
    )
    kernel_spans: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        number = event.get("args", {}).get("correlation")
        if event.get("cat") in _DEVICE and number in launched_at:
            kernel_spans.setdefault(number, []).append((event["ts"], event["ts"] + event["dur"]))
    if not kernel_spans:
        raise BenchmarkError(
            "the trace has no launch of a recorded graph; profile a GPU, with graphs and the profiler's CUDA activities"
        )
    launches = []
    previous = float("-inf")
    for number in sorted(kernel_spans, key=lambda n: launched_at[n]):
        spans = kernel_spans[number]
        waited = sum(length for at, length in waits if previous <= at < launched_at[number])
        previous = launched_at[number]
        launches.append(
            Launch(
                kernels=len(spans),
                begin=min(begin for begin, _ in spans),
                end=max(end for _, end in spans),
                busy=_union_length(spans),
                given=launched_at[number],
                waited=waited,
            )
        )
    return sorted(launches, key=lambda launch: launch.begin)


def runs_of(launches: Sequence[Launch]) -> list[Run]:
    """Group consecutive launches into runs."""
    groups = [list(group) for _, group in groupby(launches, key=lambda launch: launch.kernels)]
    runs = []
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        gaps = [max(0.0, b.begin - a.end) for a, b in pairwise(group)]
        hosts = [b.given - a.given - b.waited for a, b in pairwise(group)]
        runs.append(
            Run(
                launches=len(group),
                kernels=group[0].kernels,
                step=median(launch.end - launch.begin for launch in group),
                idle_within=median(launch.end - launch.begin - launch.busy for launch in group),
                gap=median(gaps) if gaps else None,
                gap_most=max(gaps, default=None),
                gap_after=None if following is None else max(0.0, following[0].begin - group[-1].end),
                host=median(hosts) if hosts else None,
            )
        )
    return runs


def table(runs: Iterable[Run]) -> str:
    """The runs as a Markdown table."""
    head = [
        "launches",
        "kernels",
        "step ms",
        "idle within us",
        "gap us",
        "longest us",
        "gap after us",
        "host us",
    ]
    rows = [head]
    for run in runs:
        times = (run.idle_within, run.gap, run.gap_most, run.gap_after, run.host)
        rows.append(
            [
                str(run.launches),
                str(run.kernels),
                f"{run.step / 1000:.3f}",
                *("-" if time is None else f"{time:.1f}" for time in times),
            ]
        )
    return "\n".join(as_markdown(rows))


def _union_length(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, covered_until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, covered_until))
        covered_until = max(covered_until, end)
    return total


def profile(case: Case, folder: Path, backend: str) -> dict[str, Any]:
    """Profile one picture, after two that record graphs and warm up.

    Args:
        folder: for random weights, and for what a back end builds.

    Returns:
        The trace, in Chrome's format.
    """
    device = torch.device("cuda")
    case = resolve_models(case, folder, device)
    # The benchmark's side, whose times this explains.
    side = open_side(case, device, DTYPES[case.dtype], folder, backend=backend, graphs=True)
    for seed in range(2):
        side(["a timeline"], [seed])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        side(["a timeline"], [2])
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="latentrt-") as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return trace


def measure(case: Case, folder: Path, backend: str, out: Path) -> str:
    """Profile a case, write `<case>.json` into `out`, and return the table."""
    launches = launches_of(profile(case, folder, backend))
    runs = runs_of(launches)
    report = {
        "schema": SCHEMA,
        "benchmark": "timeline",
        "machine": describe_machine(),
        "case": asdict(case),
        "backend": backend,
        "runs": [asdict(run) for run in runs],
        "launches": [asdict(launch) for launch in launches],
    }
    write_json(out / f"{case.name}.json", report)
    return table(runs)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="The gaps between the steps of a loop on a GPU.")
    parser.add_argument(
        "--case", action="append", choices=CASES, help="several are profiled one after another"
    )
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--out", type=Path, default=Path("out/timeline"), help="folder of the results")
    parser.add_argument(
        "--work", type=Path, help="keep random weights and builds here, and use them if they are there"
    )
    args = parser.parse_args(argv)
    if args.backend == "eager":
        parser.error("eager PyTorch has no captured steps; give a back end that has")
    if not torch.cuda.is_available():
        print(f"a timeline is of a GPU, and PyTorch {torch.__version__} sees none", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="latentrt-") as scratch:
        for name in args.case or ["sdxl-refiner"]:
            text = measure(case_named(name), args.work or Path(scratch), args.backend, args.out)
            print(f"{name}, {args.backend}\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
