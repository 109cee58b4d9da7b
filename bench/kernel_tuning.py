"""Find the block sizes, and the variant, that are quickest on this GPU.

    latentrt kernels --tune        writes kernels/tuned/sm_NN.json, and every time to out/kernels/tuning-GPU.json

Each candidate of each tuning table is compiled ahead, held against float64 at every case that reads the table, and
timed there in bfloat16. Times are saved one by one: a second run goes on where the first stopped, and passes over
what never came back.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels import aot, tuning
from ..kernels._triton import arch_of
from ..kernels.atomic_file import write_json
from ..kernels.registry import Case, OpSpec, specs
from .kernel_timing import (
    LOST,
    Float64Check,
    Timing,
    answers,
    compile_ahead,
    draw,
    fresh,
    here,
    read_if_same,
    slug,
    sources,
    watched,
)

__all__ = ["lines", "take_tuned", "tune", "tuned_requests"]

_log = logging.getLogger(__name__)

DTYPE = torch.bfloat16
SECONDS = 0.08
"""Of replays, for one candidate at one case."""
HANG = 30.0
"""Seconds after which a candidate is given up; what it compiles to is there by then."""

Trials = dict[str, dict[str, float | str]]
"""Candidate -> case -> microseconds of its calls in one forward, or what went wrong."""


def tune(timing: Timing, operators: Sequence[OpSpec] | None = None, save: bool = True) -> dict[str, Any]:
    """Time every candidate of every tuning table at the cases that read it; write the quickest.

    A table is written when all its cases were timed: what is good for one of them may be bad for the rest.

    Returns:
        {"machine": ..., "best": {table: {key: constants}}, "times": {table: {key: {candidate: {case: microseconds
        in one forward, or what went wrong}}}}, "left": tables that are not written}.
    """
    end = time.monotonic() + timing.seconds
    arch = arch_of(timing.device)
    machine = here(timing)
    path = timing.folder / f"tuning-{slug(machine)}.json"
    times: dict[str, dict[str, Trials]] = read_if_same(path, machine).get("times", {})
    tables = _tables(specs() if operators is None else operators, arch)
    result: dict[str, Any] = {"machine": machine, "best": {}, "times": times, "left": list(tables)}
    compile_ahead(timing, _requests(tables, arch))
    for table, uses in tables.items():
        for use in uses:
            trials = times.setdefault(table, {}).setdefault(use.key, {})
            if not _try(timing, use, table, trials, lambda: write_json(path, result), end):
                return result
        best = {key: found for key, trials in times[table].items() if (found := _quickest(trials))}
        if len(best) < len(times[table]):
            _log.error("no candidate of %s runs in all cases", table)
            continue
        result["best"][table] = best
        result["left"].remove(table)
        write_json(path, result)
        if save:
            kept = ("gpu", "cuda", "driver", "versions", "commit", "sources")
            tuning.save(arch, table, best, {key: machine.get(key) for key in kept})
    return result


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What was chosen, briefly."""
    for table, best in result["best"].items():
        for key, constants in best.items():
            row = result["times"][table][key][json.dumps(constants)]
            yield f"{table} {key}: {json.dumps(constants)}, {sum(row.values()):.1f} us in one forward"
    yield f"left: {', '.join(result['left']) or 'none'}"


