"""`bench/kernel_timing.py`: measuring dry. Kernels run in Triton's interpreter, and the clock is a fake."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.dry_timing import ATTENTION, BF16, FALLEN, SMALL, SimulatedGpu, fake_timer, small_attention
from latentrt.bench import kernel_timing, verdicts
from latentrt.bench import kernels as timings
from latentrt.bench.kernel_timing import HUNG, Timing
from latentrt.kernels import tuning
from latentrt.kernels._dispatch import forced
from latentrt.kernels.registry import OpSpec, specs
from torch import Tensor


def test_measuring(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate, launches counted, baselines that fail; what takes the most first."""
    path = here.folder / "kernels-a-fake.json"
    monkeypatch.setattr(sys, "argv", ["cli.py", "kernels", "--measure", "--out", "a folder"])
    with forced(), tuning.trying("attention", SMALL[1]):
        none = timings.measure(Timing(here.device, fake_timer, -1.0, here.folder), [small_attention()], BF16)
        assert none["rows"] == []
        assert none["left"] == [["attention", "two", "bfloat16"], ["attention", "one", "bfloat16"]]
        assert verdicts.resumable_verdict(here.folder, "kernels") == (True, "2 left")
        result = timings.measure(here, [small_attention()], BF16)
    assert json.loads(path.read_text()) == result
    assert verdicts.resumable_verdict(here.folder, "kernels") == (True, "")
    assert [row["case"] for row in result["rows"]] == ["two", "one"]
    assert result["left"] == []
    assert {"gpu", "commit", "versions", "sources", "tuned", "command"} <= result["machine"].keys()
    assert result["machine"]["command"] == "latentrt kernels --measure --out 'a folder'"
    row = result["rows"][0]
    assert row["correct"]
    assert row["launches"] == {"_attention": 1}
    assert row["tflops"] == pytest.approx(1e6 / 19e-6 / 1e12)
    assert row["share"] == pytest.approx(row["tflops"] / result["ceilings"]["bfloat16"])
    assert row["baselines"] == {"itself": 19.0, "broken": "RuntimeError: no such back end"}
    assert row["speedup_over_best"] == 1.0
    table = list(timings.lines(result))
    assert table[1].split() == [
        "attention,",
        "two,",
        "bfloat16",
        "19.0",
        "0",
        "TFLOP/s",
        f"{row['share']:.0%}",
        "1.00x",
        "itself",
    ]
    assert table[-1] == "0 left"
    copied = {**result, "rows": [{**row, "tflops": 0.0, "tbs": 3.4567, "share": 0.8}]}
    assert "3457 GB/s    80%" in list(timings.lines(copied))[1]
    assert "in bfloat16; copies" in table[-2]


