"""Shared by `kernels` and `kernel_tuning`: timing with CUDA graphs, the check against float64, inputs, result files."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import re
import statistics
import time
from collections import deque
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
from ..runtime.graph import reset_generator
from ..runtime.sha256 import digest_of_files
from .machine import command, describe_machine, tuned_digest
from .nvml import open_nvml

__all__ = [
    "HUNG",
    "Float64Check",
    "Timing",
    "clone_args",
    "compile_ahead",
    "cuda_microseconds",
    "gpu_is_alive",
    "gpu_slug",
    "gpu_state",
    "hang_watchdog",
    "input_count",
    "l2_bytes",
    "make_inputs",
    "read_resumable",
    "require_gpu",
    "run_metadata",
    "sources_digest",
]

_log = logging.getLogger(__name__)

KERNELS_FOLDER = Path(tuning.__file__).parent
_TIMES_CACHE = 4
"""What the calls of one pass read and write, as a multiple of the L2 cache: data has left it before it is used again,
also where an operator counts twice what it updates in place."""
_REPLAY_US = 1000.0
"""Least microseconds of one replay. The resolution of events and the start of a graph take a microsecond or two."""
_SLEEP_CYCLES = 2_000_000
"""How long the device is kept busy before each round: about 1 ms, in which the host queues the first graphs."""
HANG_SECONDS = 90.0
"""Seconds after which one part of a row counts as hanging, and the process is ended: a kernel may never return."""
HUNG = "never came back"
"""Saved before something is timed, and replaced by its time. If it is still there, the process died meanwhile."""

Calls = Mapping[str, Callable[..., Any]]
Timer = Callable[[Calls, Sequence[tuple[Any, ...]], float], dict[str, float | str]]
"""(calls, inputs to use in turn, seconds) -> microseconds of each call, or what went wrong."""


@dataclass(frozen=True)
class Timing:
    """Where and how to time.

    Attributes:
        seconds: after this time nothing new is started.
        folder: for result files.
    """

    device: torch.device
    timer: Timer
    seconds: float = 400.0
    folder: Path = Path("out/kernels")


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
    """A `Timer` for CUDA: medians over replays.

    Each call is recorded into a graph of a millisecond at least. In each round the graphs are queued while the device
    is still busy, so that none of them waits for the host, and another one is the first.
    """
    failures: dict[str, float | str] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, call in calls.items():
        try:
            graphs[name] = _record_long(call, inputs)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:300]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = deque(graphs)
    end = time.monotonic() + seconds * len(graphs)
    rounds = 0
    while graphs and (rounds < 7 or (time.monotonic() < end and rounds < 200)):
        replays = _replay_microseconds([graphs[name][0] for name in order])
        for name, us in zip(order, replays, strict=True):
            times[name].append(us / graphs[name][1])
        order.rotate(-1)
        rounds += 1
    # The first replay is a warm-up.
    return failures | {name: statistics.median(values[1:]) for name, values in times.items()}


def _replay_microseconds(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Replay each graph once, in this order."""
    torch.cuda._sleep(_SLEEP_CYCLES)
    events = []
    for graph in graphs:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in events]


def _record_long(
    call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]
) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of as many passes over the inputs as take `_REPLAY_US`, and how many calls that are."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for args in [*inputs[:1], *inputs]:
            call(*args)
    stream.synchronize()
    graph = _record(call, inputs, 1, stream)
    for _ in range(2):  # the first replay also uploads the graph
        (pass_us,) = _replay_microseconds([graph])
    passes = math.ceil(_REPLAY_US / pass_us)
    if passes > 1:
        del graph  # with its memory
        graph = _record(call, inputs, passes, stream)
    return graph, passes * len(inputs)


def _record(
    call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], passes: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    current = torch.cuda.current_stream()
    # If a result were dropped at once, the next call would write to the same memory, which is still in the cache.
    results: deque[Any] = deque(maxlen=len(inputs))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(passes):
                for args in inputs:
                    results.append(call(*args))
    except BaseException:
        torch.cuda.set_stream(current)
        reset_generator(stream.device)
        raise
    return graph


