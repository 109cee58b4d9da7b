"""What `kernels` and `kernel_tuning` share: timing by CUDA graphs, the check against float64, inputs, result files."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..kernels import aot, tuning
from ..kernels.registry import Case, OpSpec, allowed_error
from ..runtime.sha256 import digest_of_files
from .machine import command, describe_machine, tuned_digest
from .nvml import open_nvml

__all__ = [
    "LOST",
    "Float64Check",
    "Timing",
    "answers",
    "compile_ahead",
    "cuda_microseconds",
    "draw",
    "fresh",
    "gpu_state",
    "here",
    "read_if_same",
    "require_gpu",
    "slug",
    "sources",
    "watched",
]

_log = logging.getLogger(__name__)

KERNELS = Path(tuning.__file__).parent
CACHE_BYTES = 256 << 20
"""Inputs of one timing together, so that none is still in the cache when its turn comes again."""
CALLS = 16
"""At most, in one recorded graph."""
HANG = 90.0
"""Seconds after which one part of a row is given up, and the process with it: a kernel may never return."""
LOST = "never came back"
"""Written when a row begins and overwritten when it ends: if it is still there, the process died in that row."""

Calls = Mapping[str, Callable[..., Any]]
Timer = Callable[[Calls, Sequence[tuple[Any, ...]], float], dict[str, float | str]]
"""Microseconds of a call of each, given what to call them with in turn and for how many seconds; or what went wrong."""


@dataclass(frozen=True)
class Timing:
    """Where and how to time."""

    device: torch.device
    timer: Timer
    seconds: float = 400.0
    """After this much nothing new is begun."""
    folder: Path = Path("out/kernels")
    """Of the result files."""


def require_gpu() -> torch.device:
    """The current CUDA device.

    Raises:
        BackendUnavailableError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError("kernels are timed on a CUDA GPU, and PyTorch sees none here")
    return torch.device("cuda", torch.cuda.current_device())


def cuda_microseconds(
    calls: Calls, inputs: Sequence[tuple[Any, ...]], seconds: float
) -> dict[str, float | str]:
    """Medians over replays, in turn, of one graph for each: its calls on each of `inputs`."""
    found: dict[str, float | str] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        try:
            graphs[name] = _recorded(call, inputs)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    end = time.monotonic() + seconds * len(graphs)
    rounds = 0
    while graphs and (rounds < 7 or (time.monotonic() < end and rounds < 200)):
        marks = {}
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            marks[name] = start, stop
        torch.cuda.synchronize()
        for name, (start, stop) in marks.items():
            times[name].append(start.elapsed_time(stop) * 1e3 / len(inputs))
        rounds += 1
    return found | {name: statistics.median(list_[1:]) for name, list_ in times.items()}


def _recorded(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in [*inputs[:1], *inputs]:
            call(*args)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for args in inputs:
            call(*args)
    return graph


class Float64Check:
    """Whether a result may be timed: whether it is within the operator's tolerance of float64."""

    def __init__(self, spec: OpSpec, args: tuple[Any, ...]) -> None:
        self.usual = _tensors(spec.reference(*fresh(args)))
        try:
            self.exact = _tensors(spec.reference(*_raised(args, torch.float64)))
        except torch.OutOfMemoryError:
            self.exact = _tensors(spec.reference(*_raised(args, torch.float32)))

    def judge(self, got: Any) -> tuple[float, bool]:
        """The largest error over the reference's (0 where that is exact), and whether it is good enough."""
        ratio, good = 0.0, True
        for ours, theirs, true in zip(_tensors(got), self.usual, self.exact, strict=True):
            error, usual = (float((t.to(true.dtype) - true).abs().max()) for t in (ours, theirs))
            good = good and math.isfinite(error) and error <= allowed_error(theirs, true)
            ratio = max(ratio, error / usual if usual else 0.0)
        return ratio, good


def _raised(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def draw(timing: Timing, case: Case, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Inputs that together exceed the cache. Large ones do alone, and two calls still hide the start of a replay."""
    count = min(CALLS, max(2, math.ceil(CACHE_BYTES / case.nbytes(dtype))))
    return [case.inputs(dtype, timing.device) for _ in range(count if timing.device.type == "cuda" else 1)]


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies with the same strides, for operators that write into their arguments."""
    return tuple(_copied(a) if isinstance(a, Tensor) else a for a in args)


def _copied(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def compile_ahead(timing: Timing, requests: Sequence[aot.Request]) -> None:
    """Fill Triton's cache, by as many processes as there are cores, for at most half of the time."""
    if timing.device.type != "cuda":
        return
    found = aot.attempts(requests, processes=os.cpu_count() or 1, seconds=timing.seconds / 2)
    for r, message in zip(requests, found, strict=True):
        if isinstance(message, str):
            _log.info("%s %s: %s", r.op, r.trial or "", message[:200])


@contextmanager
def watched(timing: Timing, seconds: float = HANG) -> Iterator[None]:
    """A kernel that hangs takes the process with it, and the next run goes on behind it."""
    if timing.device.type == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def answers(timing: Timing) -> bool:
    """Whether the GPU still runs anything: an illegal access ends that for the whole process."""
    try:
        torch.zeros(1, device=timing.device).item()
    except Exception as error:
        _log.error("%s", str(error)[:300])
        return False
    return True


def here(timing: Timing) -> dict[str, Any]:
    """The machine, the GPU's state, the kernels' sources and the command: what a result has to be read with."""
    return {
        **describe_machine(),
        **gpu_state(timing),
        "sources": sources(),
        "tuned": tuned_digest(),
        "command": command(),
    }


def gpu_state(timing: Timing) -> dict[str, Any]:
    """Driver, clocks, power and temperature of the GPU that is timed, as they are now; empty where NVML is absent."""
    nvml = open_nvml(timing.device)
    return {} if nvml is None else {"driver": nvml.driver(), **nvml.state()}


def sources() -> str:
    """Digest of what is timed and how, for where there is no repository to ask."""
    files = [*KERNELS.glob("*.py"), *Path(__file__).parent.glob("kernel*.py")]
    return digest_of_files(sorted(files), KERNELS.parent)[:16]


def read_if_same(path: Path, machine: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """An earlier run's file, if its times compare with those of this run; nothing otherwise.

    Args:
        more: of the machine's fields, what has to be equal besides GPU, driver, CUDA, versions and sources. A driver
            that NVML did not report in one of the runs may be any.
    """
    if not path.exists():
        return {}
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = earlier["machine"]
    read = [run["driver"] for run in (before, machine) if run.get("driver") is not None]
    keys = ("gpu", "cuda", "versions", "sources", *more)
    same = len(set(read)) < 2 and all(before.get(key) == machine.get(key) for key in keys)
    return earlier if same else {}


def slug(machine: Mapping[str, Any]) -> str:
    """The GPU's name, as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu", "cpu")).lower()).strip("-")