def take_tuned(folder: Path) -> list[str]:
    """Put the block sizes that an earlier run of these sources measured where kernels read them, which may be as they
    were before it.

    Args:
        folder: of files such as kernels/tuned has; one that is not there, torn, or of another form counts for nothing.

    Returns:
        The tables that were changed, each with its architecture.
    """
    taken = []
    for arch in tuning.architectures():
        try:
            theirs = json.loads((folder / f"sm_{arch}.json").read_text(encoding="utf-8"))
            found = [
                (table, measured, {key: theirs["tables"][table][key] for key in measured["keys"]})
                for table, measured in theirs["measured_on"].items()
                if measured["sources"] == sources()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        ours = tuning.load(arch)["measured_on"]
        for table, measured, rows in found:
            if measured != ours.get(table):
                tuning.save(
                    arch, table, rows, {name: value for name, value in measured.items() if name != "keys"}
                )
                taken.append(f"{table} of sm_{arch}")
    return taken


@dataclass(frozen=True)
class _Use:
    """A case that reads a tuning table."""

    spec: OpSpec
    case: Case
    key: str
    candidates: Sequence[Mapping[str, int]]

    @property
    def name(self) -> str:
        return f"{self.spec.name}, {self.case.name}"


def _tables(operators: Sequence[OpSpec], arch: int) -> dict[str, list[_Use]]:
    """Who reads each table, found by planning; several operators may read one."""
    tables: dict[str, list[_Use]] = {}
    for spec in operators:
        for table, candidates in spec.candidates.items():
            for case in spec.cases:
                with tuning.trying(table, candidates[0]) as keys:
                    spec.plan(*case.inputs(DTYPE, torch.device("meta")), arch=arch)
                for key in keys:
                    tables.setdefault(table, []).append(_Use(spec, case, key, candidates))
    return tables


def tuned_requests(operators: Sequence[OpSpec], arch: int) -> list[aot.Request]:
    """What `tune` will have Triton compile."""
    return _requests(_tables(operators, arch), arch)


def _requests(tables: Mapping[str, Sequence[_Use]], arch: int) -> list[aot.Request]:
    meta = torch.device("meta")
    return [
        aot.Request(use.spec.name, use.case.inputs(DTYPE, meta), arch, (table, candidate))
        for table, uses in tables.items()
        for use in uses
        for candidate in use.candidates
    ]


def _try(timing: Timing, use: _Use, table: str, trials: Trials, save: Callable[[], None], end: float) -> bool:
    """Fill in each candidate's time at one case; False where time ran out or the GPU was lost."""
    inputs: list[tuple[Any, ...]] = []
    for candidate in use.candidates:
        row = trials.setdefault(json.dumps(candidate), {})
        if use.name in row or _hopeless(row, trials):
            continue
        if time.monotonic() > end:
            return False
        if not inputs:
            inputs = draw(timing, use.case, DTYPE)
            check = Float64Check(use.spec, inputs[0])
        row[use.name] = LOST
        save()
        try:
            with watched(timing, HANG), tuning.trying(table, candidate):
                row[use.name] = _time(timing, use, check, inputs)
        except KeyboardInterrupt:  # it would have come back
            del row[use.name]
            save()
            raise
        _log.info("%s %s %s: %s", table, candidate, use.name, row[use.name])
        save()
        if isinstance(row[use.name], str) and not answers(timing):
            return False
    return True


def _time(timing: Timing, use: _Use, check: Float64Check, inputs: Sequence[tuple[Any, ...]]) -> float | str:
    try:
        ratio, good = check.judge(use.spec.op(*fresh(inputs[0])))
        if not good:
            return f"wrong: the error is {ratio:.1f} times the reference's"
        (us,) = timing.timer({"": use.spec.op}, inputs, SECONDS).values()
    except Exception as error:  # too much shared memory, too many registers, a shape that cannot be
        return f"{type(error).__name__}: {error}"[:200]
    return us if isinstance(us, str) else us * max(1, use.case.calls)


def _hopeless(row: Mapping[str, float | str], trials: Trials) -> bool:
    """Whether it failed at another case, or took more than twice as long there as the quickest."""
    for case, us in row.items():
        others = [other for t in trials.values() if isinstance(other := t.get(case), float)]
        if isinstance(us, str) or us > 2 * min(others):
            return True
    return False


def _quickest(trials: Trials) -> Mapping[str, int] | None:
    """Over all cases together, of the candidates that ran in all; None where none did."""
    cases = {case for row in trials.values() for case in row}
    sums = {
        name: sum(us for us in row.values() if isinstance(us, float))
        for name, row in trials.items()
        if row.keys() == cases and all(isinstance(us, float) for us in row.values())
    }
    found: Mapping[str, int] | None = json.loads(min(sums, key=sums.__getitem__)) if sums else None
    return found
