"""Time each operator's kernels on a GPU beside PyTorch's own, and find their block sizes.

    latentrt kernels --measure     writes bench/results/kernels-GPU.json
    latentrt kernels --tune        writes kernels/tuned/sm_NN.json

A kernel is timed only after its result was held against float64. Calls are recorded into a CUDA graph over
inputs that together exceed the cache, so that neither the host nor the cache flatters a time. Both commands
save after each step and go on where an earlier run of the same commit stopped.
"""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..kernels import tuning
from ..kernels._triton import arch_of, counted
from ..kernels.registry import Case, OpSpec, specs
from .machine import describe_machine

__all__ = ["Bench", "ceilings", "cuda_microseconds", "measure", "require_gpu", "tune"]

log = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 256 << 20
"""Inputs of one timing together, so that none is still in the cache when its turn comes again."""
CALLS = 16
"""At most, in one recorded graph."""

Timer = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], float]
"""Microseconds of a call, given what to call it with in turn."""


@dataclass(frozen=True)
class Bench:
    """Where and how to time."""

    device: torch.device
    timer: Timer
    seconds: float = 400.0
    """After this much nothing new is begun."""


def require_gpu() -> torch.device:
    """The current CUDA device.

    Raises:
        BackendUnavailableError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError("kernels are timed on a CUDA GPU, and PyTorch sees none here")
    return torch.device("cuda", torch.cuda.current_device())


def cuda_microseconds(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    """Median over replays of a graph of calls on each of `inputs` in turn."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for args in [*inputs[:1], *inputs]:
            call(*args)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for args in inputs:
            call(*args)
    times: list[float] = []
    end = time.monotonic() + 0.25
    while len(times) < 7 or (time.monotonic() < end and len(times) < 200):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(inputs))
    return statistics.median(times[1:])


def ceilings(bench: Bench) -> dict[str, float]:
    """TFLOP/s of an 8192^3 matrix product in each half type, TB/s of a copy (read and written), now."""
    n = 8192 if bench.device.type == "cuda" else 32
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2e-6 * n**3 / bench.timer(torch.mm, [(a, b)] * 4)
    a = torch.empty(n * n * 16, dtype=torch.bfloat16, device=bench.device)
    found["copy"] = 2e-6 * a.nbytes / bench.timer(torch.Tensor.clone, [(a,)] * 2)
    return found


def measure(
    bench: Bench,
    path: Path | None = None,
    operators: Sequence[OpSpec] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
) -> dict[str, Any]:
    """Every operator at every case: correct or not, time, rate, share of the ceiling, PyTorch's own times.

    Args:
        bench: where, how, for how long.
        path: the JSON file to write and to go on from; bench/results/kernels-GPU.json where None.
        operators: all where None.
        dtypes: to run.

    Returns:
        What was written; "left" lists what the time did not allow.
    """
    started = time.monotonic()
    machine = describe_machine()
    path = path or RESULTS / f"kernels-{_slug(machine.get('gpu', 'cpu'))}.json"
    rows: list[dict[str, Any]] = []
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = all(earlier["machine"].get(key) == machine.get(key) for key in ("gpu", "commit", "versions"))
        rows = earlier["rows"] if same else []
    done = {(row["op"], row["case"], row["dtype"]) for row in rows}
    result: dict[str, Any] = {"machine": machine, "ceilings": ceilings(bench), "rows": rows, "left": []}
    todo = [
        (spec, case, dtype)
        for dtype in dtypes
        for spec in (specs() if operators is None else operators)
        for case in spec.cases
        if (spec.name, case.name, _name(dtype)) not in done
    ]
    for spec, case, dtype in todo:
        if time.monotonic() - started > bench.seconds:
            result["left"].append([spec.name, case.name, _name(dtype)])
        else:
            rows.append(_row(bench, spec, case, dtype, result["ceilings"]))
            log.info("%s", rows[-1])
        _write(path, result)
    return result


