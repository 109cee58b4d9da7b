"""`bench/shutdown.py`: runs that are ended by SIGTERM and SIGHUP, which can be caught, and by SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.waiting import has_ended, until, written
from latentrt.bench import full, kernel_timing, kernels
from latentrt.bench.full import Part, run_part
from latentrt.bench.results import read_report
from latentrt.bench.shutdown import signals_as_ctrl_c
from latentrt.bench.suite import Suite

RUN = """
import sys, torch; from pathlib import Path; from dataclasses import replace
from latentrt.bench.cases import CASES; from latentrt.bench.gates import GATES; from latentrt.bench.run import Plan
from latentrt.bench.suite import Settings, Suite; from helpers.planted_sides import planted
if __name__ == '__main__':
    case = replace(CASES['demo'], refiner=None, steps=2, batches=(1, 2))
    plan = Plan(['a'], GATES['eager'], rounds=3, pictures=2)
    settings = Settings(plan, torch.device('cpu'), Path(sys.argv[1]), 'typed', metrics=('psnr',))
    # Two first pictures, one for the gate, five at batch 1 and two at batch 2; then it works without an end.
    side = planted('a', note=sys.argv[2], busy_at=9)
    Suite([(case, [side])], settings).run()
"""


@pytest.fixture
def handlers() -> Iterator[Callable[[signal.Signals, Any], None]]:
    """Sets what a signal does, for one test."""
    before: dict[signal.Signals, Any] = {}

    def handle(number: signal.Signals, how: Any) -> None:
        before.setdefault(number, signal.signal(number, how))

    yield handle
    for number, was in before.items():
        signal.signal(number, was)


ASKED = (signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_is_one_ctrl_c(
    number: signal.Signals, handlers: Callable[[signal.Signals, Any], None]
) -> None:
    handlers(signal.SIGHUP, signal.SIG_DFL)  # whatever began the tests
    before = [signal.getsignal(each) for each in ASKED]
    with signals_as_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        for each in ASKED:
            os.kill(os.getpid(), each)  # while what was measured is being written
    assert [signal.getsignal(each) for each in ASKED] == before


def test_what_is_to_outlive_its_terminal_does(handlers: Callable[[signal.Signals, Any], None]) -> None:
    handlers(signal.SIGHUP, signal.SIG_IGN)
    with signals_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_signal_handlers_are_untouched_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended: list[bool] = []

    def elsewhere() -> None:
        with signals_as_ctrl_c():
            ended.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ended == [True]


@pytest.mark.parametrize("command", ["bench", "kernels"])
def test_commands_that_measure_take_it_so(
    command: str, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Suite, "run", ended)
    monkeypatch.setattr(kernels, "measure", ended)
    monkeypatch.setattr(kernel_timing, "require_gpu", lambda: torch.device("cpu"))
    arguments = {"bench": ("--device", "cpu"), "kernels": ("--measure",)}[command]
    code, _, err = run_cli(command, *arguments)
    assert (code, err) == (130, "latentrt: interrupted\n")


@pytest.mark.timeout(120)
def test_a_killed_run_leaves_its_results_and_no_process(tmp_path: Path) -> None:
    """After a SIGKILL, which leaves nobody the time to write or close anything."""
    script, note, out = tmp_path / "script.py", tmp_path / "note", tmp_path / "out"
    script.write_text(RUN)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])]),
    }
    process = subprocess.Popen([sys.executable, str(script), str(out), str(note)], env=environment)
    try:
        until(lambda: process.poll() is not None or (note.exists() and "b" in note.read_text()))
        assert process.poll() is None
        children = psutil.Process(process.pid).children()
        (side,) = (child for child in children if "spawn_main" in " ".join(child.cmdline()))
    finally:
        process.kill()
        process.wait()
    assert not (out / "bench.json").exists()  # or an earlier one would be lost
    found = read_report(out / "bench.partial.json")
    assert not found.complete
    (row,) = found.cases[0].rows
    assert row.status == "measured"
    assert row.first_image_seconds > 0.1
    assert len(row.batches[0].seconds) == 3
    assert has_ended(side.pid)  # or it would compute beside whatever is measured next


DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
open(sys.argv[1] + '.new', 'w').write(str(os.getpid()))
os.rename(sys.argv[1] + '.new', sys.argv[1])
time.sleep(600)
"""


def test_a_second_ctrl_c_kills_a_part_that_ignores_the_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    handlers: Callable[[signal.Signals, Any], None],
) -> None:
    """By a second Ctrl-C, while it may still write down what it has."""
    monkeypatch.setattr(full, "_digest", lambda part: "")
    handlers(signal.SIGINT, signal.default_int_handler)
    note = tmp_path / "pid"

    def impatient() -> None:
        written(note)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)

    thread = threading.Thread(target=impatient)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_part(Part("deaf", 300, command=("-c", DEAF, str(note))), tmp_path)
    assert time.monotonic() - begun < full.GRACE_SECONDS
    thread.join()
    assert has_ended(int(note.read_text()))
    assert "ending deaf, which has 45 s to write down what it found" in capsys.readouterr().out


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", ASKED)
def test_a_part_dies_with_its_runner(number: signal.Signals, tmp_path: Path) -> None:
    script, note = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(
        "import signal, sys; from pathlib import Path; from latentrt.bench import full\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "full.GRACE_SECONDS = 0.2\n"
        f"part = full.Part('deaf', 300, command=('-c', {DEAF!r}, sys.argv[1]))\n"
        "full.main([], parts=(part,), folder=Path(sys.argv[2]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(note), str(tmp_path / "build")],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        written(note)
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert has_ended(int(note.read_text()))
