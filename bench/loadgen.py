"""MLPerf's LoadGen over latentrt: it sends queries as its scenarios say, takes the times, and decides whether a run is
valid.

SingleStream sends a query when the last one is answered, Offline sends all at once, and Server sends them at random
times of a mean rate. Source: MLPerf inference rules, stable-diffusion-xl; its settings are `cases.MLPERF`, with the
sampler Euler.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailableError, BenchmarkError, RequestError
from ..runtime.pipeline import Pipeline
from .cases import MLPERF
from .side import Images

__all__ = [
    "QUERIES",
    "Generate",
    "LoadTest",
    "PipelineRunner",
    "Verdict",
    "read_summary",
    "run_loadgen",
]

QUERIES = {"SingleStream": 64, "Offline": 64, "Server": 700}
"""Scenario -> the least number of queries that its verdict needs; a 99th percentile takes some hundreds."""

Generate = Callable[[Sequence[int]], Images]
"""Indices of prompts -> their pictures."""


@dataclass(frozen=True)
class LoadTest:
    """The load of one run.

    Attributes:
        scenario: a key of `QUERIES`.
        prompts: how many there are to choose from.
        seconds: minimum duration.
        queries: minimum number of queries; in Offline, of pictures.
        rate: queries a second. In Server this is the rate at which they are sent; in Offline it must be more than the
            system reaches, so that the run lasts long enough.
        latency: limit of Server's 99th percentile in seconds.
        batch: maximum batch size.
    """

    scenario: str
    prompts: int
    seconds: float = 60.0
    queries: int = 64
    rate: float = 1.0
    latency: float = 20.0
    batch: int = 1

    def __post_init__(self) -> None:
        if self.scenario not in QUERIES:
            raise RequestError(f"no scenario {self.scenario!r}; there are {', '.join(QUERIES)}")
        for name in ("prompts", "seconds", "queries", "rate", "latency", "batch"):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class Verdict:
    """What LoadGen's own log says.

    Attributes:
        valid: whether the run is VALID.
        reasons: why it is INVALID; empty if it is valid.
        figures: name -> value, as in its summary.
    """

    scenario: str
    valid: bool
    reasons: list[str]
    figures: dict[str, str] = field(default_factory=dict)


class PipelineRunner:
    """Generates pictures with a pipeline, by default in MLPerf's settings; picture k has prompt k and seed k.

    Args:
        pipe: to run.
        prompts: of the pictures.
        size: (height, width) in pixels; the model's own if None.
    """

    def __init__(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        steps: int = MLPERF["steps"],
        guidance: float = MLPERF["guidance"],
    ) -> None:
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe
        self._prompts = prompts
        height, width = size or (None, None)
        self._call_args: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "negative_prompt": MLPERF["negative"],
            "sampler": "euler",
            "output_type": "np",
        }

    def __call__(self, indices: Sequence[int]) -> Images:
        images: Images = self._pipe(
            [self._prompts[index] for index in indices], seed=list(indices), **self._call_args
        ).images
        return images

    def rate(self, batch: int) -> float:
        """Measure pictures a second in batches of this size, on one batch after a warm-up."""
        indices = [index % len(self._prompts) for index in range(batch)]
        self(indices)
        started = time.perf_counter()
        self(indices)
        return batch / (time.perf_counter() - started)


class _SystemUnderTest:
    """MLPerf's system under test (SUT): a queue that one thread serves, in batches if several samples wait."""

    def __init__(self, library: Any, generate: Generate, batch: int) -> None:
        self._lg = library
        self._generate = generate
        self._batch = batch
        self._queue: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.error: Exception | None = None
        self._thread.start()

    def issue(self, samples: Sequence[Any]) -> None:
        """Take a query from LoadGen, without waiting for its answer."""
        for sample in samples:
            self._queue.put((sample.id, sample.index))

    def flush(self) -> None:
        """LoadGen sends no more for now. Nothing to do: no sample is held back for a larger batch."""

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (first := self._queue.get()) is not None:
            samples = [first]
            while len(samples) < self._batch and not self._queue.empty():
                sample = self._queue.get()
                if sample is None:
                    self._queue.put(None)
                    break
                samples.append(sample)
            self._answer(samples)

    def _answer(self, samples: Sequence[tuple[int, int]]) -> None:
        """Generate and return a batch. LoadGen waits for every answer, so after an error the answers are empty, and
        the error is stored."""
        images: Images = np.zeros((len(samples), 0, 0, 3), np.float32)
        if self.error is None:
            try:
                images = self._generate([index for _, index in samples])
            except Exception as error:
                self.error = error
        contiguous = [np.ascontiguousarray(image) for image in images]
        self._lg.QuerySamplesComplete(
            [
                self._lg.QuerySampleResponse(id_, image.ctypes.data, image.nbytes)
                for (id_, _), image in zip(samples, contiguous, strict=True)
            ]
        )


