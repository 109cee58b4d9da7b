"""Find the block sizes and the kernel variants that are fastest on this GPU.

    latentrt kernels --tune        writes kernels/tuned/sm_NN.json, and every time to out/kernels/tuning-GPU.json

All candidates of all tuning tables are compiled first. Each is then compared with float64 at every case that reads its
table, and timed there in bfloat16. These times are taken one after another, maybe in several runs, while clocks change.
So the best few of each key are timed again, interleaved, and the fastest of them is chosen.

Every time is saved at once: another run resumes where the last one stopped, and skips candidates that hung. If several
were being timed together when one of them hung, each is timed by itself. A table is written as soon as all of its
candidates are timed, even if the time ends before the best of them are interleaved.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..kernels import tuning
from ..kernels._dispatch import arch_of
from ..kernels.atomic_file import write_json
from ..kernels.registry import OpSpec, specs
from .kernel_candidates import DTYPE, TableUse, table_uses, tuning_requests
from .kernel_timing import (
    HUNG,
    Float64Check,
    Timing,
    clone_args,
    compile_ahead,
    gpu_is_alive,
    gpu_slug,
    hang_watchdog,
    make_inputs,
    read_resumable,
    run_metadata,
    sources_digest,
)

__all__ = ["import_tuned", "lines", "tune"]

_log = logging.getLogger(__name__)

_TRIAL_SECONDS = 0.08
"""Time to replay each candidate at each case."""
HANG_SECONDS = 30.0
"""Seconds after which a candidate counts as hanging; it is compiled before."""

_FINALISTS = 4
"""How many of the best candidates of each key are timed again, interleaved."""
_FINAL_SECONDS = 0.25
"""Time to replay each finalist at each case."""
_HUNG_IN_GROUP = "one of several that never came back together"
"""Saved for finalists before they are timed in turn. If it is still there afterwards, each is timed by itself."""

Trials = dict[str, dict[str, float | str]]
"""Candidate -> case -> microseconds of its calls in one forward, or what went wrong."""


def tune(timing: Timing, operators: Sequence[OpSpec] | None = None, save: bool = True) -> dict[str, Any]:
    """Time every candidate of every tuning table at the cases that read it, and write the fastest ones.

    A table is written only when all of its cases are timed, since what is fast for one may be slow for the others.

    Args:
        save: write the tables to `kernels/tuned`.

    Returns:
        A dictionary with "machine"; "best": {table: {key: constants}}, where a key's fastest is no
        plain kernel also that of the fastest plain one; "times": {table: {key: {candidate: {case:
        microseconds in one forward, or what went wrong}}}}; "finals": the same for the best candidates, interleaved;
        "left": the tables that are not written yet, or whose best candidates are not interleaved at every case;
        "failed": those that are not written since a key has no candidate that runs in all cases.
    """
    end = time.monotonic() + timing.seconds
    arch = arch_of(timing.device)
    machine = run_metadata(timing)
    path = timing.folder / f"tuning-{gpu_slug(machine)}.json"
    earlier, machine = read_resumable(path, machine)
    times: dict[str, dict[str, Trials]] = earlier.get("times", {})
    finals: dict[str, dict[str, Trials]] = earlier.get("finals", {})
    tables = table_uses(specs() if operators is None else operators, arch)
    result: dict[str, Any] = {"machine": machine, "best": {}, "times": times, "finals": finals}
    result |= {"left": list(tables), "failed": []}

    def save_result() -> None:
        write_json(path, result)

    compile_ahead(timing, tuning_requests(tables, arch))
    for table, uses in tables.items():
        trials, rows = times.setdefault(table, {}), finals.setdefault(table, {})
        if not all(
            _time_candidates(timing, use, table, trials.setdefault(use.key, {}), save_result, end)
            for use in uses
        ):
            if not gpu_is_alive(timing.device):
                return result
            continue  # the time is up, but an earlier run may have timed all of the next table
        keys = dict.fromkeys(use.key for use in uses)
        for key in keys:
            best_few = _ranked(trials[key], _cases(trials[key]))[:_FINALISTS]
            # An earlier run with fewer cases may have had other finalists.
            if key not in rows or rows[key].keys() != set(best_few):
                rows[key] = {name: {} for name in best_few}
        interleaved = all(
            _time_finalists(timing, use, table, rows[use.key], save_result, end) for use in uses
        )
        if not interleaved and not gpu_is_alive(timing.device):
            return result
        best = {key: fastest for key in keys if (fastest := _fastest(trials[key], rows[key]))}
        if interleaved:
            result["left"].remove(table)
        if len(best) < len(keys):
            if interleaved:  # otherwise some of those that crashed together may still run by themselves
                result["failed"].append(table)
            save_result()
            continue
        for key in keys:
            if not tuning.is_plain(best[key]) and (
                plain := _fastest(trials[key], rows[key], tuning.is_plain)
            ):
                best[f"{key}{tuning.PLAIN}"] = plain
        result["best"][table] = best
        save_result()
        if save:
            fields = ("gpu", "cuda", "driver", "versions", "commit", "sources")
            tuning.save(arch, table, best, {field: machine.get(field) for field in fields})
    return result


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A short summary of what `tune` returns."""
    for table, best in result["best"].items():
        for key, constants in best.items():
            name, timed_key = json.dumps(constants), key.removesuffix(tuning.PLAIN)
            times, finals = (result[kind][table][timed_key] for kind in ("times", "finals"))
            for other, why in _failures(finals).items() if timed_key == key else ():
                yield f"{table} {key}: passed over {other}: {why}"
            row = finals[name] if name in _ranked(finals, _cases(times)) else times[name]
            alone = ", its rivals not yet timed in turn" if table in result["left"] else ""
            yield f"{table} {key}: {name}, {sum(row.values()):.1f} us in one forward{alone}"
    for table in result["failed"]:
        yield f"{table}: no candidate runs in all cases"
    yield f"left: {', '.join(result['left']) or 'none'}"


