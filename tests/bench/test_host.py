"""A side in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.planted_sides import planted
from helpers.waiting import has_ended, written
from latentrt.bench.cases import Case
from latentrt.bench.host import OwnProcess
from latentrt.bench.worker import Job
from latentrt.errors import BenchmarkError

CASE = Case("planted", "nothing real", "none", steps=5)


def test_a_process_that_dies_reports_its_signal(tmp_path: Path) -> None:
    job = Job(CASE, planted("dying", dies_at=1), "cpu", tmp_path)
    host = OwnProcess(job, threads=1)
    try:
        assert host.open() == "planted"
        run = host.run(["a"], [3], traced=True)
        assert run.images.shape == (1, 32, 32, 3)
        assert run.trace is not None
        with pytest.raises(BenchmarkError, match=r"its process ended by signal 9; .* out of memory"):
            host.run(["a"], [3])
    finally:
        host.close()
        host.close()


def test_a_process_that_hangs_is_ended_with_those_it_began(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    host = OwnProcess(Job(CASE, planted("hanging", hangs_at=0, child=str(note)), "cpu", tmp_path), threads=1)
    try:
        host.open()
        host._patience = 0.1
        with pytest.raises(BenchmarkError, match=r"not done making its pictures after 0 s; .* --patience"):
            host.run(["a"], [3])
        child = int(written(note))
    finally:
        host.close()
    assert has_ended(child)


def test_compiled_code_is_stored_in_the_process_own_folder(tmp_path: Path) -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    host = OwnProcess(Job(CASE, planted("telling", tells=names), "cpu", tmp_path / "own"), threads=1)
    try:
        folders = host.open().split("|")
    finally:
        host.close()
    assert len(set(folders)) == 3
    assert all(Path(folder).parent == tmp_path / "own" for folder in folders)