def _row(
    bench: Bench, spec: OpSpec, case: Case, dtype: torch.dtype, limits: Mapping[str, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {"op": spec.name, "case": case.name, "dtype": _name(dtype), "calls": case.calls}
    try:
        inputs = _inputs(bench, case, dtype)
        with counted() as launches:
            out = spec.op(*_fresh(inputs[0]))
        row["launches"] = dict(launches)
        if not launches:
            return {**row, "error": "no kernel of ours ran"}
        row["error_over_reference"], row["correct"] = _gate(spec, inputs[0], out)
        if not row["correct"]:
            return row
        us = bench.timer(spec.op, inputs)
    except Exception as error:  # of one operator: the others are still to be timed
        return {**row, "error": str(error)[:300]}
    row["us"] = us
    row["tflops"] = case.flops / us * 1e-6
    row["tbs"] = case.elements * dtype.itemsize / us * 1e-6
    by_compute = spec.limit == "matmul"
    row["share"] = row["tflops"] / limits[_name(dtype)] if by_compute else row["tbs"] / limits["copy"]
    row["rivals"] = {}
    for name, rival in spec.rivals.items():
        try:
            row["rivals"][name] = bench.timer(rival, inputs)
        except Exception as error:
            row["rivals"][name] = f"{type(error).__name__}: {error}"[:200]
    times = [t for t in row["rivals"].values() if isinstance(t, float)]
    row["speedup_over_best"] = min(times) / us if times else None
    return row


def _inputs(bench: Bench, case: Case, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    size = case.elements * dtype.itemsize
    # Large ones flush the cache by themselves, and two calls still hide the start of the replay.
    count = min(CALLS, max(2, math.ceil(CACHE_BYTES / size))) if bench.device.type == "cuda" else 1
    return [case.inputs(dtype, bench.device) for _ in range(count)]


def _fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies with the same strides, for operators that write into their arguments."""
    return tuple(_copied(a) if isinstance(a, Tensor) else a for a in args)


def _copied(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _gate(spec: OpSpec, args: tuple[Any, ...], got: Any) -> tuple[float, bool]:
    """The largest error over the reference's, both against float64, and whether that is good enough:
    at most twice, or two units in the last place of the largest value. Where the reference is exact, 0."""
    usual = _tensors(spec.reference(*_fresh(args)))
    try:
        exact = _tensors(spec.reference(*_raised(args, torch.float64)))
    except torch.OutOfMemoryError:
        exact = _tensors(spec.reference(*_raised(args, torch.float32)))
    ratio, good = 0.0, True
    for ours, theirs, true in zip(_tensors(got), usual, exact, strict=True):
        error, allowed = (float((t.to(true.dtype) - true).abs().max()) for t in (ours, theirs))
        largest = float(true.abs().max())
        ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 0.0
        good = good and math.isfinite(error) and error <= max(2 * allowed, 2 * ulp)
        ratio = max(ratio, error / allowed if allowed else 0.0)
    return ratio, good


def _raised(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def tune(bench: Bench, operators: Sequence[OpSpec] | None = None, save: bool = True) -> dict[str, Any]:
    """Time every candidate of every tuning table at the cases that read it, in bfloat16; write the quickest.

    Returns:
        {table: {key: {"best": constants, "us": microseconds of all its calls in one forward}}}.
    """
    started = time.monotonic()
    arch = arch_of(bench.device)
    machine = describe_machine()
    measured_on = {key: machine.get(key) for key in ("gpu", "cuda", "versions", "commit")}
    found: dict[str, Any] = {}
    for spec in specs() if operators is None else operators:
        for table, candidates in spec.candidates.items():
            best: dict[str, Any] = {}
            for case in spec.cases:
                if time.monotonic() - started > bench.seconds:
                    log.warning("no time left for %s, %s", table, case.name)
                    continue
                _try_case(bench, spec, case, table, candidates, best)
            chosen = {key: _quickest(times) for key, times in best.items()}
            found[table] = chosen
            if save and chosen:
                tuning.save(arch, table, {key: row["best"] for key, row in chosen.items()}, measured_on)
    return found


def _try_case(
    bench: Bench,
    spec: OpSpec,
    case: Case,
    table: str,
    candidates: Sequence[Mapping[str, int]],
    best: dict[str, Any],
) -> None:
    """Add each candidate's time at this case, times the calls of one forward, to `best[key]`."""
    inputs = _inputs(bench, case, torch.bfloat16)
    for candidate in candidates:
        with tuning.trying(table, candidate) as keys:
            try:
                us = bench.timer(spec.op, inputs)
            except Exception as error:  # too much shared memory, too many registers, a shape that cannot be
                log.info("%s %s: %s", table, candidate, str(error)[:100])
                us = math.inf
        if not keys:
            return  # this case does not read the table
        for key in keys:
            times = best.setdefault(key, {})
            name = json.dumps(candidate)
            times[name] = times.get(name, 0.0) + us * max(1, case.calls)
            log.info("%s %s %s: %.1f us", table, key, name, us)


def _quickest(times: Mapping[str, float]) -> dict[str, Any]:
    name = min(times, key=lambda n: times[n])
    if not math.isfinite(times[name]):
        raise BackendUnavailableError(f"no candidate ran: {', '.join(times)}")
    return {"best": json.loads(name), "us": times[name]}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