def run_loadgen(
    test: LoadTest, generate: Generate, folder: Path, warm_sizes: set[int] | None = None
) -> Verdict:
    """Run one scenario; LoadGen writes its logs to `folder`.

    Args:
        warm_sizes: batch sizes that `generate` has run before. Those of this run are added; None means none yet.

    Raises:
        BackendUnavailableError: mlcommons-loadgen is not installed.
        BenchmarkError: a picture could not be made, or LoadGen wrote no summary.
    """
    lg = _import_loadgen()
    folder.mkdir(parents=True, exist_ok=True)
    largest = 1 if test.scenario == "SingleStream" else test.batch
    warm_sizes = set() if warm_sizes is None else warm_sizes
    for count in range(1, largest + 1):
        if count not in warm_sizes:  # the first call of a size compiles, or captures its graph
            generate([index % test.prompts for index in range(count)])
            warm_sizes.add(count)
    image_seconds = min(_time_image(generate) for _ in range(3)) if test.scenario == "SingleStream" else 0.0
    system = _SystemUnderTest(lg, generate, test.batch)
    sut = lg.ConstructSUT(system.issue, system.flush)
    qsl = lg.ConstructQSL(test.prompts, test.prompts, _no_op, _no_op)
    try:
        lg.StartTestWithLogSettings(sut, qsl, _settings(lg, test, image_seconds), _log_settings(lg, folder))
    finally:
        lg.DestroyQSL(qsl)
        lg.DestroySUT(sut)
        system.close()
    if system.error is not None:
        raise BenchmarkError(
            f"{test.scenario}: a picture could not be made: {system.error}"
        ) from system.error
    return read_summary(folder / "mlperf_log_summary.txt", test.scenario)


def read_summary(file: Path, scenario: str) -> Verdict:
    """Read LoadGen's verdict and figures.

    Raises:
        BenchmarkError: it says neither VALID nor INVALID.
    """
    text = file.read_text("utf-8") if file.is_file() else ""
    match = re.search(r"^Result is\s*: (VALID|INVALID)", text, re.MULTILINE)
    if match is None:
        raise BenchmarkError(f"{file} holds no verdict of LoadGen")
    pairs = re.findall(r"^([^:\n]+?)\s*: (\S.*)$", text.partition("Test Parameters Used")[0], re.MULTILINE)
    reasons = re.findall(r"^\s*\* (.+)$", text, re.MULTILINE)
    return Verdict(scenario, match[1] == "VALID", [] if match[1] == "VALID" else reasons, dict(pairs))


def _import_loadgen() -> Any:
    try:
        return import_module("mlperf_loadgen")
    except ImportError as error:
        raise BackendUnavailableError(
            'MLPerf\'s LoadGen is not installed; pip install mlcommons-loadgen, or "latentrt[bench]"'
        ) from error


def _time_image(generate: Generate) -> float:
    """Seconds for one picture."""
    started = time.perf_counter()
    generate([0])
    return time.perf_counter() - started


def _settings(lg: Any, test: LoadTest, image_seconds: float) -> Any:
    """`image_seconds` is the time for one picture, which only SingleStream needs."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, test.scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1e3 * test.seconds)
    settings.min_query_count = test.queries
    settings.performance_sample_count_override = test.prompts
    if test.scenario == "SingleStream":
        # LoadGen prepares duration / latency queries and fails if it runs out of them: half the latency doubles them.
        settings.single_stream_expected_latency_ns = max(1, round(1e9 * image_seconds / 2))
    elif test.scenario == "Offline":
        # LoadGen's single query has rate x duration x 1.1 samples.
        settings.min_query_count = 1
        settings.offline_expected_qps = max(test.rate, test.queries / (1.1 * test.seconds))
    else:
        settings.server_target_qps = test.rate
        settings.server_target_latency_ns = round(1e9 * test.latency)
        settings.server_target_latency_percentile = 0.99
    return settings


def _log_settings(lg: Any, folder: Path) -> Any:
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    settings = lg.LogSettings()
    settings.log_output = output
    settings.enable_trace = False
    return settings


def _no_op(indices: Sequence[int]) -> None:
    """Loading and unloading samples: prompts are always in memory."""
