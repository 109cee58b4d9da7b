"""`bench/full.py`: what `make test-full` runs: every slow test is in it, and what passed is not run again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.waiting import until
from latentrt.bench import full, pytest_resume
from latentrt.bench.full import PARTS, Part, main, run_part

ROOT = Path(__file__).parents[2]


def test_every_slow_test_is_in_a_part_and_every_part_has_some() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.full\b", path.read_text("utf-8"))
    }
    listed = [file for part in PARTS for file in part.tests]  # those that no part names are in the last
    assert sorted(listed) == sorted(files)
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(bool(part.tests) != bool(part.command) for part in PARTS)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources are one file; returns a folder for results."""
    (tmp_path / "source.txt").write_text("1")
    monkeypatch.setattr(full, "_digest", lambda part: part.name + (tmp_path / "source.txt").read_text())
    return tmp_path / "build"


def counting(tmp_path: Path, then: str = "") -> Part:
    """Adds a line to a file each time it runs."""
    code = f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); {then}"
    return Part("count", 60, command=("-c", code))


def ran(tmp_path: Path) -> int:
    file = tmp_path / "ran"
    return len(file.read_text()) if file.exists() else 0


def test_what_passed_is_run_again_for_other_sources_only(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (counting(tmp_path),)
    assert main(["--list"], parts=parts, folder=places) == 0
    assert ran(tmp_path) == 0
    for times in (1, 1):
        assert main([], parts=parts, folder=places) == 0
        assert ran(tmp_path) == times
    (tmp_path / "source.txt").write_text("2")
    capsys.readouterr()
    main(["--list"], parts=parts, folder=places)
    assert capsys.readouterr().out.split() == ["count", "not", "run"]
    assert main(["count"], parts=parts, folder=places) == 0
    assert main(["--again"], parts=parts, folder=places) == 0
    assert ran(tmp_path) == 3
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"count +passed +\d+ s +-?[\d.]+ GB", line)


@pytest.mark.parametrize(("workers", "threads"), [(0, "7"), (1, "7"), (4, "1")])
def test_several_workers_share_the_cores(
    workers: int, threads: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    run_part(Part("threads", 60, command=("-c", code), workers=workers), places)
    assert (places / "threads.log").read_text().strip() == threads


def test_what_failed_is_run_again(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (
        counting(tmp_path, "print('it broke'); raise SystemExit(3)"),
        Part("good", 60, command=("-c", "")),
    )
    for times in (1, 2):
        assert main([], parts=parts, folder=places) == 1
        assert ran(tmp_path) == times
    assert "exit status 3" in capsys.readouterr().out
    assert "it broke" in (places / "count.log").read_text()
    assert main(["good"], parts=parts, folder=places) == 0  # was run although the other failed
    with pytest.raises(SystemExit):
        main(["great"], parts=parts, folder=places)
    assert "there is no part great; there are count, good" in capsys.readouterr().err


def test_a_part_that_takes_too_long_or_too_much(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {'import time; time.sleep(600)'!r}])"
    )
    result = run_part(Part("slow", 0.2, command=("-c", child)), places)
    assert (result.passed, result.why) == (False, "ended after 0 s")
    assert result.seconds < 60
    available = iter([30e9, *[5e9] * 1000])
    monkeypatch.setattr(full, "available_bytes", lambda: int(next(available)))
    result = run_part(Part("large", 60, command=("-c", "import time; time.sleep(1.5)")), places)
    assert (result.passed, result.memory) == (False, 25 * 10**9)
    assert result.why == "took 25.0 GB, the limit is 24 GB"


