"""`bench/gpu.py`: how `make gpu` runs its parts, and what becomes of those that fail, hang or have nothing to do."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import until
from latentrt.bench import full, gpu, pytest_resume
from latentrt.bench.full import Part, PartVerdict, run_part
from latentrt.bench.gpu import Step


def steps() -> list[Step]:
    return gpu.steps(Path("results"), Path("work"))


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three parts: one that fails, one whose side is not there, and one that goes on by itself."""

    def part(name: str, code: str) -> Part:
        return Part(name, 60, command=("-c", f"open({str(tmp_path / name)!r}, 'a').write('x'); {code}"))

    made = [
        Step(
            part("broken", "print('it broke'); raise SystemExit(3)"),
            ("latentrt-eager",),
            build_glob="sdxl/broken-*",
        ),
        Step(part("absent", ""), ("diffusers",)),
        Step(part("good", ""), build_glob="sdxl/good-*"),
        Step(part("tune", ""), unfinished=lambda: False, seconds=90),
    ]
    monkeypatch.setattr(gpu, "steps", lambda *args, **kwargs: made)
    monkeypatch.setattr(
        gpu, "unavailable_reason", lambda side, *_: "it is not installed" * (side.name == "diffusers")
    )
    monkeypatch.setattr(gpu, "_BUILD", tmp_path / "build")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(full, "_digest", lambda part: "the same")
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def ran(folder: Path) -> dict[str, int]:
    names = ("broken", "absent", "good", "tune")
    return {name: len(file.read_text()) for name in names if (file := folder / name).exists()}


