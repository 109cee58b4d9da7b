"""The instrument tells the truth: what is planted in a side is what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from fake_clock import FakeClock
from latentrt.bench.cases import Case, SideSpec
from latentrt.bench.gates import GATES
from latentrt.bench.host import Host, Job, OwnProcess, Worker
from latentrt.bench.results import CaseResult, Row, read_report
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.suite import Settings, Suite
from latentrt.errors import BenchmarkError
from planted_sides import planted

STEPS = 5
CASE = Case("planted", "nothing real", "none", steps=STEPS)


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


def rows(result: CaseResult) -> dict[str, Row]:
    return {row.side: row for row in result.rows}


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_planted_sleep_shows_as_long_as_it_is(
    real: bool, measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not real:
        FakeClock().install(monkeypatch)
    found = rows(measure(planted("quick", step_seconds=0.005), planted("slow", step_seconds=0.025), rounds=9))
    quick, slow = (found[name].batches[0] for name in ("quick", "slow"))
    step = slow.stages["base_step"] - quick.stages["base_step"]
    assert step == pytest.approx(0.020, abs=0.004 if real else 1e-5)
    difference = slow.latency.median.value - quick.latency.median.value
    assert difference == pytest.approx(STEPS * 0.020, abs=0.02 if real else 1e-4)
    assert slow.speedup.high < 0.5
    assert quick.speedup.value == 1.0
    assert slow.speedup.low <= slow.speedup.value <= slow.speedup.high


def test_a_planted_leak_shows_in_memory(measure: Callable[..., CaseResult]) -> None:
    leak = 32 << 20  # so much that what libraries take meanwhile is nothing beside it
    case = Case("planted", "nothing real", "none", steps=1, batches=(2,))
    found = rows(measure(planted("tight"), planted("leaky", leak_bytes=leak), case=case, rounds=7))
    tight, leaky = (found[name].batches[0].memory for name in ("tight", "leaky"))
    # Both are in this process here: a leak shows in whoever is measured beside it too.
    assert tight is not None
    assert leaky is not None
    assert leaky.growth == pytest.approx(leak / 2, rel=0.25)


def test_a_sound_side_does_not_grow(measure: Callable[..., CaseResult]) -> None:
    memory = measure(planted("tight"), rounds=7).rows[0].batches[0].memory
    assert memory is not None
    assert abs(memory.growth) < 4 << 20


def test_a_peak_shows_in_its_stage(measure: Callable[..., CaseResult]) -> None:
    spike = 64 << 20
    memory = (
        measure(planted("spiky", spike_bytes=spike, step_seconds=0.02), rounds=2).rows[0].batches[0].memory
    )
    assert memory is not None
    base, decode = (memory.by_stage[stage]["resident"] for stage in ("base", "decode"))
    assert decode - base > 0.8 * spike
    assert memory.peaks["resident"] == pytest.approx(decode, rel=0.01)
    assert [name for name, _, _ in memory.stages] == ["base", "decode"]
    assert max(memory.series["resident"]) == memory.peaks["resident"]


def test_wrong_pictures_withhold_the_speed(measure: Callable[..., CaseResult]) -> None:
    found = rows(measure(planted("right"), planted("wrong", wrong_from=0)))
    wrong = found["wrong"]
    assert wrong.status == "invalid"
    assert "PSNR" in wrong.reason
    assert wrong.batches == []
    assert wrong.first_image_seconds is None
    assert wrong.quality is not None
    assert wrong.quality.psnr < 20
    assert found["right"].status == "measured"


def test_pictures_that_go_wrong_while_timed_withhold_the_speed_too(
    measure: Callable[..., CaseResult],
) -> None:
    # 2 pictures, a warm-up, a traced run and a round are right.
    wrong = rows(measure(planted("right"), planted("late", wrong_from=5)))["late"]
    assert (wrong.status, wrong.batches) == ("invalid", [])
    assert wrong.reason.startswith("batch 1: PSNR")


def test_pictures_of_a_batch_are_judged_when_the_reference_is_out_by_then(
    measure: Callable[..., CaseResult],
) -> None:
    found = rows(measure(planted("reference", fails_at=4), planted("late", wrong_from=5)))
    assert found["reference"].status == "failed"
    assert found["late"].status == "invalid"
    alone = rows(measure(planted("alone", wrong_from=5)))["alone"]  # beside what it made one by one itself
    assert alone.status == "invalid"


def test_a_batch_in_another_order_is_wrong(measure: Callable[..., CaseResult]) -> None:
    case = Case("planted", "nothing real", "none", steps=1, batches=(1, 3))
    found = rows(measure(planted("right"), planted("mixed", reverses=True), case=case, rounds=2))
    assert found["right"].status == "measured"
    assert (found["mixed"].status, found["mixed"].reason[:8]) == ("invalid", "batch 3:")


def test_trying_settings_out_is_no_part_of_the_first_picture(
    measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeClock().install(monkeypatch)
    row = measure(planted("tuned", tuning_seconds=100), rounds=1).rows[0]
    assert row.settings == "planted and tuned"
    assert row.first_image_seconds is not None
    assert row.first_image_seconds < 1


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_side_that_fails_is_told_and_the_rest_goes_on(at: int, measure: Callable[..., CaseResult]) -> None:
    found = rows(measure(planted("failing", fails_at=at), planted("sound"), rounds=3))
    assert (found["failing"].status, found["failing"].reason) == ("failed", "planted [96mfailure")
    assert found["failing"].batches == []
    assert len(found["sound"].batches[0].seconds) == 3
    assert found["sound"].batches[0].speedup is None  # there is nothing that it would be beside


def test_a_side_that_builds_is_first_measured_in_a_process_before(measure: Callable[..., CaseResult]) -> None:
    opened = []

    def counting(job: Job) -> Host:
        opened.append(job.side.name)
        return Worker(job)

    builds = SideSpec("builds", "", "planted_sides:open_planted", {"step_seconds": 0.01}, builds=True)
    found = rows(measure(planted("plain"), builds, open_host=counting, rounds=1))
    assert opened == ["plain", "builds", "builds"]
    assert found["plain"].build_seconds is None
    assert found["builds"].build_seconds is not None
    assert found["builds"].build_seconds >= STEPS * 0.01


def test_what_an_earlier_run_built_is_told_and_not_timed(
    measure: Callable[..., CaseResult], tmp_path: Path
) -> None:
    opened = []

    def counting(job: Job) -> Host:
        opened.append(job.folder)
        return Worker(job)

    def build(**options: Any) -> Row:
        side = SideSpec("builds", "", "planted_sides:open_planted", options, builds=True)
        return measure(side, open_host=counting, rounds=1).rows[0]

    first, second, other = build(), build(), build(step_seconds=0.001)
    assert [len(set(opened[:3])), len(opened)] == [1, 5]
    assert (first.built_before, second.built_before, other.built_before) == (False, True, False)
    assert first.build_seconds is not None
    assert second.build_seconds is None
    (opened[0] / "built").unlink()  # as an interruption leaves it
    (opened[0] / "half an export").touch()
    assert build().build_seconds is not None
    assert not (opened[0] / "half an export").exists()


def test_rounds_take_turns(measure: Callable[..., CaseResult]) -> None:
    order = []

    class Noting(Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self._name = job.side.name

        def run(self, *args: Any, **kwargs: Any) -> Any:
            order.append(self._name)
            return super().run(*args, **kwargs)

    measure(planted("a"), planted("b"), planted("c"), open_host=Noting, rounds=3, pictures=1)
    assert "".join(order[-9:]) == "abcbcacab"


def test_a_side_that_compiles_for_each_size_is_measured_at_the_first_on_a_cpu(
    measure: Callable[..., CaseResult],
) -> None:
    compiled = SideSpec("compiled", "", "planted_sides:open_planted", compiles_each_size=True)
    case = Case("planted", "nothing real", "none", steps=1, batches=(2, 3))
    found = rows(measure(planted("plain"), compiled, case=case, rounds=2))
    assert [b.batch for b in found["plain"].batches] == [2, 3]
    assert [b.batch for b in found["compiled"].batches] == [2]


def test_what_was_measured_before_ctrl_c_is_kept(tmp_path: Path) -> None:
    class Interrupted(Worker):
        calls = 0

        def run(self, *args: Any, **kwargs: Any) -> Any:
            Interrupted.calls += 1
            if Interrupted.calls == 13:  # in the second round, one side is through and the other one is not
                raise KeyboardInterrupt
            return super().run(*args, **kwargs)

    plan = Plan(["a"], GATES["eager"], rounds=9, pictures=2)
    run = CaseRun(
        CASE,
        [planted("a"), planted("b", step_seconds=0.001)],
        plan,
        steps={"base": STEPS},
        device="cpu",
        folder=tmp_path,
        open_host=Interrupted,
    )
    with pytest.raises(KeyboardInterrupt):
        run.measure()
    result = run.result()
    counts = [len(row.batches[0].seconds) for row in result.rows]
    assert sorted(counts) == [2, 2] or sorted(counts) == [1, 2]
    assert all(row.batches[0].speedup.value > 0 for row in result.rows)


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
    assert "Interrupted" in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize("interrupted", [True, False])
def test_a_whole_run_leaves_its_report(interrupted: bool, tmp_path: Path) -> None:
    class Host(Worker):
        calls = 0

        def run(self, *args: Any, **kwargs: Any) -> Any:
            Host.calls += 1
            if interrupted and Host.calls == 13:
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
    assert [row.side for row in found.cases[0].rows] == ["a", "b"]
    assert found.cases[0].steps == {"base": 2}
    rounds = 2 if interrupted else plan.rounds
    assert 1 <= len(found.cases[0].rows[0].batches[0].seconds) <= rounds
    assert ("Interrupted" in (tmp_path / "out" / "bench.md").read_text()) is interrupted
    assert (tmp_path / "out" / "bench.html").read_text().count("data:image/jpeg") == 4
    assert (tmp_path / "out" / "pictures" / "demo" / "b-1.png").is_file()


def test_the_same_run_twice_differs_by_less_than_its_interval(
    measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On sides that take 5 % more or less each time; `make test-full` does it on real ones."""
    FakeClock(noise=0.05).install(monkeypatch)
    case = replace(CASE, steps=1)
    sides = planted("a", step_seconds=0.004), planted("b", step_seconds=0.008)
    first, second = (rows(measure(*sides, rounds=9, case=case))["b"].batches[0].speedup for _ in range(2))
    assert first.low < 0.5 < first.high
    assert abs(first.value - second.value) < first.high - first.low
    assert first.value != second.value