class Float64Check:
    """Checks an operator's results against float64, by the operator's tolerance."""

    def __init__(self, spec: OpSpec, args: tuple[Any, ...]) -> None:
        self.reference = _tensors(spec.reference(*clone_args(args)))
        try:
            self.exact = _tensors(spec.reference(*_upcast(args, torch.float64)))
        except torch.OutOfMemoryError:
            self.exact = _tensors(spec.reference(*_upcast(args, torch.float32)))

    def check(self, result: Any) -> tuple[float, bool]:
        """The largest error as a multiple of the reference's (0 if that is exact), and whether all are tolerated."""
        ratio, correct = 0.0, True
        for out, reference, exact in zip(_tensors(result), self.reference, self.exact, strict=True):
            error, reference_error = (
                float((t.to(exact.dtype) - exact).abs().max()) for t in (out, reference)
            )
            correct = correct and math.isfinite(error) and error <= allowed_error(reference, exact)
            ratio = max(ratio, error / reference_error if reference_error else 0.0)
        return ratio, correct


def _upcast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def make_inputs(timing: Timing, case: Case, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Inputs to use in turn: with what the calls write, several times the cache."""
    return [case.inputs(dtype, timing.device) for _ in range(input_count(case.nbytes(dtype), timing.device))]


def input_count(nbytes: int, device: torch.device) -> int:
    """How many inputs a call of so many bytes of traffic needs, so that it finds none of them in the L2 cache."""
    cache = l2_bytes(device)
    return 1 if cache is None else math.ceil(_TIMES_CACHE * cache / nbytes)


def l2_bytes(device: torch.device) -> int | None:
    """A GPU's L2 cache; None for the CPU."""
    if device.type != "cuda":
        return None
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size


def clone_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of tensors with the same strides, for operators that write into their arguments."""
    return tuple(_clone(a) if isinstance(a, Tensor) else a for a in args)


def _clone(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def compile_ahead(timing: Timing, requests: Sequence[aot.Request]) -> None:
    """Compile everything into Triton's cache, with one process for each core and in at most half of the time."""
    if timing.device.type != "cuda":
        return
    attempts = aot.attempts(requests, processes=os.cpu_count() or 1, seconds=timing.seconds / 2)
    for request, attempt in zip(requests, attempts, strict=True):
        if isinstance(attempt, str):
            _log.info("%s %s: %s", request.op, request.trial or "", attempt[:200])


@contextmanager
def hang_watchdog(timing: Timing, seconds: float = HANG_SECONDS) -> Iterator[None]:
    """End the process if this block takes longer, because a kernel hangs. The next run resumes after that kernel."""
    if timing.device.type == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def gpu_is_alive(device: torch.device) -> bool:
    """Whether the GPU still works in this process: after an illegal memory access it does not."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        _log.error("%s", str(error)[:300])
        return False
    return True


def run_metadata(timing: Timing) -> dict[str, Any]:
    """The metadata of a result: the machine, the GPU's state, digests of the kernels' sources, and the command."""
    return {
        **describe_machine(),
        **gpu_state(timing),
        "sources": sources_digest(),
        "tuned": tuned_digest(),
        "command": command(),
    }


def gpu_state(timing: Timing) -> dict[str, Any]:
    """Present driver, clocks, power and temperature of the timed GPU; empty without NVML."""
    nvml = open_nvml(timing.device)
    return {} if nvml is None else {"driver": nvml.driver(), **nvml.state()}


def sources_digest() -> str:
    """Digest of the kernels and of how they are timed, which works without a repository too."""
    files = [*KERNELS_FOLDER.glob("*.py"), *Path(__file__).parent.glob("kernel*.py")]
    return digest_of_files(sorted(files), KERNELS_FOLDER.parent)[:16]


def read_resumable(path: Path, machine: dict[str, Any], *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read an earlier run's file, if its times can be compared with those of this run.

    GPU, driver, CUDA, versions and sources have to be the same. A driver that NVML did not report in one of the runs
    is not compared.

    Args:
        more: further fields of the machine that have to be the same.

    Returns:
        The content of the file, empty if it is not to be continued; and `machine`, with the earlier run's driver if
        NVML reported none in this one.
    """
    if not path.exists():
        return {}, machine
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before = earlier["machine"]
    drivers = {run["driver"] for run in (before, machine) if run.get("driver") is not None}
    keys = ("gpu", "cuda", "versions", "sources", *more)
    if len(drivers) > 1 or any(before.get(key) != machine.get(key) for key in keys):
        return {}, machine
    return earlier, {**machine, "driver": next(iter(drivers), None)}


def gpu_slug(machine: Mapping[str, Any]) -> str:
    """The GPU's name in a form for file names."""
    return re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu", "cpu")).lower()).strip("-")
