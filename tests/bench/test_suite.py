"""A whole run: what is refused, what is left of it however it ends, and the command line's part in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.planted_reports import report
from helpers.planted_sides import planted
from helpers.waiting import until
from latentrt.bench import commands
from latentrt.bench.cases import CASES, Case
from latentrt.bench.features import MetricNetworks
from latentrt.bench.gates import GATES
from latentrt.bench.results import read_report, write_report
from latentrt.bench.run import Plan
from latentrt.bench.suite import Settings, Suite
from latentrt.bench.worker import Worker
from latentrt.errors import BackendUnavailableError, RequestError

CASE = Case("planted", "nothing real", "none", steps=5)


def test_an_interruption_before_anything_was_measured_leaves_a_report(tmp_path: Path) -> None:
    class Interrupted(Worker):
        def open(self) -> str:
            raise KeyboardInterrupt

    settings = Settings(
        Plan([], GATES["eager"]), torch.device("cpu"), tmp_path, "as typed", metrics=("psnr", "ssim")
    )
    with pytest.raises(KeyboardInterrupt):
        Suite([(replace(CASE, model="demo"), [planted("a")])], settings, open_host=Interrupted).run()
    found = read_report(tmp_path / "bench.json")
    assert (found.complete, found.cases[0].rows[0].batches) == (False, [])
    assert found.cases[0].rows[0].first_image_seconds is None
    assert "Interrupted" in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_whole_run_leaves_its_report(interrupted: bool, tmp_path: Path) -> None:
    class Host(Worker):
        calls = 0

        def run(self, *args: Any, **kwargs: Any) -> Any:
            Host.calls += 1
            if interrupted and Host.calls == 15:
                raise KeyboardInterrupt
            return super().run(*args, **kwargs)

    case = Case("demo", "nothing real", "demo", steps=2)
    plan = Plan([], GATES["eager"], pictures=2)
    settings = Settings(plan, torch.device("cpu"), tmp_path / "out", "as typed", metrics=("psnr", "ssim"))
    suite = Suite([(case, [planted("a"), planted("b", wrong_from=99)])], settings, open_host=Host)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            suite.run()
    else:
        assert suite.run().complete
    found = read_report(tmp_path / "out" / "bench.json")
    assert found.complete is not interrupted
    assert found.command == "as typed"
    assert len(found.conditions["load"]) == 2
    assert 0 < found.cases[0].seconds <= found.seconds
    assert found.cases[0].groups == [["a", "b"]]
    assert [row.side for row in found.cases[0].rows] == ["a", "b"]
    assert found.cases[0].steps == {"base": 2}
    rounds = 2 if interrupted else plan.rounds
    assert 1 <= len(found.cases[0].rows[0].batches[0].seconds) <= rounds
    assert ("Interrupted" in (tmp_path / "out" / "bench.md").read_text()) is interrupted
    assert (tmp_path / "out" / "bench.html").read_text().count("data:image/jpeg") == 4
    assert (tmp_path / "out" / "pictures" / "demo" / "b-1.png").is_file()


def test_an_earlier_report_stays_whole_until_there_is_another(tmp_path: Path) -> None:
    write_report(tmp_path / "bench.json", report())
    noted: list[int] = []

    class Host(Worker):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            assert read_report(tmp_path / "bench.json").command == "latentrt bench"
            if (tmp_path / "bench.partial.json").exists():
                found = read_report(tmp_path / "bench.partial.json")
                assert (found.command, found.complete) == ("as typed", False)
                noted.append(len(found.cases))
            return super().run(*args, **kwargs)

    settings = Settings(
        Plan([], GATES["eager"], rounds=1), torch.device("cpu"), tmp_path, "as typed", metrics=("psnr",)
    )
    made = Suite([(replace(CASE, model="demo"), [planted("a")])], settings, open_host=Host).run()
    assert [row.status for row in made.cases[0].rows] == ["measured"]
    assert set(noted) == {1}
    found = read_report(tmp_path / "bench.json")
    assert (found.command, found.complete) == ("as typed", True)
    assert not (tmp_path / "bench.partial.json").exists()


def test_fid_that_is_asked_for_by_name_takes_as_many_pictures_as_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise hours would pass, and the report would have none."""
    inception, truth = SimpleNamespace(name="Inception-v3 (x)"), SimpleNamespace(mean=[0.0] * 2048)
    monkeypatch.setattr("latentrt.bench.suite.InceptionFeatures", lambda path: inception)
    monkeypatch.setattr("latentrt.bench.suite.read_truth", lambda path, network: truth)

    def networks(pictures: int, *metrics: str) -> MetricNetworks:
        plan = Plan([], GATES["eager"], pictures=pictures)
        paths = {"inception": tmp_path, "truth": tmp_path}
        settings = Settings(plan, torch.device("cpu"), tmp_path, "", metrics=metrics, **paths)
        return Suite([], settings)._networks_for(CASES["sdxl"])  # of up to 8 pictures a batch

    for pictures, made in ((4, 8), (2048, 2048)):
        with pytest.raises(RequestError, match=rf"'fid' .* 2049 pictures, .* {made}; give --pictures 2049"):
            networks(pictures, "psnr", "fid")
    assert networks(2049, "fid").fid is inception
    assert networks(4).fid is inception  # by default what there is, and that is reported to be too little


