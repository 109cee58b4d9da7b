"""Results of a benchmark with known figures in them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from latentrt.bench.cases import Case
from latentrt.bench.gates import Quality
from latentrt.bench.results import BatchFigures, CaseResult, Memory, Report, Row
from latentrt.bench.stats import ratio

MACHINE = {
    "processor": "a",
    "cores": 2,
    "threads": 2,
    "memory_gib": 8,
    "versions": {"torch": "2"},
    "commit": "c",
}


def noisy(median: float, count: int = 15, seed: int = 0) -> list[float]:
    return list(median * np.random.default_rng(seed).normal(1, 0.01, count))


def row(side: str, seconds: list[float], base: list[float], peak: float = 5e8, **fields: Any) -> Row:
    memory = Memory(
        {"resident": peak},
        {"base": {"resident": peak}},
        {"seconds": [0.0, 1.0], "resident": [1e8, peak]},
        [],
        {"resident": 1e8},
        {"resident": 0.0},
    )
    figures = BatchFigures(
        batch=1,
        seconds=seconds,
        speedup=ratio(base, seconds),
        images_per_second=1 / float(np.median(seconds)),
        stages={"text": 0.1, "base": 0.6, "base_step": 0.02, "decode": 0.1},
        psnr=120.0,
        ssim=1.0,
        memory=memory,
        joules_per_image=None,
        busy_elsewhere=[0.0],
        gpu=[],
        beside=base,
    )
    whole = Row(
        side, "float32", "as it is", "measured", "", False, 30.0, 10.0, Quality(4, 120.0, 1.0), [figures]
    )
    return replace(whole, **fields)


def report(
    ours: float = 1.0,
    theirs: float = 2.0,
    *,
    machine: dict[str, Any] = MACHINE,
    seed: int = 0,
    rounds: int = 15,
    **fields: Any,
) -> Report:
    """diffusers in `theirs` seconds and latentrt in `ours`, with 1 % of noise; `fields` are of latentrt's row."""
    base, fast = noisy(theirs, rounds, seed), noisy(ours, rounds, seed + 1)
    rows = [row("diffusers", base, base), row("latentrt-eager", fast, base, **fields)]
    case = Case("demo", "the <demo>", "demo")
    groups = [[each.side for each in rows]]
    result = CaseResult(asdict(case), {"base": 30}, "eager", "diffusers", rows, groups=groups)
    return Report("latentrt bench", machine, 0, [result])


def with_figures(made: Report, **figures: Any) -> Report:
    """The same with other figures in latentrt's row; of `memory`, fields by name."""
    case = made.cases[0]
    batch = case.rows[1].batches[0]
    if "memory" in figures and batch.memory is not None and figures["memory"] is not None:
        figures["memory"] = replace(batch.memory, **figures["memory"])
    rows = [case.rows[0], replace(case.rows[1], batches=[replace(batch, **figures)])]
    return replace(made, cases=[replace(case, rows=rows)])
