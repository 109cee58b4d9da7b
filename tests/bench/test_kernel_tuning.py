"""`bench/kernel_tuning.py`: tuning dry. Kernels run in Triton's interpreter, and the clock is a fake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dry_timing import ATTENTION, BF16, FIRST, SECOND, SMALL, fake_timer, small_attention
from latentrt.bench import kernel_timing, kernel_tuning, verdicts
from latentrt.bench import kernels as timings
from latentrt.bench.kernel_timing import HUNG, Timing
from latentrt.kernels import tuning
from latentrt.kernels._dispatch import forced


def test_tuning(here: Timing) -> None:
    """The quickest over both cases that share a key; what does not compile is passed over."""
    with forced():
        result = kernel_tuning.tune(here, [small_attention()], save=False)
    assert result["best"] == {"attention": {"16/d64-short": SMALL[2]}}
    assert result["left"] == []
    broken, slow, quick = (result["times"]["attention"]["16/d64-short"][json.dumps(c)] for c in SMALL)
    assert (slow, quick) == ({FIRST: 19.0, SECOND: 57.0}, {FIRST: 10.0, SECOND: 30.0})
    assert result["finals"]["attention"]["16/d64-short"] == {
        json.dumps(SMALL[2]): quick,
        json.dumps(SMALL[1]): slow,
    }
    assert list(broken) == [FIRST]  # and not tried again at the other
    assert "power of 2" in broken[FIRST]
    assert list(kernel_tuning.lines(result)) == [
        f"attention 16/d64-short: {json.dumps(SMALL[2])}, 40.0 us in one forward",
        "left: none",
    ]


def test_the_library_may_be_the_quickest(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held against float64 and timed as any other candidate, is written down, and is said to be what runs."""

    def timer(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        found = fake_timer(calls, inputs, seconds)
        by_library = ("attention", tuning.LIBRARY) in [(table, row) for table, row, _ in tuning._trials]
        library = {name for name in found if by_library or name == json.dumps(tuning.LIBRARY)}
        return found | dict.fromkeys(library, 5.0)

    saved: list[Any] = []
    monkeypatch.setattr(tuning, "save", lambda *args: saved.append(args))
    spec = small_attention(candidates={"attention": [tuning.LIBRARY, *SMALL[1:]]})
    with forced():
        result = kernel_tuning.tune(Timing(here.device, timer, folder=here.folder), [spec])
        assert [args[2] for args in saved] == [
            {"16/d64-short": {"LIBRARY": 1}, "16/d64-short-kernel": SMALL[2]}
        ]
        assert 'attention 16/d64-short: {"LIBRARY": 1}, 20.0 us' in next(kernel_tuning.lines(result))
        with tuning.trying("attention", tuning.LIBRARY):
            measured = timings.measure(here, [spec], BF16)
    assert [row["launches"] for row in measured["rows"]] == [{"library: attention": 1}] * 2
    assert next(line for line in timings.lines(measured) if "two" in line).endswith(
        "; by PyTorch's libraries"
    )


def test_the_quickest_without_descriptors_is_saved_too(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TMA is the quickest: plugins and heads that cannot be described launch the plain kernel."""
    saved: list[Any] = []
    monkeypatch.setattr(tuning, "save", lambda *args: saved.append(args[2]))
    copied = {**SMALL[2], "TMA": 1}

    def timer(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        found = fake_timer(calls, inputs, seconds)
        return {
            n: 8.0 if (json.loads(n) if n else tuning._trials[-1][1]) == copied else us
            for n, us in found.items()
        }

    with forced():
        result = kernel_tuning.tune(
            Timing(here.device, timer, folder=here.folder),
            [small_attention(candidates={"attention": [*SMALL[1:], copied]})],
        )
    assert saved == [{"16/d64-short": copied, "16/d64-short-kernel": SMALL[2]}]
    assert list(kernel_tuning.lines(result)) == [
        f"attention 16/d64-short: {json.dumps(copied)}, 32.0 us in one forward",
        f"attention 16/d64-short-kernel: {json.dumps(SMALL[2])}, 40.0 us in one forward",
        "left: none",
    ]


def test_the_choice_is_among_the_best_few_timed_in_turn(here: Timing) -> None:
    """Alone, 16 was timed when clocks were high; side by side it is the slower one."""
    together: list[list[str]] = []

    def timer(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        found = fake_timer(calls, inputs, seconds)
        if len(found) > 1:
            together.append(list(found))
            return found
        return {"": 9.0} if tuning._trials[-1][1]["BLOCK_N"] == 16 else found

    with forced():
        result = kernel_tuning.tune(
            Timing(here.device, timer, folder=here.folder), [small_attention()], save=False
        )
        assert together == [[json.dumps(c) for c in SMALL[1:]]] * 2  # at both cases
        assert result["best"] == {"attention": {"16/d64-short": SMALL[2]}}
        assert "40.0 us in one forward" in next(kernel_tuning.lines(result))
        again = kernel_tuning.tune(
            Timing(here.device, timer, folder=here.folder), [small_attention()], save=False
        )
    assert len(together) == 2
    assert again["best"] == result["best"]


@pytest.mark.parametrize("ended", [KeyboardInterrupt, SystemExit])
def test_a_final_that_is_ended_is_run_again_unless_it_took_the_process_along(
    ended: type[BaseException], here: Timing
) -> None:
    """Then its candidates are timed one by one."""
    rounds: list[int] = []

    def stops(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        if len(calls) > 1:
            rounds.append(len(calls))
            if len(rounds) == 1:
                raise ended
        return fake_timer(calls, inputs, seconds)

    timing = Timing(here.device, stops, folder=here.folder)
    with forced():
        with pytest.raises(ended):
            kernel_tuning.tune(timing, [small_attention()], save=False)
        result = kernel_tuning.tune(timing, [small_attention()], save=False)
    assert len(rounds) == (3 if ended is KeyboardInterrupt else 2)
    assert result["best"] == {"attention": {"16/d64-short": SMALL[2]}}


def by_constants(name: str) -> int:
    """BLOCK_N of the candidate that is timed: of a final by its name, else of the trial."""
    return int((json.loads(name) if name else tuning._trials[-1][1])["BLOCK_N"])


@pytest.mark.parametrize(("survives", "raised"), [(True, True), (False, True), (False, False)])
def test_a_candidate_that_fails_in_its_final_is_found_one_by_one_and_never_chosen(
    survives: bool, raised: bool, here: Timing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the GPU is lost with it the next run finds it, also if it was lost while the first one was recorded, after
    which all of them fail."""
    finals: list[list[int]] = []

    def crashes(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        if "" not in calls:
            finals.append([by_constants(name) for name in calls])
            if 32 in finals[-1] and raised:
                raise RuntimeError("an illegal memory access was encountered")
            if 32 in finals[-1]:
                return dict.fromkeys(calls, "RuntimeError: an illegal memory access was encountered")
        return fake_timer(calls, inputs, seconds)

    saved: list[Any] = []
    monkeypatch.setattr(tuning, "save", lambda *args: saved.append(args[2]))
    monkeypatch.setattr(kernel_tuning, "gpu_is_alive", lambda device: survives)
    timing = Timing(here.device, crashes, folder=here.folder)
    spec = small_attention(candidates={"attention": SMALL[1:]})  # the one of 32 is the quickest alone
    with forced():
        result = kernel_tuning.tune(timing, [spec])
        if not survives:
            assert (result["best"], saved, finals) == ({}, [], [[32, 16]])
            again = kernel_tuning.tune(timing, [spec])
            assert (again["best"], saved, finals) == ({}, [], [[32, 16], [32]])
            monkeypatch.setattr(kernel_tuning, "gpu_is_alive", lambda device: True)
            result = kernel_tuning.tune(timing, [spec])
    assert finals == [[32, 16], [32], [16]]
    assert result["best"] == {"attention": {"16/d64-short": SMALL[1]}}
    assert saved == [{"16/d64-short": SMALL[1]}]
    assert result["left"] == []
    told = list(kernel_tuning.lines(result))
    assert told[0].startswith(
        f"attention 16/d64-short: passed over {json.dumps(SMALL[2])}: RuntimeError: an ill"
    )
    assert told[1] == f"attention 16/d64-short: {json.dumps(SMALL[1])}, 76.0 us in one forward"


def test_a_final_that_never_came_back_loses_only_the_candidate_that_hangs(here: Timing) -> None:
    """The process ends with it each time; the others are chosen among by their finals."""
    third = {**SMALL[1], "BLOCK_N": 64}

    def hangs(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        if "" not in calls and 32 in map(by_constants, calls):
            raise SystemExit
        found = fake_timer(calls, inputs, seconds)
        return {name: 15.0 if by_constants(name) == 64 and name else us for name, us in found.items()}

    timing = Timing(here.device, hangs, folder=here.folder)
    spec = small_attention(candidates={"attention": [*SMALL[1:], third]})
    with forced():
        for _ in range(2):
            with pytest.raises(SystemExit):
                kernel_tuning.tune(timing, [spec], save=False)
        result = kernel_tuning.tune(timing, [spec], save=False)
    found = result["finals"]["attention"]["16/d64-short"]
    assert found[json.dumps(SMALL[2])] == {FIRST: HUNG}
    assert found[json.dumps(third)] == {FIRST: 15.0, SECOND: 45.0}
    assert result["best"] == {"attention": {"16/d64-short": third}}
    assert result["left"] == []


def test_a_candidate_that_is_wrong_at_a_case_of_another_operator_is_not_chosen_by_earlier_finals(
    here: Timing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finals of the first case alone had it; with the second one they begin again without it."""
    check_output = kernel_timing.Float64Check.check

    def wrong(check: Any, got: Any) -> tuple[float, bool]:
        return (707.3, False) if by_constants("") == 32 and len(seen) else check_output(check, got)

    seen: list[str] = []
    monkeypatch.setattr(kernel_timing.Float64Check, "check", wrong)
    candidates = {"attention": [*SMALL[1:], {**SMALL[1], "BLOCK_N": 64}]}
    both = small_attention(candidates=candidates)
    with forced():
        first = kernel_tuning.tune(
            here, [small_attention(candidates=candidates, cases=both.cases[:1])], save=False
        )
        assert first["best"] == {"attention": {"16/d64-short": SMALL[2]}}
        seen.append("the second case")
        result = kernel_tuning.tune(here, [both], save=False)
    assert "wrong" in result["times"]["attention"]["16/d64-short"][json.dumps(SMALL[2])][SECOND]
    assert json.dumps(SMALL[2]) not in result["finals"]["attention"]["16/d64-short"]
    assert result["best"]["attention"]["16/d64-short"] != SMALL[2]
    assert result["left"] == []


def test_a_table_whose_candidates_are_all_timed_is_written_when_the_time_ends(
    here: Timing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By these times, also where one case of two was interleaved; the next run does what is left."""
    clock = [0.0]
    monkeypatch.setattr(kernel_tuning.time, "monotonic", lambda: clock[0])
    saved: list[Any] = []
    monkeypatch.setattr(tuning, "save", lambda *args: saved.append(args[2]))
    groups: list[int] = []

    def timer(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        if "" not in calls:
            groups.append(len(calls))
            clock[0] += 1000.0  # one final, and the time is up
            return {name: 5.0 if by_constants(name) == 16 else 6.0 for name in calls}
        return fake_timer(calls, inputs, seconds)

    with forced():
        timing = Timing(here.device, timer, seconds=400.0, folder=here.folder)
        result = kernel_tuning.tune(timing, [small_attention()])
        assert groups == [2]
        assert result["best"] == {"attention": {"16/d64-short": SMALL[2]}}
        assert saved == [{"16/d64-short": SMALL[2]}]
        assert result["left"] == ["attention"]
        assert "40.0 us in one forward, its rivals not yet timed in turn" in next(kernel_tuning.lines(result))
        assert verdicts.is_unfinished(here.folder, "tuning")
        again = kernel_tuning.tune(timing, [small_attention()])
    assert groups == [2, 2]
    assert saved[1:] == [{"16/d64-short": SMALL[1]}]
    assert again["left"] == []


def test_a_single_candidate_is_reported_with_its_time(here: Timing) -> None:
    with forced():
        result = kernel_tuning.tune(here, [small_attention(candidates={"attention": SMALL[2:]})], save=False)
    assert "40.0 us in one forward" in next(kernel_tuning.lines(result))


def test_tuning_resumes(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the candidate that hung, not past one that was interrupted; nothing is written down before all cases were
    timed."""
    saved: list[Any] = []
    monkeypatch.setattr(tuning, "save", lambda *args: saved.append(args))
    timed: list[int] = []

    def stops(*args: Any) -> dict[str, float | str]:
        timed.append(tuning._trials[-1][1]["BLOCK_N"])
        if timed == [16, 16, 32]:
            raise SystemExit  # as if the process had been ended
        if timed == [16]:
            raise KeyboardInterrupt
        return fake_timer(*args)

    with forced():
        for ended in (KeyboardInterrupt, SystemExit):
            with pytest.raises(ended):
                kernel_tuning.tune(Timing(here.device, stops, folder=here.folder), [small_attention()])
        assert not saved
        assert verdicts.resumable_verdict(here.folder, "tuning") == (True, "1 left")
        assert verdicts.is_unfinished(here.folder, "tuning")
        result = kernel_tuning.tune(Timing(here.device, stops, folder=here.folder), [small_attention()])
    assert timed == [16, 16, 32, 16]  # the other case of the one that is left
    times = result["times"]["attention"]["16/d64-short"]
    assert times[json.dumps(SMALL[2])] == {FIRST: HUNG}
    arch, table, best, measured_on = saved[0]
    assert (arch, table, best) == (80, "attention", {"16/d64-short": SMALL[1]})
    assert measured_on["gpu"] == "A Fake"
    assert verdicts.resumable_verdict(here.folder, "tuning") == (True, "")
    assert not verdicts.is_unfinished(here.folder, "tuning")
    assert verdicts.is_unfinished(here.folder, "kernels")  # which nobody has timed


@pytest.fixture
def block_sizes(tmp_path: Path, untuned: Path) -> tuple[Path, Path]:
    """The folder that kernels read, and a copy of it that an earlier run left."""
    return untuned, shutil.copytree(untuned, tmp_path / "left")


def leave(folder: Path, table: str, rows: dict[str, Any], measured_on: dict[str, Any]) -> None:
    """As a run leaves its block sizes of sm_90."""
    file = folder / "sm_90.json"
    content = json.loads(file.read_text())
    content["tables"].setdefault(table, {}).update(rows)
    content["measured_on"][table] = {**measured_on, "keys": sorted(rows)}
    file.write_text(json.dumps(content))


NEW = dict(ATTENTION.candidates["attention"][-1])
KEY = "16/d64"


def test_block_sizes_of_an_earlier_run_are_taken(block_sizes: tuple[Path, Path]) -> None:
    """The sources came anew, and with them what is reasoned."""
    read, left = block_sizes
    before = {path.name: path.read_text() for path in read.iterdir()}
    assert kernel_tuning.import_tuned(left.parent / "none") == []
    assert kernel_tuning.import_tuned(left) == []  # nothing is measured there
    assert {path.name: path.read_text() for path in read.iterdir()} == before
    measured = {"gpu": "A", "sources": kernel_timing.sources_digest()}
    leave(left, "attention", {KEY: NEW}, measured)
    assert kernel_tuning.import_tuned(left) == ["attention of sm_90"]
    assert tuning.constants("attention", 90, torch.float16, "d64") == NEW
    found = tuning.load(90)
    assert found["measured_on"] == {"attention": {**measured, "keys": [KEY]}}
    reasoned = json.loads(before["sm_90.json"])["tables"]
    assert found["tables"]["attention"] == {
        **reasoned["attention"],
        KEY: NEW,
        f"{KEY}-kernel": reasoned["attention"][KEY],
    }
    assert {k: v for k, v in found["tables"].items() if k != "attention"} == {
        k: v for k, v in reasoned.items() if k != "attention"
    }
    assert kernel_tuning.import_tuned(left) == []


def test_block_sizes_of_other_sources_or_forms_are_not_taken(block_sizes: tuple[Path, Path]) -> None:
    read, left = block_sizes
    before = tuning.load(90)
    leave(left, "attention", {KEY: NEW}, {"gpu": "A", "sources": "others"})
    for arch, text in {
        80: '{"arch": 80, "tab',
        86: "[]",
        89: '{"arch": 89}',
        100: '{"tables": {}, "measured_on": {"attention": {"sources": "%s", "keys": ["16/d64"]}}}',
        120: '{"tables": {}, "measured_on": {"attention": 7}}',
    }.items():
        (left / f"sm_{arch}.json").write_text(text.replace("%s", kernel_timing.sources_digest()))
    (left / "sm_70.json").write_text("{}")
    assert kernel_tuning.import_tuned(left) == []
    assert tuning.load(90) == before
    assert {path.name for path in read.iterdir()} == {f"sm_{arch}.json" for arch in tuning.architectures()}


def test_a_table_of_which_no_candidate_runs_is_not_left(here: Timing) -> None:
    """Another run would find the same."""
    with forced():
        result = kernel_tuning.tune(here, [small_attention(candidates={"attention": SMALL[:1]})])
    assert (result["best"], result["left"], result["failed"]) == ({}, [], ["attention"])
    assert list(kernel_tuning.lines(result)) == [
        "attention: no candidate runs in all cases",
        "left: none",
    ]
    assert not verdicts.is_unfinished(here.folder, "tuning")
    assert verdicts.resumable_verdict(here.folder, "tuning") == (True, "no candidate runs: attention")


def test_finalists_that_crashed_together_may_still_run(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the time ends before each is timed by itself, their table is left."""
    clock = [0.0]
    monkeypatch.setattr(kernel_tuning.time, "monotonic", lambda: clock[0])

    def timer(calls: Any, inputs: Any, seconds: float) -> dict[str, float | str]:
        if len(calls) > 1 and not clock[0]:
            clock[0] = 1000.0
            raise RuntimeError("an illegal memory access was encountered")
        return fake_timer(calls, inputs, seconds)

    timing = Timing(here.device, timer, folder=here.folder)
    with forced():
        result = kernel_tuning.tune(timing, [small_attention()], save=False)
        assert (result["best"], result["left"], result["failed"]) == ({}, ["attention"], [])
        again = kernel_tuning.tune(timing, [small_attention()], save=False)
    assert (again["best"].keys(), again["left"], again["failed"]) == ({"attention"}, [], [])