def test_a_process_of_its_own_tells_how_it_ended(tmp_path: Path) -> None:
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
        with pytest.raises(BenchmarkError, match=r"not through with its pictures after 0 s; .* --patience"):
            host.run(["a"], [3])
        while not (note.exists() and note.read_text()):
            time.sleep(0.05)
    finally:
        host.close()
    child = psutil.Process(int(note.read_text())) if psutil.pid_exists(int(note.read_text())) else None
    assert child is None or child.status() == psutil.STATUS_ZOMBIE or child.name() != "sleep"


def test_half_precision_may_be_as_far_off_as_eager_pytorch_is() -> None:
    from latentrt.bench.gates import Quality

    judge = GATES["eager"].judge
    eager = Quality(4, psnr=30.0, ssim=0.9)
    assert judge(Quality(4, 28.0, 0.9), "float16", eager) == []
    assert judge(Quality(4, 26.0, 0.9), "float16", eager) == ["PSNR 26.0 dB, at least 27.0"]
    assert judge(Quality(4, 28.0, 0.9), "float32", eager) != []
    assert judge(Quality(4, float("nan"), 1.0), "float32", None) != []
    nonsense = Quality(4, psnr=float("-inf"), ssim=float("nan"))  # as from an eager run full of NaN
    assert judge(nonsense, "float16", nonsense) != []


