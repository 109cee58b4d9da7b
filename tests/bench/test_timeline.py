"""Gaps between steps, from traces whose gaps are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.bench import timeline
from latentrt.bench.cases import case_named
from latentrt.bench.machine import describe_machine
from latentrt.errors import BenchmarkError

STEP, GAP = 1000.0, 7.0


class Trace:
    """Graphs that are launched two ahead, each of kernels that leave the device idle for 4 us between them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]
        self.now = 500.0  # on the device
        self.host = 0.0
        self._number = 0

    def event(self, cat: str, name: str, ts: float, dur: float, **args: Any) -> None:
        self.events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args})

    def step(self, kernels: int, *, wait: float = 0.0, gap: float = GAP) -> None:
        self._number += 1
        self.event("cuda_runtime", "cudaEventSynchronize", self.host, wait, correlation=9000 + self._number)
        self.host += wait + 12.0
        self.event("cuda_runtime", "cudaGraphLaunch", self.host, 3.0, correlation=self._number)
        self.host += 3.0
        self.now += gap
        each = (STEP - 4.0 * (kernels - 1)) / kernels
        for k in range(kernels):
            kind = "gpu_memcpy" if k == 0 else "kernel"
            at = self.now + k * (each + 4.0)
            self.event(kind, f"k{k}", at, each, correlation=self._number, stream=7)
            # One on another stream at the same time: it is busy once.
            self.event("kernel", f"side {k}", at + each / 2, each / 4, correlation=self._number, stream=8)
        self.now += STEP

    def json(self) -> dict[str, Any]:
        self.event("kernel", "of no graph", self.now, 5.0, correlation=8999)
        self.event("cpu_op", "aten::add", 0.0, 5.0)
        return {"traceEvents": self.events[::-1]}


def two_loops() -> Trace:
    trace = Trace()
    for k in range(24):
        trace.step(10, wait=0.0 if k < 2 else 900.0, gap=GAP if k != 5 else 50.0)
    for k in range(6):
        trace.step(12, wait=900.0, gap=GAP if k else 21.0)
    trace.step(3, gap=30.0)
    return trace


def test_steps_gaps_and_the_host_s_time() -> None:
    base, refiner, decode = timeline.runs_of(timeline.launches_of(two_loops().json()))
    assert (base.launches, base.kernels) == (24, 20)
    assert (refiner.launches, refiner.kernels) == (6, 24)
    assert (decode.launches, decode.kernels) == (1, 6)
    assert base.step == pytest.approx(STEP)
    assert base.idle_within == pytest.approx(9 * 4.0)
    assert base.gap == pytest.approx(GAP)
    assert base.gap_most == pytest.approx(50.0)
    assert base.gap_after == pytest.approx(21.0)
    assert refiner.gap_after == pytest.approx(30.0)
    assert base.host == pytest.approx(15.0)  # 12 before the launch and 3 in it; the wait is not the host's
    assert (decode.gap, decode.gap_after, decode.host) == (None, None, None)


def test_the_table_and_the_json_say_the_same() -> None:
    runs = timeline.runs_of(timeline.launches_of(two_loops().json()))
    lines = timeline.table(runs).splitlines()
    assert len(lines) == 2 + 3
    assert lines[2] == "| 24 | 20 | 1.000 | 36.0 | 7.0 | 50.0 | 21.0 | 15.0 |"
    assert lines[4] == "| 1 | 6 | 1.000 | 8.0 | - | - | - | - |"


def test_steps_that_overlap_leave_no_gap() -> None:
    trace = Trace()
    for _ in range(3):
        trace.step(4, gap=-100.0)
    (run,) = timeline.runs_of(timeline.launches_of(trace.json()))
    assert (run.gap, run.gap_most) == (0.0, 0.0)


def test_a_trace_without_graphs_is_refused() -> None:
    trace = Trace()
    trace.event("kernel", "k", 0.0, 1.0, correlation=1)
    with pytest.raises(BenchmarkError, match="no launch of a recorded graph; profile a GPU, with graphs"):
        timeline.launches_of(trace.json())


def test_a_case_is_profiled_each_time_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make gpu --again` asks for it, and does not ask for what passed otherwise."""
    done: list[str] = []

    def profiled(case: Any, folder: Path, backend: str) -> dict[str, Any]:
        done.append(backend)
        return two_loops().json()

    machine = {**describe_machine(), "commit": "0123abc"}
    monkeypatch.setattr(timeline, "profile", profiled)
    monkeypatch.setattr(timeline, "describe_machine", lambda: machine)
    first, second = (
        timeline.measure(case_named("sdxl"), tmp_path, "triton", tmp_path / "out") for _ in range(2)
    )
    assert first == second
    assert done == ["triton"] * 2
    report = json.loads((tmp_path / "out" / "sdxl.json").read_text("utf-8"))
    assert [run["launches"] for run in report["runs"]] == [24, 6, 1]
    assert report["machine"] == machine


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_what_is_profiled_is_the_benchmark_s_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its third picture, by graphs that the first two recorded."""
    opened: list[Any] = []
    seeds: list[int] = []

    def open_side(case: Any, device: torch.device, dtype: torch.dtype, folder: Path, **options: Any) -> Any:
        opened.append((case.name, device.type, dtype, folder, options))
        return lambda prompts, given: seeds.extend(given)

    monkeypatch.setattr(timeline, "open_side", open_side)
    monkeypatch.setattr(timeline, "resolve_models", lambda case, *_: case)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    trace = timeline.profile(case_named("sdxl"), tmp_path, "triton")
    options = {"backend": "triton", "graphs": True}
    assert opened == [("sdxl", "cuda", torch.float16, tmp_path, options)]
    assert seeds == [0, 1, 2]
    assert trace["traceEvents"]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert timeline.main([]) == 1
    assert "a timeline is of a GPU" in capsys.readouterr().err


def test_eager_has_no_captured_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        timeline.main(["--backend", "eager"])
    assert "eager PyTorch has no captured steps" in capsys.readouterr().err