def import_tuned(folder: Path) -> list[str]:
    """Copy block sizes that an earlier run measured into `kernels/tuned`, if it ran with the same sources.

    Args:
        folder: with files like those of `kernels/tuned`. Missing, truncated and malformed files are ignored.

    Returns:
        The tables that were changed, each with its architecture.
    """
    imported = []
    for arch in tuning.architectures():
        try:
            content = json.loads((folder / f"sm_{arch}.json").read_text(encoding="utf-8"))
            entries = [
                (table, measured, {key: content["tables"][table][key] for key in measured["keys"]})
                for table, measured in content["measured_on"].items()
                if measured["sources"] == sources_digest()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        present = tuning.load(arch)["measured_on"]
        for table, measured, rows in entries:
            if measured != present.get(table):
                tuning.save(
                    arch, table, rows, {name: value for name, value in measured.items() if name != "keys"}
                )
                imported.append(f"{table} of sm_{arch}")
    return imported


def _time_candidates(
    timing: Timing, use: TableUse, table: str, trials: Trials, save: Callable[[], None], end: float
) -> bool:
    """Time each candidate at one case, if it is not timed yet. False if the time is up or the GPU is lost."""
    inputs: list[tuple[Any, ...]] = []
    for candidate in use.candidates:
        row = trials.setdefault(json.dumps(candidate), {})
        if use.name in row or _can_skip(row, trials):
            continue
        if time.monotonic() > end:
            return False
        if not inputs:
            inputs = make_inputs(timing, use.case, DTYPE)
            checker = Float64Check(use.spec, inputs[0])
        row[use.name] = HUNG
        save()
        try:
            with hang_watchdog(timing, HANG_SECONDS), tuning.trying(table, candidate):
                row[use.name] = _time_candidate(timing, use, checker, inputs)
        except KeyboardInterrupt:  # it did not hang: the next run times it again
            del row[use.name]
            save()
            raise
        _log.info("%s %s %s: %s", table, candidate, use.name, row[use.name])
        save()
        if isinstance(row[use.name], str) and not gpu_is_alive(timing.device):
            return False
    return True


def _time_candidate(
    timing: Timing, use: TableUse, checker: Float64Check, inputs: Sequence[tuple[Any, ...]]
) -> float | str:
    """Microseconds of a case's calls in one forward, or what went wrong."""
    try:
        ratio, correct = checker.check(use.spec.op(*clone_args(inputs[0])))
        if not correct:
            return f"wrong: the error is {ratio:.1f} times the reference's"
        (us,) = timing.timer({"": use.spec.op}, inputs, _TRIAL_SECONDS).values()
    except Exception as error:  # such as too much shared memory, too many registers, an impossible shape
        return f"{type(error).__name__}: {error}"[:200]
    return us if isinstance(us, str) else us * max(1, use.case.calls)


def _time_finalists(
    timing: Timing, use: TableUse, table: str, finals: Trials, save: Callable[[], None], end: float
) -> bool:
    """Time the best candidates at one case, interleaved, so that a change of clocks affects all of them alike.

    If one of them hangs or crashes, nobody knows which one it was. Then each is timed by itself: here if the process
    and the GPU survive, else in the next run.

    Returns:
        False if the time is up or the GPU is lost.
    """
    failed = {name for name, reason in _failures(finals).items() if reason != _HUNG_IN_GROUP}
    finalists = [name for name in finals if name not in failed]
    untimed = [name for name in finalists if not isinstance(finals[name].get(use.name), float)]
    one_by_one = any(use.name in finals[name] for name in untimed)
    if not untimed or (len(finalists) == 1 and not one_by_one):
        return True
    if time.monotonic() > end:
        return False
    inputs = make_inputs(timing, use.case, DTYPE)
    if not one_by_one:
        if not _time_group(timing, use, table, finals, untimed, inputs, save):
            return False
        untimed = [name for name in untimed if finals[name][use.name] == _HUNG_IN_GROUP]
    for name in untimed:
        if time.monotonic() > end or not _time_group(timing, use, table, finals, [name], inputs, save):
            return False
    return True


def _time_group(
    timing: Timing,
    use: TableUse,
    table: str,
    finals: Trials,
    names: Sequence[str],
    inputs: Sequence[tuple[Any, ...]],
    save: Callable[[], None],
) -> bool:
    """Time candidates at one case, replayed in turn; False if the GPU is lost.

    If several of them crash together, all are marked with `_HUNG_IN_GROUP`.
    """
    calls = {name: _with_constants(table, json.loads(name), use.spec) for name in names}
    before = {name: dict(finals[name]) for name in names}
    for name in names:
        finals[name][use.name] = _HUNG_IN_GROUP if len(names) > 1 else HUNG
    save()
    try:
        with hang_watchdog(timing, HANG_SECONDS):
            times = timing.timer(calls, inputs, _FINAL_SECONDS)
    except KeyboardInterrupt:  # they did not hang: the next run times them again
        finals.update(before)
        save()
        raise
    except Exception as error:  # an illegal memory access is only reported when the GPU is waited for
        reason = f"{type(error).__name__}: {error}"[:200]
        times = dict.fromkeys(names, reason if len(names) == 1 else _HUNG_IN_GROUP)
    gpu_lost = any(isinstance(us, str) for us in times.values()) and not gpu_is_alive(timing.device)
    # Once the GPU is lost all of them fail, so their own errors say nothing.
    if gpu_lost and len(names) > 1:
        times = dict.fromkeys(names, _HUNG_IN_GROUP)
    for name, us in times.items():
        finals[name][use.name] = us if isinstance(us, str) else us * max(1, use.case.calls)
    _log.info("%s %s: %s", table, use.name, times)
    save()
    return not gpu_lost


def _with_constants(table: str, candidate: Mapping[str, int], spec: OpSpec) -> Callable[..., Any]:
    """The operator with a candidate's constants, which only matter while it is recorded into a graph."""

    def call(*args: Any) -> Any:
        with tuning.trying(table, candidate):
            return spec.op(*args)

    return call


def _can_skip(row: Mapping[str, float | str], trials: Trials) -> bool:
    """Whether a candidate failed at another case, or took more than twice as long there as the fastest one."""
    for case, us in row.items():
        others = [other for t in trials.values() if isinstance(other := t.get(case), float)]
        if isinstance(us, str) or us > 2 * min(others):
            return True
    return False


def _cases(trials: Trials) -> set[str]:
    return {case for row in trials.values() for case in row}


def _failures(finals: Trials) -> dict[str, str]:
    """Finalist -> what went wrong, for those that failed or hung at any case."""
    return {name: us for name, row in finals.items() for us in row.values() if isinstance(us, str)}


def _ranked(trials: Trials, cases: set[str]) -> list[str]:
    """Candidates that ran at all of these cases, the fastest first, by the sum of their times."""
    sums = {
        name: sum(us for us in row.values() if isinstance(us, float))
        for name, row in trials.items()
        if row.keys() == cases and all(isinstance(us, float) for us in row.values())
    }
    return sorted(sums, key=sums.__getitem__)


def _fastest(
    trials: Trials, finals: Trials, wanted: Callable[[Mapping[str, int]], bool] = lambda _: True
) -> Mapping[str, int] | None:
    """The constants of the fastest candidate among those wanted; None if none of them ran at all cases.

    Interleaved times count, if some finalist has them for all cases. A finalist that failed is never chosen.
    """
    # Where only one finalist is wanted, it is the fastest one alone, too: finalists are the first in that order.
    cases, failed = _cases(trials), _failures(finals)
    alone = [name for name in _ranked(trials, cases) if name not in failed]
    for names in (_ranked(finals, cases), alone):
        if found := next(filter(wanted, map(json.loads, names)), None):
            fastest: Mapping[str, int] = found
            return fastest
    return None
