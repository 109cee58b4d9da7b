"""How a run ends that somebody else ends: by SIGTERM, which can be caught, and by SIGKILL, which cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from latentrt.bench import kernel_timing, kernels
from latentrt.bench.endings import sigterm_as_ctrl_c
from latentrt.bench.results import read_report
from latentrt.bench.suite import Suite

RUN = """
import sys, torch; from pathlib import Path; from dataclasses import replace
from latentrt.bench.cases import CASES; from latentrt.bench.gates import GATES; from latentrt.bench.run import Plan
from latentrt.bench.suite import Settings, Suite; from planted_sides import planted
if __name__ == '__main__':
    case = replace(CASES['demo'], refiner=None, steps=2, batches=(1, 2))
    plan = Plan(['a'], GATES['eager'], rounds=3, pictures=2)
    settings = Settings(plan, torch.device('cpu'), Path(sys.argv[1]), 'typed', metrics=('psnr',))
    # Two first pictures, one for the gate, five at batch 1 and two at batch 2; then it works without an end.
    side = planted('a', note=sys.argv[2], busy_at=9)
    Suite([(case, [side])], settings).run()
"""


def test_sigterm_is_ctrl_c_and_comes_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_as_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while what was measured is being written
    assert signal.getsignal(signal.SIGTERM) is before
    ended: list[bool] = []

    def elsewhere() -> None:
        with sigterm_as_ctrl_c():
            ended.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert ended == [True]


@pytest.mark.parametrize("command", ["bench", "kernels"])
def test_commands_that_measure_take_it_so(
    command: str, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Suite, "run", ended)
    monkeypatch.setattr(kernels, "measure", ended)
    monkeypatch.setattr(kernel_timing, "require_gpu", lambda: torch.device("cpu"))
    arguments = {"bench": ("--device", "cpu"), "kernels": ("--measure",)}[command]
    code, _, err = run(command, *arguments)
    assert (code, err) == (130, "latentrt: interrupted\n")


@pytest.mark.timeout(120)
def test_what_was_measured_is_there_and_no_side_goes_on(tmp_path: Path) -> None:
    """After a SIGKILL, which leaves nobody the time to write or close anything."""
    script, note, out = tmp_path / "script.py", tmp_path / "note", tmp_path / "out"
    script.write_text(RUN)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])]),
    }
    process = subprocess.Popen([sys.executable, str(script), str(out), str(note)], env=environment)
    try:
        while not (note.exists() and "b" in note.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        (side,) = (child for child in children if "spawn_main" in " ".join(child.cmdline()))
    finally:
        process.kill()
        process.wait()
    found = read_report(out / "bench.json")
    assert not found.complete
    (row,) = found.cases[0].rows
    assert row.status == "measured"
    assert row.first_image_seconds > 0.1
    assert len(row.batches[0].seconds) == 3
    for _ in range(200):
        if not side.is_running() or side.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        side.kill()
        pytest.fail("the side computes on, beside whatever is measured next")
