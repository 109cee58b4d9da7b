"""LoadGen over something that makes pictures in a known time; the demo itself in `generate test-full`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrt.bench.features import demo_prompts
from latentrt.bench.loadgen import QUERIES, LoadTest, PipelineRunner, read_summary, run_loadgen
from latentrt.errors import BenchmarkError, RequestError
from latentrt.runtime.pipeline import Pipeline

PICTURE_SECONDS = 0.005


class FakeGenerate:
    def __init__(self, fails_at: int | None = None, seconds: float = PICTURE_SECONDS) -> None:
        self.batches: list[int] = []
        self._seconds = seconds
        self._fails_at = fails_at

    def __call__(self, indices: Sequence[int]) -> np.ndarray:
        if len(self.batches) == self._fails_at:
            raise RuntimeError("planted failure")
        self.batches.append(len(indices))
        assert all(0 <= index < 5 for index in indices)
        time.sleep(self._seconds)
        return np.zeros((len(indices), 4, 4, 3), np.float32)


def load_test(scenario: str, **fields: Any) -> LoadTest:
    usual = {
        "prompts": 5,
        "seconds": 0.3,
        "queries": QUERIES.get(scenario, 1),
        "rate": 400.0,
        "latency": 60.0,
        "batch": 8,
    }
    if scenario == "Offline":  # more than there can be, so that it lasts long enough
        usual["rate"] = 2000.0
    return LoadTest(scenario, **{**usual, **fields})


@pytest.mark.parametrize("scenario", QUERIES)
def test_every_scenario_is_valid(scenario: str, tmp_path: Path) -> None:
    generate = FakeGenerate()
    verdict = run_loadgen(load_test(scenario), generate, tmp_path)
    assert verdict.valid, verdict
    assert "Result is : VALID" in " ".join((tmp_path / "mlperf_log_summary.txt").read_text().split())
    assert sum(generate.batches) > 64
    largest = 1 if scenario == "SingleStream" else 8
    assert generate.batches[:largest] == list(
        range(1, largest + 1)
    )  # no size is made for the first time while it is timed
    if scenario == "SingleStream":
        assert set(generate.batches) == {1}
        assert float(verdict.figures["90.0th percentile latency (ns)"]) >= 1e9 * PICTURE_SECONDS
    if scenario == "Offline":
        assert set(generate.batches[8:-1]) == {8}
        assert float(verdict.figures["Samples per second"]) <= 8 / PICTURE_SECONDS


def test_a_size_is_made_for_warming_up_once_in_a_run(tmp_path: Path) -> None:
    """The second scenario, with larger batches, warms up only those that the first had not."""
    generate, warm_sizes = FakeGenerate(), set[int]()
    run_loadgen(load_test("Server", batch=3), generate, tmp_path / "server", warm_sizes)
    assert generate.batches[:3] == [1, 2, 3]
    before = len(generate.batches)
    run_loadgen(load_test("Offline", batch=5), generate, tmp_path / "offline", warm_sizes)
    assert generate.batches[before : before + 2] == [4, 5]
    assert warm_sizes == {1, 2, 3, 4, 5}


def test_a_quick_model_lasts_as_long_as_it_has_to(tmp_path: Path) -> None:
    """64 pictures are through long before; LoadGen makes up its queries beforehand, by what a picture should take."""
    generate = FakeGenerate(seconds=0.0005)
    verdict = run_loadgen(load_test("SingleStream", latency=20.0), generate, tmp_path)
    assert verdict.valid, verdict
    assert len(generate.batches) > 2 * 64


def test_unusable_options_are_refused_before_anything_is_loaded(
    run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(Pipeline, "from_pretrained", loaded)
    code, _, err = run_cli("bench", "loadgen", "--scenario", "Offline", "--scenario", "MultiStream")
    assert code != 0
    assert "no scenario 'MultiStream'; there are" in err
    code, _, err = run_cli("bench", "loadgen", "--queries", "0")
    assert code != 0
    assert "queries is 0; it must be above 0" in err


@pytest.mark.parametrize(
    ("arguments", "refiner"),
    [
        ((), "demo"),
        (("--refiner", "none"), None),
        (("--model", "other"), None),
        (("--refiner", "mine"), "mine"),
    ],
)
def test_the_refiner_is_that_of_generate(
    arguments: tuple[str, ...],
    refiner: str | None,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(_: str, refiner: str | None, **options: Any) -> None:
        raise RequestError(f"with {refiner}")

    monkeypatch.setattr(Pipeline, "from_pretrained", loaded)
    assert run_cli("bench", "loadgen", *arguments) == (1, "", f"latentrt: with {refiner}\n")


@pytest.mark.parametrize("scenario", ["Offline", pytest.param("SingleStream", marks=pytest.mark.full)])
def test_the_demo_in_small(scenario: str, tmp_path: Path) -> None:
    """One step of 64x64 on eager, so that nothing is exported first."""
    pipe = Pipeline.from_pretrained("demo", backend="eager", device="cpu")
    generate = PipelineRunner(pipe, demo_prompts(5), size=(64, 64), steps=1)
    assert generate([3, 1]).shape == (2, 64, 64, 3)
    verdict = run_loadgen(load_test(scenario, rate=1.0), generate, tmp_path)
    assert verdict.valid, verdict


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_demo_is_valid_in_every_scenario(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    """As the README has it: the demo in settings that fit a machine of two cores."""
    code, out, err = run_cli(
        *("bench", "loadgen", "--refiner", "demo", "--backend", "onnxruntime", "--size", "64x64"),
        *("--steps", "4", "--seconds", "10", "--batch", "8"),
    )
    print(out)
    assert (code, err) == (0, "")
    verdicts = [line for line in out.splitlines() if line.endswith("VALID") and not line.startswith(" ")]
    assert verdicts == [f"{scenario}: VALID" for scenario in QUERIES]
    for scenario in QUERIES:
        summary = Path("out", "loadgen", scenario, "mlperf_log_summary.txt").read_text()
        assert "Result is : VALID" in " ".join(summary.split())


def test_too_slow_a_server_is_invalid_and_says_why(tmp_path: Path) -> None:
    verdict = run_loadgen(load_test("Server", latency=0.001), FakeGenerate(), tmp_path)
    assert not verdict.valid
    assert verdict.reasons


def test_an_error_ends_the_test_and_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="Offline: a picture could not be made: planted failure"):
        run_loadgen(load_test("Offline"), FakeGenerate(fails_at=9), tmp_path)


def test_bad_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match="no scenario 'MultiStream'; there are SingleStream, Offline, Server"
    ):
        load_test("MultiStream")
    with pytest.raises(RequestError, match="seconds is 0; it must be above 0"):
        load_test("Server", seconds=0)
    (tmp_path / "x.txt").write_text("nothing")
    with pytest.raises(BenchmarkError, match="holds no verdict"):
        read_summary(tmp_path / "x.txt", "Server")
