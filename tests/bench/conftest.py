"""Tiny models for real sides; planted sides, measured in this process; kernels, timed without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dry_timing import fake_timer
from helpers.planted_sides import CASE
from latentrt.bench import kernel_timing, verdicts
from latentrt.bench.cases import Case, SideSpec
from latentrt.bench.gates import GATES
from latentrt.bench.host import Host
from latentrt.bench.kernel_timing import Timing
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.worker import Job, Worker


@pytest.fixture
def case(tiny: Callable[..., Path]) -> Case:
    """Of two tiny models, base and refiner, for sides that make pictures."""
    model, refiner = (str(tiny(kind)) for kind in ("sdxl", "refiner"))
    return Case("tiny", "random", model, refiner, size=(64, 64), batches=(1, 2), steps=2, high_noise_frac=0.5)


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., CaseResult]:
    """Measure sides in this process."""

    def call(
        *sides: SideSpec,
        case: Case = CASE,
        rounds: int = 5,
        open_host: Callable[[Job], Host] = Worker,
        **plan: Any,
    ) -> CaseResult:
        run = CaseRun(
            case,
            sides,
            Plan(["a", "b"], GATES["eager"], rounds=rounds, **{"pictures": 2, **plan}),
            steps={"base": case.steps},
            device="cpu",
            folder=tmp_path,
            open_host=open_host,
        )
        run.measure()
        return run.result()

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timing:
    """A run of measurements on a stand-in for a GPU, into `results`."""
    machine = {"gpu": "A Fake", "commit": "c", "versions": {}}
    for module in (kernel_timing, verdicts):
        monkeypatch.setattr(module, "describe_machine", lambda: machine)
    return Timing(torch.device("cpu"), fake_timer, folder=tmp_path / "results")
