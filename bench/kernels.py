"""Time each operator's kernels on a GPU beside PyTorch's own.

    latentrt kernels --measure     writes out/kernels/kernels-GPU.json

A kernel is timed only after its result was checked against float64. The calls that are compared are recorded into CUDA
graphs. A graph's calls use different inputs and outputs in turn, several times the L2 cache together, so that each call
reads from memory. The graphs are queued while the GPU is still busy and last a millisecond at least, so that the host's
time does not count. They are replayed in turn, so that a change of clocks affects all of them alike, and another one
is the first each time. The ceilings are timed in the same way.

A rate in GB/s counts every input and output at least once. Group norm reads its input twice: for the statistics, and
to apply them. What of it exceeds the GPU's L2 cache is counted twice: counted once, a perfect kernel of two passes
would reach 67 % of the copy bandwidth on a large tensor.

Time on a GPU is short. So everything that Triton compiles is compiled first, with one process for each core; cases that
take the largest part of a forward come first; every row is saved at once; after the time limit nothing new is started;
and another run resumes where the last one stopped, after a kernel that hung or lost the GPU.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from ..errors import BackendUnavailableError
from ..kernels import aot
from ..kernels._dispatch import arch_of
from ..kernels._triton import counted, of_library
from ..kernels.atomic_file import write_json
from ..kernels.registry import Case, OpSpec, specs
from ..runtime.place import dtype_name
from .kernel_timing import (
    HUNG,
    Float64Check,
    Timing,
    clone_args,
    compile_ahead,
    gpu_is_alive,
    gpu_slug,
    gpu_state,
    hang_watchdog,
    l2_bytes,
    make_inputs,
    read_resumable,
    run_metadata,
)

__all__ = ["ceilings", "dry_run", "failures", "lines", "measure", "measured_requests"]

_log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16)
_COMPILED = "; compiled"
_MAX_LISTED = 3
"""Failed cases in a message; the file has all of them."""


def ceilings(timing: Timing) -> dict[str, float]:
    """What the GPU reaches now: TFLOP/s of an 8192^3 matmul in each half type, and TB/s (read and written) of a copy.

    The inputs are random numbers, since zeros would be faster.
    """
    n = 8192 if timing.device.type == "cuda" else 32
    reached = {}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(n, n, device=timing.device).to(dtype) for _ in range(2))
        reached[dtype_name(dtype)] = 2e-6 * n**3 / _one(timing.timer({"": torch.mm}, [(a, b)] * 4, 0.5))
    a = torch.randn(n * 4, n * 4, dtype=torch.bfloat16, device=timing.device)
    reached["copy"] = 2e-6 * a.nbytes / _one(timing.timer({"": torch.Tensor.clone}, [(a,)], 0.5))
    return reached


def _one(times: Mapping[str, float | str]) -> float:
    (us,) = times.values()
    if isinstance(us, str):
        raise BackendUnavailableError(f"the GPU's ceilings cannot be measured: {us}")
    return us


def measure(
    timing: Timing,
    operators: Sequence[OpSpec] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> dict[str, Any]:
    """Measure every operator at every case: correctness, time, rate, share of the ceiling, and PyTorch's own times.

    Args:
        timing: where, how, and for how long; results go to `kernels-GPU.json` in its folder.
        operators: all if None.
        dtypes: to run, in this order.

    Returns:
        What was written; "left" lists the cases that there was no time for. A row with "lost" ended the run, since the
        GPU was lost with it.
    """
    started = time.monotonic()
    machine = run_metadata(timing)
    path = timing.folder / f"kernels-{gpu_slug(machine)}.json"
    earlier, machine = read_resumable(path, machine, "tuned")
    # A case that failed is measured again, unless it ended the run.
    rows = [row for row in earlier.get("rows", []) if "us" in row or "lost" in row or row["error"] == HUNG]
    done = {(row["op"], row["case"], row["dtype"]) for row in rows}
    operators = specs() if operators is None else operators
    todo = [
        (spec, case, dtype)
        for dtype in dtypes
        for spec in operators
        for case in spec.cases
        if (spec.name, case.name, dtype_name(dtype)) not in done
    ]
    compile_ahead(timing, measured_requests(operators, arch_of(timing.device), dtypes))
    ceilings(timing)  # to get the clocks up
    limits = ceilings(timing)
    todo.sort(key=lambda item: (dtypes.index(item[2]), -_floor_us(item[1], item[2], limits)))
    left = [[spec.name, case.name, dtype_name(dtype)] for spec, case, dtype in todo]
    cache = l2_bytes(timing.device)
    result: dict[str, Any] = {
        "machine": machine,
        "ceilings": limits,
        "cache": cache,
        "rows": rows,
        "left": left,
    }
    for spec, case, dtype in todo:
        if time.monotonic() - started > timing.seconds:
            break
        row = {"op": spec.name, "case": case.name, "dtype": dtype_name(dtype), "calls": case.calls}
        rows.append({**row, "error": HUNG})
        del left[0]
        write_json(path, result)
        try:
            rows[-1] = _row(timing, spec, case, dtype, row, limits, cache or math.inf)
        except KeyboardInterrupt:  # it did not hang: the next run measures it again
            left.insert(0, [spec.name, case.name, dtype_name(dtype)])
            write_json(path, {**result, "rows": rows[:-1]})
            raise
        if lost := "error" in rows[-1] and not gpu_is_alive(timing.device):
            rows[-1]["lost"] = True
        _log.info("%s", rows[-1])
        write_json(path, result)
        if lost:
            _log.error("the GPU answers no more; run this again to go on")
            return result
    result["ceilings_after"], result["machine_after"] = ceilings(timing), gpu_state(timing)
    write_json(path, result)
    return result


def measured_requests(
    operators: Sequence[OpSpec], arch: int, dtypes: Sequence[torch.dtype] = DTYPES
) -> list[aot.Request]:
    """What Triton compiles for `measure`."""
    meta = torch.device("meta")
    return [
        aot.Request(spec.name, case.inputs(dtype, meta), arch)
        for dtype in dtypes
        for spec in operators
        for case in spec.cases
    ]


def dry_run(requests: Sequence[aot.Request], seconds: float) -> list[dict[str, Any]]:
    """Compile what a run on a GPU would need, without a GPU: each request's compiled kernels, or the error."""
    attempts = aot.attempts(requests, processes=os.cpu_count() or 1, seconds=seconds)
    return [
        {
            "op": request.op,
            "trial": request.trial,
            **(
                {"error": attempt}
                if isinstance(attempt, str)
                else {"kernels": [asdict(kernel) for kernel in attempt]}
            ),
        }
        for request, attempt in zip(requests, attempts, strict=True)
    ]


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What `measure` returns, as a short table."""
    yield f"{'':58}{'us':>10}{'rate':>13}{'share':>7}{'against PyTorch':>17}  best of its own"
    for row in result["rows"]:
        name = f"{row['op']}, {row['case']}, {row['dtype']}"
        if "us" not in row:
            yield f"{name:58}  {row['error']}"
            continue
        baselines = {baseline: us for baseline, us in row["baselines"].items() if isinstance(us, float)}
        best = min(baselines, key=baselines.__getitem__, default="")
        speedup = f"{row['speedup_over_best']:.2f}x" if baselines else "-"
        figures = f"{row['us']:>10.1f}{_rate(row):>13}{row['share']:>7.0%}{speedup:>17}"
        ours = "; by PyTorch's libraries" if any(map(of_library, row["launches"])) else ""
        yield f"{name:58}{figures}  {best}{ours}".rstrip()
    limits = result["ceilings"]
    matmul = ", ".join(f"{limits[name]:.0f} TFLOP/s in {name}" for name in limits if name != "copy")
    yield f"shares of what this run measured: matmuls {matmul}; copies {limits['copy'] * 1e3:.0f} GB/s"
    yield f"{len(result['left'])} left"


def failures(result: Mapping[str, Any]) -> str:
    """Which cases in what `measure` returns have no time, and why; empty if all that were started have one."""
    rows = result["rows"]
    failed = [
        f"{row['op']}, {row['case']}, {row['dtype']}: {row['error']}" for row in rows if "us" not in row
    ]
    if not failed:
        return ""
    more = [f"and {len(failed) - _MAX_LISTED} more"] if len(failed) > _MAX_LISTED else []
    return f"{len(failed)} of {len(rows)} without a time: {'; '.join([*failed[:_MAX_LISTED], *more])}"


def _rate(row: Mapping[str, Any]) -> str:
    return f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else f"{row['tbs'] * 1e3:.0f} GB/s"


def _floor_us(case: Case, dtype: torch.dtype, limits: Mapping[str, float]) -> float:
    """The least microseconds that one forward spends in this case's calls, by the measured ceilings."""
    compute, traffic = case.flops / limits[dtype_name(dtype)], case.nbytes(dtype) / limits["copy"]
    return case.calls * max(compute, traffic) * 1e-6