@pytest.mark.parametrize(("status", "why"), [(0, ""), (5, ""), (2, "ended after 0 s")])
def test_tests_that_are_through_before_they_are_ended_have_passed(
    status: int, why: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time was up, and the last of them passed while they were being ended; pytest says 2 where some did not."""
    ready = places / "ready"
    code = f"import signal, sys, time; signal.signal(2, lambda *_: sys.exit({status}))\n"
    code += f"open({str(ready)!r}, 'w').close(); time.sleep(600)"
    monkeypatch.setattr(full, "_tests", lambda *_, **__: ["-c", code])

    def over_once_it_runs(*_: object) -> tuple[bool, int]:
        until(ready.exists)
        return False, 0

    monkeypatch.setattr(full, "_watch", over_once_it_runs)
    result = run_part(Part("tests", 0.2, tests=("tests/test_a.py",)), places)
    assert (result.passed, result.why) == (not why, why)


def test_what_passed_is_noted_and_left_out(tmp_path: Path) -> None:
    now, printed, registered, dropped = tmp_path / "now", tmp_path / "printed", [], []
    options = {"--note-passed": now, "--skip-passed": now, "--note-printed": printed}
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))  # noqa: PLW0108 (by keyword)
    manager = SimpleNamespace(register=registered.append)
    config: Any = SimpleNamespace(getoption=options.get, pluginmanager=manager, hook=hook)
    pytest_resume.pytest_configure(config)
    pytest_resume.pytest_configure(
        SimpleNamespace(**vars(config), workerinput={})
    )  # the first process does it
    (notes,) = registered
    for name, call, end in (
        ("good", "passed", "passed"),
        ("bad", "failed", "passed"),
        ("late", "passed", "failed"),
    ):
        for when, outcome in (("setup", "passed"), ("call", call), ("teardown", end)):
            text = "" if name == "late" else f"{name} has 7 of 9\n"
            report = SimpleNamespace(nodeid=name, when=when, outcome=outcome, duration=1.0, capstdout=text)
            notes.pytest_runtest_logreport(report)
    with now.open("a") as file:
        file.write('["half", 0.')  # cut off: the machine stopped
    assert pytest_resume.read_passed(now) == {"good": 3.0}
    assert pytest_resume.read_printed(printed) == {"good": "good has 7 of 9\n", "bad": "bad has 7 of 9\n"}
    items: Any = [SimpleNamespace(nodeid=name) for name in ("bad", "good", "half")]
    pytest_resume.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == ["bad", "half"]
    assert [item.nodeid for item in dropped] == ["good"]


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_run_of_tests_resumes(tmp_path: Path) -> None:
    """With the plugin alone, as a part of tests runs it: in a process beside the one that notes."""
    (tmp_path / "test_some.py").write_text(
        "import pathlib, pytest\n"
        "@pytest.mark.parametrize('k', range(4))\n"
        "def test_it(k):\n"
        "    assert k != 2 or pathlib.Path('good').exists()\n"
    )
    now, before = tmp_path / "now", tmp_path / "before"

    def run() -> tuple[int, str]:
        before.write_text(now.read_text() if now.exists() else "")
        command = [
            "-m",
            "pytest",
            "-p",
            "latentrt.bench.pytest_resume",
            "-p",
            "no:cacheprovider",
            "-n",
            "1",
            "-q",
        ]
        files = ["--note-passed", str(now), "--skip-passed", str(before), "test_some.py"]
        done = subprocess.run(  # noqa: PLW1510
            [sys.executable, *command, *files], cwd=tmp_path, capture_output=True, text=True, timeout=500
        )
        return done.returncode, done.stdout

    code, out = run()
    assert (code, "1 failed, 3 passed" in out) == (1, True), out
    assert [name.partition("[")[2] for name in sorted(pytest_resume.read_passed(now))] == ["0]", "1]", "3]"]
    with now.open("a") as file:
        file.write('["test_some.py::test_it[2]", 0.')  # cut off: the machine stopped
    (tmp_path / "good").touch()
    code, out = run()
    assert (code, "1 passed" in out) == (0, True), out


def test_a_part_of_tests_leaves_out_what_passed(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def popen(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return subprocess_popen([sys.executable, "-c", "raise SystemExit(5)"])

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(full.subprocess, "Popen", popen)
    part = Part("some", 60, ("tests/test_some.py",), workers=2)
    result = run_part(part, places)
    assert result.passed  # nothing was left to run
    command = asked[0]
    now, before = (Path(command[command.index(f"--{what}-passed") + 1]) for what in ("note", "skip"))
    assert now != before
    assert command[-1] == "tests/test_some.py"
    now.write_text('["a", 1.0]\n')
    run_part(part, places, again=True)
    assert not now.exists()
    assert before.read_text() == ""


def test_figures_are_shown_in_the_end(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of this run and of tests that were left out because they had passed; not those of older sources."""
    notes = iter([{"a.py::one": "seed=0"}, {"a.py::two": "first"}, {"a.py::two": "seed=5\n"}])

    def popen(command: list[str], **options: Any) -> Any:
        file = Path(command[command.index("--note-printed") + 1])
        with file.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in next(notes).items())
        return subprocess_popen([sys.executable, "-c", "raise SystemExit(1)"])

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(full.subprocess, "Popen", popen)
    part = Part("some", 60, ("tests/test_some.py",), show_output=True)
    for _ in range(3):
        capsys.readouterr()
        assert main([], parts=(part,), folder=places) == 1
    assert capsys.readouterr().out.endswith("\none:\nseed=0\n\ntwo:\nseed=5\n")
    main(["--list"], parts=(part,), folder=places)
    assert "seed=5" in capsys.readouterr().out
    (places.parent / "source.txt").write_text("2")
    main(["--list"], parts=(part,), folder=places)
    assert "seed" not in capsys.readouterr().out
