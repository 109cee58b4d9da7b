"""`bench/run.py` and `worker.py`: what is planted in a side is what is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers.fake_clock import FakeClock
from helpers.planted_sides import CASE, STEPS, planted, rows
from latentrt.bench.cases import Case
from latentrt.bench.host import OwnProcess
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun
from latentrt.bench.worker import Worker


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
    difference = slow.median.value - quick.median.value
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
    assert leaky.growths["resident"] == pytest.approx(leak / 2, rel=0.25)


def test_a_sound_side_does_not_grow(measure: Callable[..., CaseResult]) -> None:
    memory = measure(planted("tight"), rounds=7).rows[0].batches[0].memory
    assert memory is not None
    assert abs(memory.growths["resident"]) < 4 << 20


def test_a_peak_shows_in_its_stage(measure: Callable[..., CaseResult]) -> None:
    spike = 64 << 20
    # In a process of its own, as sides are: in one of gigabytes, what tests before it freed may serve the spike.
    spiky, alone = planted("spiky", spike_bytes=spike, step_seconds=0.1), partial(OwnProcess, threads=1)
    memory = measure(spiky, rounds=2, open_host=alone).rows[0].batches[0].memory
    assert memory is not None
    base, decode = (memory.by_stage[stage]["resident"] for stage in ("base", "decode"))
    assert decode - base > 0.8 * spike
    assert memory.peaks["resident"] == pytest.approx(decode, rel=0.01)
    assert [name for name, _, _ in memory.stages] == ["base", "decode"]
    assert max(memory.series["resident"]) == memory.peaks["resident"]


def test_a_long_series_is_thinned_and_keeps_its_peak(measure: Callable[..., CaseResult]) -> None:
    values = [5.0] * 601
    values[400] = 9.0

    class Sampled(Worker):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            made = super().run(*args, **kwargs)
            series = {"seconds": [float(k) for k in range(601)], "resident": values}
            return made if made.trace is None else replace(made, trace=replace(made.trace, series=series))

    memory = measure(planted("a"), rounds=1, open_host=Sampled).rows[0].batches[0].memory
    assert memory is not None
    assert len(memory.series["seconds"]) == len(memory.series["resident"]) == 201
    assert memory.series["resident"] == [5.0] * 133 + [9.0] + [5.0] * 67
    assert memory.series["seconds"][133] == 401


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


@pytest.mark.parametrize("many", [1, 256])
def test_pictures_that_are_not_finite_are_no_reference(
    many: int, measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.bench.judging._MAX_FLOAT_PICTURES", many)  # of which bytes are kept
    result = measure(planted("nan", nan=True), planted("sound"), planted("wrong", wrong_from=0), rounds=1)
    assert result.reference == "sound"
    status, reason = ("failed", "a picture is not") if many == 1 else ("invalid", "PSNR -inf dB")
    assert [row.status for row in result.rows] == [status, "measured", "invalid"]
    assert result.rows[0].reason.startswith(reason)
    alone = measure(planted("alone", nan=True))
    assert (alone.rows[0].status, alone.reference) == (status, None)


@pytest.mark.parametrize("rounds", [2, 5])
def test_pictures_that_go_wrong_while_timed_withhold_the_speed_too(
    rounds: int, measure: Callable[..., CaseResult]
) -> None:
    # 2 pictures, a warm-up, a traced run and a round are right.
    wrong = rows(measure(planted("right"), planted("late", wrong_from=5), rounds=rounds))["late"]
    assert (wrong.status, wrong.batches) == ("invalid", [])
    assert wrong.reason.startswith("batch 1: PSNR")


def test_bytes_do_not_hide_that_the_last_timed_picture_is_not_finite(
    measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.bench.judging._MAX_FLOAT_PICTURES", 1)

    class Late(Worker):
        calls = 0

        def run(self, *args: Any, **kwargs: Any) -> Any:
            made = super().run(*args, **kwargs)
            Late.calls += self._job.side.name == "late"
            # A picture in the process before, 2 pictures, a warm-up, a traced run and a round are right.
            return replace(made, images=made.images * np.nan) if Late.calls == 7 else made

    late = rows(measure(planted("right"), planted("late"), rounds=2, open_host=Late))["late"]
    assert (late.status, late.reason) == ("failed", "batch 1: a picture is not finite")
    assert late.batches == []


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


def test_many_pictures_are_kept_as_bytes(
    measure: Callable[..., CaseResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.bench.judging._MAX_FLOAT_PICTURES", 2)
    monkeypatch.setattr("latentrt.bench.judging._REPORT_PICTURES", 1)
    runs: list[CaseRun] = []
    begin = CaseRun.measure
    monkeypatch.setattr(CaseRun, "measure", lambda self: (runs.append(self), begin(self)))
    found = rows(measure(planted("right"), planted("other"), planted("late", wrong_from=6), pictures=3))
    assert found["other"].quality.psnr == 200
    assert found["other"].batches[0].psnr == 200
    assert (found["late"].status, found["late"].reason[:13]) == ("invalid", "batch 1: PSNR")
    sides = {side.spec.name: side for side in runs[0]._sides}
    assert [(sides[name].images.dtype, len(sides[name].images)) for name in ("right", "other")] == [
        (np.uint8, 3),
        (np.uint8, 1),
    ]
    pictures = runs[0].pictures["right"]
    assert (pictures.dtype, pictures.shape) == (np.float32, (1, 32, 32, 3))
    assert 0.5 < pictures.max() <= 1


def test_a_leak_on_the_gpu_shows_though_the_host_has_none(measure: Callable[..., CaseResult]) -> None:
    class Leaking(Worker):
        held = 1e9

        def run(self, *args: Any, **kwargs: Any) -> Any:
            self.held += 4e6
            made = super().run(*args, **kwargs)
            return replace(made, memory={**made.memory, "allocated": self.held, "gpu": 2e9})

    case = Case("planted", "nothing real", "none", steps=1, batches=(2,))
    memory = measure(planted("a"), case=case, open_host=Leaking, rounds=5).rows[0].batches[0].memory
    assert memory.growths["allocated"] == pytest.approx(2e6)
    assert memory.growths["gpu"] == 0
    assert memory.at_rest["gpu"] == 2e9
    assert memory.at_rest["allocated"] == pytest.approx(
        1e9 + 4e6 * 7
    )  # the median of 5 after 2 pictures and 2 runs


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