def _row(
    timing: Timing,
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    row: dict[str, Any],
    limits: Mapping[str, float],
    cache: float,
) -> dict[str, Any]:
    try:
        inputs = make_inputs(timing, case, dtype)
        with hang_watchdog(timing), counted() as launches:
            out = spec.op(*clone_args(inputs[0]))
        row["launches"] = dict(launches)
        if not launches:
            return {**row, "error": "neither a kernel of ours ran nor the libraries in its place"}
        with hang_watchdog(timing):
            row["error_over_reference"], row["correct"] = Float64Check(spec, inputs[0]).check(out)
        if not row["correct"]:
            return {**row, "error": "wrong result"}
        del out
        baselines = _baselines(timing, spec)
        own = {name: [prepare(*args) for args in inputs] for name, prepare in spec.baseline_inputs.items()}
        sets = {name: own.get(name.removesuffix(_COMPILED), inputs) for name in baselines}
        # Compile the baselines first, so that the watchdog below counts only their run time.
        for name, call in baselines.items():
            with hang_watchdog(timing), suppress(Exception):
                call(*clone_args(sets[name][0]))
        calls = {name: _by_index(call, sets[name]) for name, call in baselines.items()}
        with hang_watchdog(timing):
            times = timing.timer(
                {"ours": _by_index(spec.op, inputs), **calls}, [(i,) for i in range(len(inputs))], 0.25
            )
    except Exception as error:  # only this case fails; the others are still measured
        return {**row, "error": f"{type(error).__name__}: {error}"[:300]}
    us = times.pop("ours")
    row["baselines"] = times
    if isinstance(us, str):
        return {**row, "error": us}
    row["us"] = us
    row["tflops"] = case.flops / us * 1e-6
    row["bytes"] = case.nbytes(dtype, cache)
    row["tbs"] = row["bytes"] / us * 1e-6
    by_compute = spec.limit == "matmul"
    row["ceiling"] = limits[dtype_name(dtype)] if by_compute else limits["copy"]
    row["share"] = (row["tflops"] if by_compute else row["tbs"]) / row["ceiling"]
    baseline_us = [t for t in times.values() if isinstance(t, float)]
    row["speedup_over_best"] = min(baseline_us) / us if baseline_us else None
    return row


def _by_index(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[int], Any]:
    """So that calls whose arguments differ can be timed over the same inputs."""
    return lambda index: call(*sets[index])


def _baselines(timing: Timing, spec: OpSpec) -> dict[str, Callable[..., Any]]:
    """PyTorch's own implementations; those of several operators also compiled."""
    baselines = dict(spec.baselines)
    if timing.device.type == "cuda":
        # Without this, dynamo silently stops compiling after a few shapes of one function.
        torch._dynamo.reset()
        eager = {name: call for name, call in baselines.items() if not name.startswith("SDPA")}
        baselines |= {
            f"{name}{_COMPILED}": torch.compile(call, dynamic=False) for name, call in eager.items()
        }
    return baselines
