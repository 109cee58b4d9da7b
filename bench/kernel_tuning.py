"""Find the block sizes, and the variant, that are quickest on this GPU.

    latentrt kernels --tune        writes kernels/tuned/sm_NN.json, and every time to out/kernels/tuning-GPU.json

Each candidate of each tuning table is compiled ahead, compared with float64 at every case that reads the table, and
timed there in bfloat16, one after another and maybe in several runs, at the clocks of that minute. The best few of
each key are then timed again, interleaved, and the choice is by these times. Times are saved one by one: a second run
goes on where the first stopped, and passes over what never came back. Where several never came back together, they are
timed one by one. A table whose candidates are timed, but not yet interleaved when the time ends, is written all the
same.
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

_FINALISTS = 4
_FINAL_SECONDS = 0.25
"""Of replays, for each of the best candidates at one case."""
_ONE_OF_THEM = "one of several that never came back together"
"""Written when they begin in turn: if it is still there, each is timed by itself."""

Trials = dict[str, dict[str, float | str]]
"""Candidate -> case -> microseconds of its calls in one forward, or what went wrong."""


def tune(timing: Timing, operators: Sequence[OpSpec] | None = None, save: bool = True) -> dict[str, Any]:
    """Time every candidate of every tuning table at the cases that read it; write the quickest.

    A table is written when all its cases were timed: what is good for one of them may be bad for the rest. Until the
    best few were interleaved at all of them, it is left too.

    Returns:
        {"machine": ..., "best": {table: {key: constants}}, "times": {table: {key: {candidate: {case: microseconds
        in one forward, or what went wrong}}}}, "finals": the same of the best candidates, interleaved, "left": tables
        that are not written or whose best candidates are not all interleaved}.
    """
    end = time.monotonic() + timing.seconds
    arch = arch_of(timing.device)
    machine = here(timing)
    path = timing.folder / f"tuning-{slug(machine)}.json"
    earlier = read_if_same(path, machine)
    if earlier and machine.get("driver") is None:  # NVML did not report it this time
        machine["driver"] = earlier["machine"].get("driver")
    times: dict[str, dict[str, Trials]] = earlier.get("times", {})
    finals: dict[str, dict[str, Trials]] = earlier.get("finals", {})
    tables = _tables(specs() if operators is None else operators, arch)
    result: dict[str, Any] = {"machine": machine, "best": {}, "times": times, "finals": finals}
    result["left"] = list(tables)

    def write() -> None:
        write_json(path, result)

    compile_ahead(timing, _requests(tables, arch))
    for table, uses in tables.items():
        trials, rows = times.setdefault(table, {}), finals.setdefault(table, {})
        if not all(_try(timing, use, table, trials.setdefault(use.key, {}), write, end) for use in uses):
            if not answers(timing):
                return result
            continue  # the time is up, but an earlier run may have timed all of the next
        keys = dict.fromkeys(use.key for use in uses)
        for key in keys:
            best_few = _ranked(trials[key], _cases(trials[key]))[:_FINALISTS]
            # An earlier run may have seen fewer cases, and so have had another best few.
            if key not in rows or rows[key].keys() != set(best_few):
                rows[key] = {name: {} for name in best_few}
        interleaved = all(_try_together(timing, use, table, rows[use.key], write, end) for use in uses)
        if not interleaved and not answers(timing):
            return result
        best = {key: found for key in keys if (found := _quickest(trials[key], rows[key]))}
        if len(best) < len(keys):
            _log.error("no candidate of %s runs in all cases", table)
            continue
        result["best"][table] = best
        if interleaved:
            result["left"].remove(table)
        write()
        if save:
            kept = ("gpu", "cuda", "driver", "versions", "commit", "sources")
            tuning.save(arch, table, best, {key: machine.get(key) for key in kept})
    return result


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What was chosen, briefly."""
    for table, best in result["best"].items():
        for key, constants in best.items():
            name = json.dumps(constants)
            times, finals = (result[kind][table][key] for kind in ("times", "finals"))
            for other, why in _failures(finals).items():
                yield f"{table} {key}: passed over {other}: {why}"
            row = finals[name] if name in _ranked(finals, _cases(times)) else times[name]
            alone = ", its rivals not yet timed in turn" if table in result["left"] else ""
            yield f"{table} {key}: {name}, {sum(row.values()):.1f} us in one forward{alone}"
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


