"""How a case is measured: whose turn it is, what is built, what goes in groups, and what is left where sides fail."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_clock import FakeClock
from helpers.planted_sides import CASE, STEPS, planted, rows
from latentrt.bench.cases import Case, SideSpec
from latentrt.bench.gates import GATES, likeness
from latentrt.bench.grouping import Group, Grouping
from latentrt.bench.host import Host
from latentrt.bench.report import markdown
from latentrt.bench.results import CaseResult, Report, Row
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import Layout
from latentrt.bench.worker import Job, Worker


def test_trying_settings_out_is_no_part_of_the_first_picture(
    measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeClock().install(monkeypatch)
    row = measure(planted("tuned", tuning_seconds=100), rounds=1).rows[0]
    assert row.settings == "planted and tuned"
    assert row.first_image_seconds is not None
    assert row.first_image_seconds < 1


@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_a_side_that_fails_is_reported_and_the_rest_is_measured(
    at: int, measure: Callable[..., CaseResult]
) -> None:
    result = measure(planted("failing", fails_at=at), planted("sound"), rounds=3)
    found = rows(result)
    where = "batch 1: " if at >= 2 else ""
    assert result.reference == ("failing" if at >= 2 else "sound")  # half of its pictures are none
    assert (found["failing"].status, found["failing"].reason) == ("failed", f"{where}planted [96mfailure")
    assert found["failing"].batches == []
    assert len(found["sound"].batches[0].seconds) == 3
    assert found["sound"].batches[0].speedup is None  # there is nothing that it would be beside


def test_a_side_that_builds_is_first_measured_in_a_process_before(measure: Callable[..., CaseResult]) -> None:
    opened = []

    def counting(job: Job) -> Host:
        opened.append(job.side.name)
        return Worker(job)

    builds = SideSpec("builds", "", "helpers.planted_sides:open_planted", {"step_seconds": 0.01}, builds=True)
    found = rows(measure(planted("plain"), builds, open_host=counting, rounds=1))
    # One that builds nothing has a process before as well: its files are in memory like those of one that builds.
    assert opened == ["builds", "plain", "plain", "builds"]
    assert found["plain"].build_seconds is None
    assert found["builds"].build_seconds is not None
    assert found["builds"].build_seconds >= STEPS * 0.01


def test_as_many_sides_build_at_the_same_time_as_asked(measure: Callable[..., CaseResult]) -> None:
    both = threading.Barrier(2)
    built = set()

    class Waiting(Worker):
        def open(self) -> str:
            if self._job.side.builds and self._job.side.name not in built:
                built.add(self._job.side.name)
                both.wait(20)  # broken where the other one only comes later
            return super().open()

    a, b = (SideSpec(name, "", "helpers.planted_sides:open_planted", builds=True) for name in "ab")
    found = measure(planted("plain"), a, b, open_host=Waiting, rounds=1, builders=2)
    assert [row.status for row in found.rows] == ["measured"] * 3
    assert found.builders == 2


def test_engines_of_an_earlier_run_are_reported_and_not_timed(
    measure: Callable[..., CaseResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    now = ["0123abc"]
    for module in ("host", "worker"):
        monkeypatch.setattr(f"latentrt.bench.{module}.commit", lambda: now[0])

    def counting(job: Job) -> Host:
        opened.append(job.folder)
        return Worker(job)

    def build(**options: Any) -> Row:
        side = SideSpec("builds", "", "helpers.planted_sides:open_planted", options, builds=True)
        return measure(side, open_host=counting, rounds=1).rows[0]

    first, second, other = build(), build(), build(step_seconds=0.001)
    assert [len(set(opened[:4])), len(opened)] == [1, 6]
    assert (first.built_before, second.built_before, other.built_before) == (False, True, False)
    assert first.build_seconds is not None
    assert second.build_seconds is None
    (opened[0] / "built").unlink()  # as an interruption leaves it
    (opened[0] / "half an export").touch()
    assert build().build_seconds is not None
    assert not (opened[0] / "half an export").exists()
    now[0] = "0123abc+"  # changed since the commit: who knows how
    assert [build().built_before for _ in range(2)] == [False, False]


def test_a_side_that_fails_at_a_larger_batch_keeps_what_it_was_through_with(
    measure: Callable[..., CaseResult],
) -> None:
    """As where memory runs out. It makes 3 pictures, then 2 runs before 2 rounds of each size."""
    case = Case("planted", "nothing real", "none", steps=1, batches=(1, 2, 3))
    found = rows(measure(planted("first", fails_at=10), planted("b"), case=case, rounds=2))
    first, b = found["first"], found["b"]
    assert (first.status, first.reason) == ("failed", "batch 2: planted [96mfailure")
    assert [(f.batch, len(f.seconds)) for f in first.batches] == [(1, 2)]
    assert first.first_image_seconds is not None
    assert [f.batch for f in b.batches] == [1, 2, 3]
    assert b.batches[0].beside == first.batches[0].seconds
    assert [f.speedup is None for f in b.batches] == [False, True, True]  # of half a size nobody is told


@pytest.mark.parametrize(("unread", "joules"), [(None, 30.0), (5, None)])
def test_energy_is_of_all_rounds_or_not_reported(
    unread: int | None, joules: float | None, measure: Callable[..., CaseResult]
) -> None:
    class Metered(Worker):
        calls = 0

        def run(self, *args: Any, **kwargs: Any) -> Any:
            made = super().run(*args, **kwargs)
            timed = self._job.side.name == "b" and not kwargs  # three calls before the rounds
            Metered.calls += timed
            return replace(made, joules=None if Metered.calls == unread else 30.0)

    b = rows(measure(planted("a"), planted("b"), rounds=3, pictures=1, open_host=Metered))["b"]
    assert b.batches[0].joules_per_image == joules


def grouped(case: Case, *groups: Sequence[str], skipped: dict[str, dict[int, str]] | None = None) -> Grouping:
    names = {name for group in groups for name in group}
    return Grouping(
        [Group(list(group), case.batches) for group in groups],
        dict.fromkeys(names, case.batches),
        skipped or {},
    )


@pytest.mark.parametrize("keep", [True, False])
def test_sides_that_do_not_fit_together_are_measured_in_groups(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second group everything takes twice as long, which each ratio is free of."""
    FakeClock().install(monkeypatch)
    open_now: set[str] = set()
    together: set[frozenset[str]] = set()

    class Counting(Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self._name = job.side.name

        def open(self) -> str:
            open_now.add(self._name)
            together.add(frozenset(open_now))
            return super().open()

        def run(self, *args: Any, **kwargs: Any) -> Any:
            made = super().run(*args, **kwargs)
            return replace(made, seconds=made.seconds * (2 if "c" in open_now else 1))

        def close(self) -> None:
            open_now.discard(self._name)
            super().close()

    case = replace(CASE, steps=1)
    sides = [planted(name, step_seconds=s) for name, s in (("a", 0.01), ("b", 0.02), ("c", 0.02), ("d", 0.0))]
    run = CaseRun(
        case,
        sides,
        Plan(["a"], GATES["eager"], rounds=3, pictures=1),
        steps={"base": 1},
        device="cpu",
        folder=tmp_path,
        open_host=Counting,
        grouping=grouped(case, "ab", "ac", skipped={"d": {1: "needs about 40.0 GiB"}}),
        keep_builds=keep,
    )
    run.measure()
    found = rows(run.result())
    assert together == {frozenset(names) for names in ("a", "ab", "ac")}
    assert not open_now
    assert [found[name].batches[0].speedup.value for name in "abc"] == pytest.approx([1, 0.5, 0.5], abs=1e-3)
    assert found["b"].batches[0].median.value == pytest.approx(0.02, abs=1e-4)
    assert found["c"].batches[0].median.value == pytest.approx(0.04, abs=1e-4)
    assert len(found["a"].batches[0].seconds) == 6
    assert run.result().groups == [["a", "b"], ["a", "c"]]
    assert (found["d"].status, found["d"].reason) == ("skipped", "batch 1 needs about 40.0 GiB")
    assert found["d"].batches == []
    assert any(tmp_path.iterdir()) is keep


def test_sides_that_do_not_fit_with_the_first_are_measured_alone(tmp_path: Path) -> None:
    """One at a time, the eager one's pictures first; each is compared with the first side's rounds all the same."""
    open_now: set[str] = set()
    together: list[frozenset[str]] = []

    class Counting(Worker):
        def open(self) -> str:
            open_now.add(self._job.side.name)
            together.append(frozenset(open_now))
            return super().open()

        def close(self) -> None:
            open_now.discard(self._job.side.name)
            super().close()

    eager = SideSpec("eager", "", "helpers.planted_sides:open_backend", {"backend": "eager"}, dtype="float32")
    sides = [planted("a", step_seconds=0.002), planted("b", step_seconds=0.001, fails_at=9), eager]
    case = replace(CASE, steps=1, dtype="float16", batches=(1, 2))
    run = CaseRun(
        case,
        sides,
        Plan(["a"], GATES["eager"], rounds=3, pictures=2),
        steps={"base": 1},
        device="cpu",
        folder=tmp_path,
        open_host=Counting,
        grouping=grouped(case, ["eager"], "a", "b"),
    )
    run.measure()
    result = run.result()
    a, b, reference = result.rows
    assert set(together) == {frozenset({name}) for name in ("a", "b", "eager")}
    assert next(iter(together)) == {"eager"}
    assert (result.reference, reference.status) == ("eager", "reference")
    assert [result.is_interleaved(row, 1) for row in (a, b)] == [True, False]
    assert (b.status, [f.batch for f in b.batches]) == ("failed", [1])
    assert b.batches[0].beside == a.batches[0].seconds
    assert b.batches[0].speedup.value > 1
    assert a.batches[1].speedup.value == 1
    text = markdown(Report("", {}, 0, [result]))
    assert re.search(r"\| b \| [^|]+ \| [0-9.]+ x \([0-9.]+ to [0-9.]+, not interleaved\) \|", text)
    assert "did not fit together with a: they ran at another time" in text
    assert "not interleaved" not in markdown(Report("", {}, 0, [replace(result, groups=[["a", "b"]])]))


def test_a_side_that_fits_with_the_first_at_small_sizes_is_opened_again_for_larger_ones(
    tmp_path: Path,
) -> None:
    """Its pictures, what building took, its first picture and its layout are those of the first process."""
    events: list[str] = []
    layouts: list[Layout | None] = []

    class Noting(Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self._name = job.side.name

        def open(self) -> str:
            events.append(f"open {self._name}")
            return super().open()

        def tune(self, layout: Layout | None = None) -> Any:
            events.append(f"tune {self._name}")
            layouts.append(layout)
            return super().tune(layout)

        def run(self, prompts: Sequence[str], seeds: Sequence[int], **kwargs: Any) -> Any:
            events.append(f"{self._name} {len(seeds)}")
            return super().run(prompts, seeds, **kwargs)

        def close(self) -> None:
            events.append(f"close {self._name}")
            super().close()

    case = replace(CASE, steps=1, batches=(1, 2))
    sides = [planted("a", step_seconds=0.002), replace(planted("b", step_seconds=0.001), builds=True)]
    groups = Grouping(
        [Group(["a", "b"], (1,)), Group(["a"], (2,)), Group(["b"], (2,))], dict.fromkeys("ab", (1, 2))
    )
    run = CaseRun(
        case,
        sides,
        Plan(["a"], GATES["eager"], rounds=3, pictures=2),
        steps={"base": 1},
        device="cpu",
        folder=tmp_path,
        open_host=Noting,
        grouping=groups,
    )
    run.measure()
    result = run.result()
    a, b = result.rows
    assert [(row.status, row.reason) for row in result.rows] == [("measured", "")] * 2
    a_alone, b_alone = events.index("a 2"), events.index("b 2")  # the first calls with two pictures
    assert "close b" in events[a_alone - 2 : a_alone]
    assert events[b_alone - 3 : b_alone] == ["close a", "open b", "tune b"]
    assert [events.count(f"tune {name}") for name in "ab"] == [1, 2]
    assert layouts == [None, None, {"UNet": "channels_last", "VAE": "contiguous"}]
    assert b.built_before is False
    assert b.build_seconds is not None
    for row in (a, b):
        assert [(f.batch, len(f.seconds)) for f in row.batches] == [(1, 3), (2, 3)]
    assert [result.is_interleaved(b, batch) for batch in (1, 2)] == [True, False]
    assert [f.beside for f in b.batches] == [f.seconds for f in a.batches]
    text = markdown(Report("", {}, 0, [result]))
    assert "Sides that are not interleaved (at batch 2) did not fit together with a" in text
    assert ", not interleaved)" not in text  # the table is of batch 1


def test_rounds_take_turns(measure: Callable[..., CaseResult]) -> None:
    order = []

    class Noting(Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self._name = job.side.name

        def run(self, *args: Any, **kwargs: Any) -> Any:
            order.append(self._name)
            return super().run(*args, **kwargs)

    measure(planted("a"), planted("b"), planted("c"), open_host=Noting, rounds=3, pictures=1)
    assert "".join(order[-9:]) == "abcbcacab"


def test_the_gpu_does_not_wait_between_the_calls_of_a_round(
    measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What checks the pictures takes its time: the GPU would cool down, and its clock recover."""
    clock = FakeClock()
    clock.install(monkeypatch)
    calls: list[tuple[float, float]] = []

    class Noting(Worker):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            begun = clock.perf_counter()
            made = super().run(*args, **kwargs)
            calls.append((begun, clock.perf_counter()))
            return made

    def slow_likeness(*pictures: Any) -> tuple[float, float]:
        clock.sleep(100)
        return likeness(*pictures)

    monkeypatch.setattr("latentrt.bench.judging.likeness", slow_likeness)
    result = measure(planted("a"), planted("b"), planted("c"), open_host=Noting, rounds=3, pictures=1)
    timed = calls[-9:]
    waits = [later[0] - earlier[1] for earlier, later in pairwise(timed)]
    assert [wait > 1 for wait in waits] == [False, False, True, False, False, True, False, False]
    assert all(row.batches[0].psnr == 200 for row in result.rows)  # they are checked all the same


def test_a_side_that_compiles_for_each_size_is_measured_at_the_first_on_a_cpu(
    measure: Callable[..., CaseResult],
) -> None:
    compiled = SideSpec("compiled", "", "helpers.planted_sides:open_planted", compiles_each_size=True)
    case = Case("planted", "nothing real", "none", steps=1, batches=(2, 3))
    found = rows(measure(planted("plain"), compiled, case=case, rounds=2))
    assert [b.batch for b in found["plain"].batches] == [2, 3]
    assert [b.batch for b in found["compiled"].batches] == [2]


def interrupted(folder: Path, call: int, *sides: SideSpec) -> CaseResult:
    """What is left of a measurement that Ctrl-C ended at a side's call of this number."""
    calls = itertools.count(1)

    class Interrupted(Worker):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise KeyboardInterrupt
            return super().run(*args, **kwargs)

    plan = Plan(["a"], GATES["eager"], rounds=9, pictures=2)
    run = CaseRun(
        CASE, sides, plan, steps={"base": STEPS}, device="cpu", folder=folder, open_host=Interrupted
    )
    with pytest.raises(KeyboardInterrupt):
        run.measure()
    return run.result()


def test_what_was_measured_before_ctrl_c_is_kept(tmp_path: Path) -> None:
    """In the second round, one side is through and the other one is not."""
    result = interrupted(tmp_path, 14, planted("a"), planted("b", step_seconds=0.001))
    assert [len(row.batches[0].seconds) for row in result.rows] == [1, 2]
    assert all(row.batches[0].speedup.value > 0 for row in result.rows)


def test_pictures_of_the_round_that_ctrl_c_ended_are_checked(tmp_path: Path) -> None:
    """A round is over; of the second one, "late" was through."""
    a, late = interrupted(tmp_path, 14, planted("a"), planted("late", wrong_from=5)).rows
    assert (len(a.batches[0].seconds), late.status, late.batches) == (1, "invalid", [])