def test_what_exceeds_the_cache_is_counted_twice(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what an operator reads twice; the share of the ceiling is of the same bytes."""
    cases = [
        replace(case, flops=0, again=2560)
        for case in small_attention(candidates={"attention": SMALL[1:]}).cases
    ]
    monkeypatch.setattr(timings, "l2_bytes", lambda device: 1000)
    with forced(), tuning.trying("attention", SMALL[1]):
        result = timings.measure(here, [small_attention(cases=cases, limit="copy")], BF16)
    row = result["rows"][0]
    assert result["cache"] == 1000
    assert row["bytes"] == 2 * 5120 + 2 * 2560 - 1000
    assert row["tbs"] == pytest.approx(row["bytes"] / row["us"] * 1e-6)
    assert row["share"] == pytest.approx(row["tbs"] / result["ceilings"]["copy"])


def test_measuring_resumes(here: Timing) -> None:
    """A row that failed or was interrupted is run again, one that took the process along is not."""
    path = here.folder / "kernels-a-fake.json"
    calls: list[object] = []

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    def died(*args: Any) -> None:
        calls.append(args)
        raise SystemExit

    with forced(), tuning.trying("attention", SMALL[1]):
        with pytest.raises(KeyboardInterrupt):
            timings.measure(here, [small_attention(op=interrupted)], BF16)
        left = json.loads(path.read_text())
        assert (left["rows"], [case for _, case, _ in left["left"]]) == ([], ["two", "one"])
        with pytest.raises(SystemExit):
            timings.measure(here, [small_attention(op=died)], BF16)
        assert [row["error"] for row in json.loads(path.read_text())["rows"]] == [HUNG]
        fallen = timings.measure(here, [small_attention(op=ATTENTION.reference)], BF16)
        assert [row["error"] for row in fallen["rows"]] == [HUNG, FALLEN]
        result = timings.measure(here, [small_attention()], BF16)
        assert [(row["case"], "us" in row) for row in result["rows"]] == [("two", False), ("one", True)]
        again = timings.measure(here, [small_attention(op=died)], BF16)
    assert again["rows"] == result["rows"]
    assert len(calls) == 1


def test_the_state_is_of_the_gpu_that_is_timed(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts the GPUs that it was shown; NVML finds the one by its UUID."""

    class Gpu:
        def driver(self) -> str:
            return "580.1"

        def state(self) -> dict[str, float]:
            return {"sm_mhz": 1980.0}

    asked: list[torch.device] = []
    monkeypatch.setattr(kernel_timing, "open_nvml", lambda device: asked.append(device) or Gpu())
    second = Timing(torch.device("cuda:1"), fake_timer)
    assert kernel_timing.run_metadata(second).items() >= {"driver": "580.1", "sm_mhz": 1980.0}.items()
    assert asked == [torch.device("cuda:1")]
    monkeypatch.undo()
    assert kernel_timing.gpu_state(here) == {}


@pytest.mark.parametrize("changed", ["gpu", "driver", "cuda", "versions", "sources", "tuned"])
def test_times_of_another_machine_are_not_continued(changed: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    machine = {"gpu": "H200", "driver": "580.1", "cuda": "13.0", "versions": {}, "sources": "s", "tuned": "t"}
    path.write_text(json.dumps({"machine": machine}))
    assert kernel_timing.read_resumable(path, machine, "tuned") == ({"machine": machine}, machine)
    other = {**machine, changed: "another"}
    assert kernel_timing.read_resumable(path, other, "tuned") == ({}, other)
    assert bool(kernel_timing.read_resumable(path, other)[0]) is (changed == "tuned")


@pytest.mark.parametrize("without", ["earlier", "now", "both"])
def test_a_driver_that_could_not_be_read_does_not_drop_earlier_times(without: str, tmp_path: Path) -> None:
    """NVML may fail once; what is read in both runs has to be equal. What either one read is written."""
    path = tmp_path / "kernels.json"
    machine = {"gpu": "H200", "driver": "580.1", "cuda": "13.0", "versions": {}, "sources": "s"}
    unread = {name: value for name, value in machine.items() if name != "driver"}
    path.write_text(json.dumps({"machine": machine if without == "now" else unread}))
    earlier, now = kernel_timing.read_resumable(path, machine if without == "earlier" else unread)
    assert earlier != {}
    assert now == {**machine, "driver": None if without == "both" else "580.1"}
    other = {**unread, "cuda": "12.8"}
    assert kernel_timing.read_resumable(path, other) == ({}, other)


def test_a_wrong_kernel_is_not_timed(here: Timing) -> None:
    def wrong(*args: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ATTENTION.op(*args)
        return out * 1.1

    with forced(), tuning.trying("attention", SMALL[1]):
        result = timings.measure(here, [small_attention(op=wrong)], BF16)
    assert [row["error"] for row in result["rows"]] == ["wrong result"] * 2
    wrong = timings.failures(result)  # by which the command fails
    assert wrong.startswith("2 of 2 without a time: attention, two, bfloat16: wrong result; ")
    assert not any("us" in row for row in result["rows"])


def test_each_part_of_a_row_has_its_own_time(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled for a baseline is no reason to think that a kernel hangs."""
    begun: list[str] = []

    @contextmanager
    def watchdog(_: Timing) -> Iterator[None]:
        begun.append("")
        yield

    def noted(name: str) -> Callable[..., Any]:
        def call(*args: torch.Tensor) -> torch.Tensor:
            begun[-1] += name
            out: torch.Tensor = ATTENTION.op(*args)
            return out

        return call

    monkeypatch.setattr(timings, "hang_watchdog", watchdog)
    with forced(), tuning.trying("attention", SMALL[1]):
        spec = small_attention(op=noted("o"), baselines={"a": noted("a"), "b": noted("b")})
        result = timings.measure(here, [spec], BF16)
    assert all("us" in row for row in result["rows"])
    assert begun == ["o", "", "a", "b", "oab"] * 2


def test_a_baseline_may_take_inputs_of_its_own(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled too; they are made before anything is timed."""
    log: list[str] = []

    def prepare(*args: Tensor) -> tuple[Tensor, ...]:
        log.append("prepared")
        return tuple(a.contiguous() for a in args)

    def noted(name: str) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            log.append(f"{name}, {'contiguous' if q.is_contiguous() else 'strided'}")
            out: Tensor = ATTENTION.op(q, k, v)
            return out

        return call

    def timer(calls: Any, *how: Any) -> dict[str, float | str]:
        if "ours" in calls:  # and not a ceiling
            log.clear()
        return fake_timer(calls, *how)

    spec = small_attention(op=noted("ours"), baseline_inputs={"a": prepare})
    calls = {name: noted(name) for name in ("a", "a; compiled", "b")}
    monkeypatch.setattr(timings, "_baselines", lambda *_: calls)
    with forced(), tuning.trying("attention", SMALL[1]):
        result = timings.measure(Timing(here.device, timer, folder=here.folder), [spec], BF16)
    assert log == ["ours, strided", "a, contiguous", "a; compiled, contiguous", "b, strided"]
    assert result["rows"][0]["baselines"].keys() == calls.keys()


def test_a_lost_gpu_ends_the_run(here: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "gpu_is_alive", lambda _: False)
    result = timings.measure(here, [small_attention()], BF16)  # not forced: no kernel of ours runs
    assert len(result["rows"]) == 1
    assert result["left"] == [["attention", "one", "bfloat16"]]
    assert timings.failures(result).endswith(FALLEN)
    assert verdicts.resumable_verdict(here.folder, "kernels") == (True, "1 left")
    again = timings.measure(here, [small_attention()], BF16)
    assert [row["case"] for row in again["rows"]] == ["two", "one"]  # not the first one again
    assert again["left"] == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    simulated.install(monkeypatch)
    monkeypatch.setattr(kernel_timing, "reset_generator", simulated.left.append)
    return simulated


@pytest.mark.parametrize(("count", "us"), [(7, 9.75), (13, 4.88), (80, 0.61), (1, 3000.0)])
def test_what_takes_as_long_has_the_same_time_whenever_it_is_replayed(
    count: int, us: float, gpu: SimulatedGpu
) -> None:
    """Nothing of what the host takes to launch a graph, and hardly any of what the device takes to start it."""
    calls = {name: lambda: gpu.kernel(us) for name in ("ours", "theirs", "compiled")}
    times = kernel_timing.cuda_microseconds({**calls, "slow": lambda: gpu.kernel(2 * us)}, [()] * count, 0.0)
    assert times["slow"] == pytest.approx(2 * us, rel=0.002)
    assert [times[name] for name in calls] == pytest.approx([us] * 3, rel=0.002)
    assert min(us for graphs in gpu.rounds if len(graphs) > 1 for us in graphs) > 950.0
    alone = kernel_timing.cuda_microseconds({"": lambda: gpu.kernel(us)}, [()] * count, 0.0)
    assert alone == {"": pytest.approx(us, rel=0.002)}


def test_each_round_has_another_first_graph(gpu: SimulatedGpu) -> None:
    """A round begins while the device is busy, which a sleep sees to."""
    calls = {str(us): lambda us=us: gpu.kernel(us) for us in (1500.0, 2000.0, 2500.0)}
    kernel_timing.cuda_microseconds(calls, [()], 0.0)
    rounds = [graphs for graphs in gpu.rounds if len(graphs) > 1]
    assert rounds[:4] == [
        [1500.0, 2000.0, 2500.0],
        [2000.0, 2500.0, 1500.0],
        [2500.0, 1500.0, 2000.0],
        [1500.0, 2000.0, 2500.0],
    ]
    assert len(rounds) == 7


def test_what_cannot_be_recorded_is_told_of(gpu: SimulatedGpu) -> None:
    """It leaves the stream and random numbers as they were."""

    def fails(us: float) -> None:
        raise ValueError("not for this shape")

    calls = {"ours": gpu.kernel, "none": fails, "waits": lambda us: gpu.synchronize()}
    assert kernel_timing.cuda_microseconds(calls, [(500.0,), (1500.0,)], 0.0) == {
        "ours": pytest.approx(1000.0, rel=0.002),
        "none": "ValueError: not for this shape",
        "waits": "RuntimeError: not while a stream is captured",
    }
    assert gpu.left == ["the current stream", torch.device("cuda", 0)]


def test_calls_write_to_other_memory_until_their_inputs_are_used_again(gpu: SimulatedGpu) -> None:
    """Else each would write to what the one before has left in the cache. Nothing is kept afterwards."""
    results: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def call() -> Tensor:
        if gpu.recording is None:
            results.clear()
        alive.append(sum(result() is not None for result in results))
        gpu.kernel(100.0)
        out = torch.empty(1)
        results.append(weakref.ref(out))
        return out

    kernel_timing.cuda_microseconds({"": call}, [()] * 5, 0.0)
    one_pass, passes = alive[6:11], alive[11:]
    assert one_pass == [0, 1, 2, 3, 4]
    assert passes == [0, 1, 2, 3, 4, *[5] * 5]
    assert not any(result() is not None for result in results)


@pytest.mark.parametrize("mib", [50, 126], ids=["H200", "B200"])
@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_what_the_calls_of_a_graph_touch_is_four_times_the_cache(
    spec: OpSpec, mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more inputs than that takes: the VAE's are large."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=mib << 20)
    )
    timing = Timing(torch.device("cuda"), fake_timer)
    for case in (replace(case, inputs=lambda *_: ()) for case in spec.cases):
        count = len(kernel_timing.make_inputs(timing, case, torch.bfloat16))
        nbytes = case.nbytes(torch.bfloat16)
        assert count * nbytes >= 4 * mib << 20 > (count - 1) * nbytes


def test_a_hang_is_given_up() -> None:
    """In a process of its own, because it ends it."""
    import subprocess
    import sys

    program = (
        "import time, torch\n"
        "from latentrt.bench import kernel_timing as t\n"
        "with t.hang_watchdog(t.Timing(torch.device('cuda'), None), 0.2): time.sleep(3600)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