def _try_together(
    timing: Timing, use: _Use, table: str, rows: Trials, save: Callable[[], None], end: float
) -> bool:
    """Fill in the times of the best candidates at one case, replayed in turn so that a change of clocks meets all of
    them; False where time ran out or the GPU was lost. Those that never came back together are timed one by one."""
    failed = {name for name, why in _failures(rows).items() if why != _ONE_OF_THEM}
    alive = [name for name in rows if name not in failed]
    untimed = [name for name in alive if not isinstance(rows[name].get(use.name), float)]
    suspected = any(use.name in rows[name] for name in untimed)
    if not untimed or (len(alive) < 2 and not suspected):
        return True
    inputs: list[tuple[Any, ...]] = []
    for names in [[name] for name in untimed] if suspected else [untimed]:
        if time.monotonic() > end:
            return False
        inputs = inputs or draw(timing, use.case, DTYPE)
        calls = {name: _with(table, json.loads(name), use.spec) for name in names}
        before = {name: dict(rows[name]) for name in names}
        for name in names:
            rows[name][use.name] = _ONE_OF_THEM if len(names) > 1 else LOST
        save()
        try:
            with watched(timing, HANG):
                found = timing.timer(calls, inputs, _FINAL_SECONDS)
        except KeyboardInterrupt:  # they would have come back
            rows.update(before)
            save()
            raise
        except Exception as error:  # an illegal access is reported where the results are waited for
            why = f"{type(error).__name__}: {error}"[:200]
            found = {name: why if len(names) == 1 else _ONE_OF_THEM for name in names}
        lost = any(isinstance(us, str) for us in found.values()) and not answers(timing)
        if lost and len(names) > 1:  # after the first of them all others fail too
            found = dict.fromkeys(names, _ONE_OF_THEM)
        for name, us in found.items():
            rows[name][use.name] = us if isinstance(us, str) else us * max(1, use.case.calls)
        _log.info("%s %s: %s", table, use.name, found)
        save()
        if lost:
            return False
        if _ONE_OF_THEM in found.values():
            return _try_together(timing, use, table, rows, save, end)
    return True


def _with(table: str, candidate: Mapping[str, int], spec: OpSpec) -> Callable[..., Any]:
    """The operator with a candidate's constants, which matter only while it is recorded."""

    def call(*args: Any) -> Any:
        with tuning.trying(table, candidate):
            return spec.op(*args)

    return call


def _hopeless(row: Mapping[str, float | str], trials: Trials) -> bool:
    """Whether it failed at another case, or took more than twice as long there as the quickest."""
    for case, us in row.items():
        others = [other for t in trials.values() if isinstance(other := t.get(case), float)]
        if isinstance(us, str) or us > 2 * min(others):
            return True
    return False


def _cases(trials: Trials) -> set[str]:
    return {case for row in trials.values() for case in row}


def _failures(finals: Trials) -> dict[str, str]:
    """Of the best candidates those that failed or never came back at a case, and how."""
    return {name: us for name, row in finals.items() for us in row.values() if isinstance(us, str)}


def _ranked(trials: Trials, cases: set[str]) -> list[str]:
    """Candidates that ran in all of these cases, by their times in all of them together."""
    sums = {
        name: sum(us for us in row.values() if isinstance(us, float))
        for name, row in trials.items()
        if row.keys() == cases and all(isinstance(us, float) for us in row.values())
    }
    return sorted(sums, key=sums.__getitem__)


def _quickest(trials: Trials, finals: Trials) -> Mapping[str, int] | None:
    """By the interleaved times where they are of all cases, never one that failed there; None where no candidate ran in
    all cases."""
    cases, failed = _cases(trials), _failures(finals)
    ranked = _ranked(finals, cases) or [name for name in _ranked(trials, cases) if name not in failed]
    found: Mapping[str, int] | None = json.loads(ranked[0]) if ranked else None
    return found