def test_a_part_that_fails_is_not_the_end(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("broken-1", "good-1"):
        (planted / "build" / "kept" / "sdxl" / name).mkdir(parents=True)
    out = planted / "out"
    assert gpu.main(["--out", str(out)]) == 1
    assert ran(planted) == {"broken": 1, "good": 1, "tune": 1}
    told = capsys.readouterr().out
    assert "it broke" in told
    assert re.search(r"^absent +left out: it is not installed$", told, re.MULTILINE)
    assert re.search(r"^broken +FAILED .*exit status 3$", told, re.MULTILINE)
    # What a side built stays where its part is to be run again.
    assert [path.name for path in (planted / "build" / "kept" / "sdxl").iterdir()] == ["broken-1"]
    assert list((out / "tuned").glob("sm_*.json"))
    assert json.loads((out / "parts" / "good.json").read_text())["passed"]
    assert gpu.main(["--out", str(out)]) == 1
    assert ran(planted) == {"broken": 2, "good": 1, "tune": 2}
    assert gpu.main(["--out", str(out), "good", "absent"]) == 0
    assert gpu.main(["--out", str(out), "--again", "good"]) == 0
    assert ran(planted) == {"broken": 2, "good": 2, "tune": 2}
    capsys.readouterr()
    assert gpu.main(["--list", "--out", str(out), "good"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["good", "passed"]
    with pytest.raises(SystemExit):
        gpu.main(["great"])
    assert "there is no part great; there are broken, absent, good, tune" in capsys.readouterr().err


def test_nothing_is_begun_that_has_no_time(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--seconds", "100", "good"]) == 1
    assert ran(planted) == {}
    assert "no time is left" in capsys.readouterr().out
    (good,) = (step for step in gpu.steps(planted, planted) if step.part.name == "good")
    monkeypatch.setattr(
        gpu, "steps", lambda *args, **kwargs: [replace(good, part=replace(good.part, time_limit=600))]
    )
    assert gpu.main(["--seconds", "140", "good"]) == 0
    assert 60 <= int(re.search(r"good: at most (\d+) s", capsys.readouterr().out)[1]) <= 95


def test_without_a_gpu_it_says_so(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert ran(planted) == {}


def test_a_part_whose_time_is_over_may_write_down_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "note"

    def over_once_it_works(*_: object) -> tuple[bool, int]:
        until(note.exists)
        return False, 0

    monkeypatch.setattr(full, "_digest", lambda part: "")
    monkeypatch.setattr(full, "_watch", over_once_it_works)
    works = f"import signal, time; from pathlib import Path; note = Path({str(note)!r})\n"
    willing = "try: note.touch(); time.sleep(600)\nexcept KeyboardInterrupt: note.write_text('7 of 9')"
    part = Part("slow", 2, command=("-c", works + willing))
    result = run_part(part, tmp_path)
    assert (result.passed, result.why) == (False, "ended after 2 s")
    assert note.read_text() == "7 of 9"
    note.unlink()
    monkeypatch.setattr(full, "GRACE_SECONDS", 0.2)
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); note.touch(); time.sleep(600)"
    assert run_part(replace(part, command=("-c", works + deaf)), tmp_path, again=True).seconds < 60


LOSES_THE_GPU = """
import time, pytest, torch
from latentrt.bench import kernel_timing
torch.cuda.is_initialized = lambda: True
kernel_timing.gpu_is_alive = lambda device: not lost
lost = False

@pytest.mark.parametrize("k", range(8))
def test_one(k):
    global lost
    if k == 5:
        time.sleep(600)
    lost = lost or k == 2
    assert not lost, "an illegal memory access"
"""


@pytest.mark.timeout(120)
def test_a_test_that_loses_the_gpu_or_hangs_is_the_only_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = (step.part for step in steps() if step.part.name == "graph-tests")
    planted_tests = tmp_path / "test_planted.py"
    planted_tests.write_text(LOSES_THE_GPU)
    monkeypatch.setattr(full, "_digest", lambda part: "the same")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    options = ("-p", "conftest", "-p", "no:cacheprovider", *part.options, "--timeout=5")
    part = replace(part, tests=(str(planted_tests),), markers="", options=options)
    assert run_part(part, tmp_path).why == "exit status 1"
    (passed,) = tmp_path.glob("graph-tests.*.passed")
    names = [name.rpartition("::")[2] for name in pytest_resume.read_passed(passed)]
    assert sorted(names) == [f"test_one[{k}]" for k in (0, 1, 3, 4, 6, 7)]
    assert "AssertionError: an illegal memory access" in (tmp_path / "graph-tests.log").read_text()


@pytest.mark.parametrize(
    ("hangs", "all_done_by", "time_of_its_own", "runs"),
    [(2, 3, 200, 3), (9, 9, 200, 4), (9, 9, 110, 2), (9, 1, 200, 1), (0, 2, 200, 2)],
    ids=["two hang", "all hang", "no time", "nothing left", "a lost GPU"],
)
def test_neither_a_hang_nor_a_lost_gpu_ends_tuning(
    hangs: int,
    all_done_by: int,
    time_of_its_own: int,
    runs: int,
    planted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes on with what is left, in what is left of its time. A run that lost the GPU ends well, with work left."""
    told = planted / "seconds"
    code = (
        "import sys; from pathlib import Path; "
        f"file = Path({str(told)!r}); file.open('a').write(sys.argv[-1] + ' '); "
        f"sys.exit(len(file.read_text().split()) <= {hangs})"
    )
    part = Part("tune", 60, command=("-c", code))
    step = Step(part, unfinished=lambda: len(told.read_text().split()) < all_done_by, seconds=time_of_its_own)
    # Each run takes 30 s, and nothing else takes time.
    monkeypatch.setattr(gpu, "_now", lambda: 30.0 * len(told.read_text().split()) if told.exists() else 0.0)
    monkeypatch.setattr(gpu, "steps", lambda *args, **kwargs: [step])
    assert gpu.main(["--out", str(planted / "out")]) == int(hangs >= runs)
    seconds = [int(word) for word in told.read_text().split()]
    assert seconds == [time_of_its_own - 30 * k for k in range(runs)]


def test_an_interrupted_run_stores_and_prints_what_it_found(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(part: Part, *args: Any, **kwargs: Any) -> Any:
        if part.name == "tune":
            raise KeyboardInterrupt
        return run_part(part, *args, **kwargs)

    monkeypatch.setattr(gpu, "run_part", interrupted)
    assert gpu.main(["--out", str(planted / "out")]) == 130
    assert list((planted / "out" / "tuned").glob("sm_*.json"))
    *_, broken, absent, good, last = capsys.readouterr().out.strip().splitlines()
    assert [text.split()[0] for text in (broken, absent, good, last)] == [
        "broken",
        "absent",
        "good",
        "interrupted;",
    ]


def test_block_sizes_that_an_earlier_run_found_are_taken_first(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[tuple[Path, dict[str, int]]] = []
    monkeypatch.setattr(
        gpu, "import_tuned", lambda folder: taken.append((folder, ran(planted))) or ["attention of sm_90"]
    )
    out = planted / "out"
    assert gpu.main(["--out", str(out), "good"]) == 0
    assert taken == [(out / "tuned", {})]
    assert f"block sizes from {out / 'tuned'}: attention of sm_90" in capsys.readouterr().out


def test_a_part_that_passed_needs_no_log(planted: Path) -> None:
    for _ in range(2):
        assert gpu.main(["good"]) == 0
        (planted / "build" / "good.log").unlink(missing_ok=True)
    assert ran(planted) == {"good": 1}


def test_a_part_passes_by_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "_digest", lambda part: "")
    asked: list[str] = []

    def verdict() -> PartVerdict:
        asked.append("")
        return PartVerdict(len(asked) > 1, ("it is wrong", "2 left")[len(asked) - 1])

    part = Part("side", 60, command=("-c", "raise SystemExit(3)"), verdict=verdict)
    assert run_part(part, tmp_path).why == "exit status 3"
    assert asked == []
    part = replace(part, command=("-c", ""))
    for passed, why in ((False, "it is wrong"), (True, "2 left"), (True, "2 left")):
        result = run_part(part, tmp_path)
        assert (result.passed, result.why) == (passed, why)
        assert full.line(part, result, tmp_path).endswith(why)
    by_status = ("packing", "timeline-sdxl", "timeline-sdxl-refiner")
    others = [step.part for step in steps() if not step.part.tests and step.part.name not in by_status]
    assert all(part.verdict for part in others)