def test_mlperfs_gate_wants_mlperfs_number_of_pictures() -> None:
    from latentrt.bench.gates import Quality

    judge = GATES["mlperf"].judge
    whole = Quality(
        5000, 20, 0.5, clip=31.7, clip_by="CLIP ViT-B/32 (x)", fid=23.5, fid_by="Inception-v3 (y)"
    )
    assert judge(whole, "float16", None) == []
    assert judge(replace(whole, clip=31.6, fid=24.0), "float16", None) == [
        "CLIP score 31.600, 31.686 to 31.813",
        "FID 24.000, 23.011 to 23.950",
    ]
    assert judge(Quality(8, 20, 0.5), "float16", None) == [
        "cannot be judged: 8 pictures, MLPerf has 5000",
        "cannot be judged: CLIP score was not measured",
        "cannot be judged: FID was not measured",
    ]
    other = replace(whole, clip_by="the demo's image tower", fid_by="CLIP ViT-B/32 (x)")
    assert judge(other, "float16", None) == [
        "cannot be judged: CLIP score is by the demo's image tower, MLPerf's by CLIP ViT-B/32",
        "cannot be judged: FID is by CLIP ViT-B/32 (x), MLPerf's by Inception-v3",
    ]


def test_likeness_is_that_of_the_verdict() -> None:
    """torchmetrics beside the measures of `latentrt verify`, which are written by themselves."""
    from latentrt.bench.gates import likeness
    from latentrt.export import measures

    rng = np.random.default_rng(0)
    a = rng.random((2, 48, 40, 3), dtype=np.float32)
    b = np.clip(a + 0.05 * rng.standard_normal(a.shape), 0, 1).astype(np.float32)
    x, y = (torch.from_numpy(i).permute(0, 3, 1, 2) for i in (a, b))
    found = likeness(a, b)
    assert found[0] == pytest.approx(min(measures.psnr(x[k], y[k], peak=1.0) for k in range(2)), abs=1e-3)
    assert found[1] == pytest.approx(
        min(measures.ssim(x[k : k + 1], y[k : k + 1]) for k in range(2)), abs=0.01
    )
    assert likeness(a, a) == (measures.MAX_PSNR, 1.0)
    assert likeness(np.full_like(a, np.nan), a) == (float("-inf"), -1.0)