def test_a_case_that_its_gate_cannot_judge_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Suite, "_networks_for", lambda self, case: MetricNetworks())
    settings = Settings(
        Plan(["a"] * 5000, GATES["mlperf"], pictures=5000),
        torch.device("cpu"),
        tmp_path / "out",
        "",
        **dict.fromkeys(("clip", "inception", "truth"), tmp_path),
    )
    suite = Suite([(CASES["demo"], [planted("a")])], settings, open_host=Worker)
    with pytest.raises(
        RequestError, match="gate 'mlperf' cannot judge case 'demo': steps is 30, and it judges"
    ):
        suite.run()
    assert not (tmp_path / "out").exists()


def test_what_was_measured_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = [(replace(CASE, name=name, model="demo"), [planted("a")]) for name in ("one", "two")]
    settings = Settings(
        Plan([], GATES["eager"], rounds=1),
        torch.device("cpu"),
        tmp_path,
        "as typed",
        metrics=("psnr", "ssim"),
    )
    suite = Suite(work, settings, open_host=Worker)
    measured = suite._run_case

    def failing(case: Case, *rest: Any) -> None:
        if case.name == "two":
            raise OSError("no space left")
        measured(case, *rest)

    monkeypatch.setattr(suite, "_run_case", failing)
    with pytest.raises(OSError, match="no space left"):
        suite.run()
    found = read_report(tmp_path / "bench.json")
    assert (found.complete, [case.case["name"] for case in found.cases]) == (False, ["one"])


@pytest.mark.full
@pytest.mark.timeout(120)
def test_a_whole_run_in_processes_ends_by_ctrl_c_with_its_report(tmp_path: Path) -> None:
    """As `latentrt bench` runs: sides in processes of their own, and a real signal to the whole group."""
    code = (
        "import sys, torch; from pathlib import Path; from dataclasses import replace\n"
        "from latentrt.bench.cases import CASES; from latentrt.bench.gates import GATES\n"
        "from latentrt.bench.run import Plan; from latentrt.bench.suite import Settings, Suite\n"
        "from helpers.planted_sides import planted\n"
        "import signal\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in a shell's background ignore it\n"
        "    case = replace(CASES['demo'], refiner=None, steps=2, batches=(1,))\n"
        "    plan = Plan(['a'], GATES['eager'], rounds=100000, pictures=1)\n"
        "    settings = Settings(plan, torch.device('cpu'), Path(sys.argv[1]), 'typed', metrics=('psnr',))\n"
        "    Suite([(case, [planted('a', note=sys.argv[2])])], settings).run()\n"
    )
    script, note, out = tmp_path / "script.py", tmp_path / "note", tmp_path / "out"
    script.write_text(code)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, sys.path), str(Path(__file__).parents[1])]),
    }
    process = subprocess.Popen([sys.executable, str(script), str(out), str(note)], env=environment)
    try:
        until(lambda: process.poll() is not None or (note.exists() and note.stat().st_size > 9))
        assert process.poll() is None  # but in a round
        process.send_signal(signal.SIGINT)
        assert process.wait(60) not in (0, -signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    found = read_report(out / "bench.json")
    assert not found.complete
    (row,) = found.cases[0].rows
    assert row.status == "measured"
    assert row.batches[0].seconds
    assert row.first_image_seconds > 0.1  # a process had to begin
    assert row.batches[0].memory.at_rest["resident"] > 1e8
    assert row.batches[0].speedup.value == 1


def asked(**changes: Any) -> Namespace:
    names = ("model", "refiner", "size", "steps", "batch", "dtype", "guidance", "high_noise_frac")
    return Namespace(**{**dict.fromkeys(names), **changes})


def test_another_base_does_not_keep_the_cases_refiner() -> None:
    other = commands._adjusted(CASES["demo"], asked(model="sdxl-random"))
    assert (other.model, other.refiner) == ("sdxl-random", None)
    both = commands._adjusted(CASES["demo"], asked(model="sdxl-random", refiner="sdxl-refiner-random"))
    assert both.refiner == "sdxl-refiner-random"
    assert commands._adjusted(CASES["demo"], asked(steps=4)).refiner == "demo"
    assert commands._adjusted(CASES["demo"], asked(refiner="none")).refiner is None


def test_a_changed_case_is_named_by_its_changes() -> None:
    case = CASES["sdxl"]
    changed = commands._adjusted(case, asked(size=(512, 768), model="/w/real", high_noise_frac=0.5))
    assert changed.summary == "sdxl with model /w/real, size 768x512, high_noise_frac 0.5"
    assert commands._adjusted(CASES["sdxl-refiner"], asked(refiner="none")).summary == (
        "sdxl-refiner with refiner none"
    )
    # Each batch size has figures of its own, and what is asked for as it is anyway is no change.
    assert commands._adjusted(case, asked(batch=(2,), steps=30)).summary == case.summary


def test_what_benchmarks_need_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "psutil" else object())
    with pytest.raises(BackendUnavailableError, match=r'^psutil is not installed; .*"latentrt\[bench\]"'):
        next(commands.bench(Namespace()))
