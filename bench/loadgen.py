"""MLPerf's LoadGen over latentrt: it asks for pictures as its scenarios say, keeps the time, and judges.

SingleStream asks for the next picture when one is there, Offline for all at once, Server at random times of a mean
rate. Source: MLPerf inference rules, stable-diffusion-xl; its settings are `cases.MLPERF`, with Euler's steps.
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
    "LoadTest",
    "Make",
    "PipelineMaker",
    "Verdict",
    "read_summary",
    "run_loadgen",
]

QUERIES = {"SingleStream": 64, "Offline": 64, "Server": 700}
"""Scenario -> how many queries its verdict takes at the least; 99 % are certain after some hundreds."""

Make = Callable[[Sequence[int]], Images]
"""Indices of prompts -> their pictures."""


@dataclass(frozen=True)
class LoadTest:
    """How much is asked for.

    Attributes:
        scenario: of `QUERIES`.
        prompts: how many there are to choose from.
        seconds: least duration.
        queries: least number of them; in Offline, of pictures.
        rate: queries a second, in Server those that come, in Offline more than are reached, so that it lasts.
        latency: seconds that 99 % of Server have to stay under.
        batch: pictures made at once, at most.
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
        valid: its verdict.
        why_not: its reasons.
        figures: name -> value, as its summary has them.
    """

    scenario: str
    valid: bool
    why_not: list[str]
    figures: dict[str, str] = field(default_factory=dict)


class PipelineMaker:
    """latentrt in MLPerf's settings, or others; picture k has prompt k and seed k.

    Args:
        pipe: to ask.
        prompts: of the pictures.
        size: (height, width) in pixels; the model's own where None.
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
        self._asked: dict[str, Any] = {
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
            [self._prompts[index] for index in indices], seed=list(indices), **self._asked
        ).images
        return images

    def rate(self, batch: int) -> float:
        """Pictures a second in batches, by one batch after a warm-up."""
        indices = [index % len(self._prompts) for index in range(batch)]
        self(indices)
        begun = time.perf_counter()
        self(indices)
        return batch / (time.perf_counter() - begun)


class _System:
    """What is tested: a queue that one thread empties, in batches where several wait."""

    def __init__(self, library: Any, make: Make, batch: int) -> None:
        self._lg = library
        self._make = make
        self._batch = batch
        self._queue: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.error: Exception | None = None
        self._thread.start()

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen asks; it does not wait here."""
        for sample in samples:
            self._queue.put((sample.id, sample.index))

    def flush(self) -> None:
        """LoadGen says that no more comes for now; nothing is held back anyway."""

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (first := self._queue.get()) is not None:
            asked = [first]
            while len(asked) < self._batch and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    self._queue.put(None)
                    break
                asked.append(following)
            self._answer(asked)

    def _answer(self, asked: Sequence[tuple[int, int]]) -> None:
        """LoadGen waits for every answer, so that after an error there are empty ones, and the error is kept."""
        images: Images = np.zeros((len(asked), 0, 0, 3), np.float32)
        if self.error is None:
            try:
                images = self._make([index for _, index in asked])
            except Exception as error:
                self.error = error
        held = [np.ascontiguousarray(image) for image in images]
        self._lg.QuerySamplesComplete(
            [
                self._lg.QuerySampleResponse(id_, image.ctypes.data, image.nbytes)
                for (id_, _), image in zip(asked, held, strict=True)
            ]
        )


def run_loadgen(test: LoadTest, make: Make, folder: Path, warmed: set[int] | None = None) -> Verdict:
    """One scenario; LoadGen's logs are left in `folder`.

    Args:
        warmed: batch sizes that `make` made before, to which those are added that it makes here; none where None.

    Raises:
        BackendUnavailableError: mlcommons-loadgen is not installed.
        BenchmarkError: a picture could not be made, or LoadGen wrote no summary.
    """
    lg = _library()
    folder.mkdir(parents=True, exist_ok=True)
    largest = 1 if test.scenario == "SingleStream" else test.batch
    warmed = set() if warmed is None else warmed
    for count in range(1, largest + 1):
        if count not in warmed:  # the first call of a size compiles, or captures its graph
            make([index % test.prompts for index in range(count)])
            warmed.add(count)
    picture = min(_seconds(make) for _ in range(3)) if test.scenario == "SingleStream" else 0.0
    system = _System(lg, make, test.batch)
    sut = lg.ConstructSUT(system.issue, system.flush)
    qsl = lg.ConstructQSL(test.prompts, test.prompts, _nothing, _nothing)
    try:
        lg.StartTestWithLogSettings(sut, qsl, _settings(lg, test, picture), _log_settings(lg, folder))
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
    """LoadGen's verdict and figures.

    Raises:
        BenchmarkError: it says neither VALID nor INVALID.
    """
    text = file.read_text("utf-8") if file.is_file() else ""
    found = re.search(r"^Result is\s*: (VALID|INVALID)", text, re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"{file} holds no verdict of LoadGen")
    pairs = re.findall(r"^([^:\n]+?)\s*: (\S.*)$", text.partition("Test Parameters Used")[0], re.MULTILINE)
    why_not = re.findall(r"^\s*\* (.+)$", text, re.MULTILINE)
    return Verdict(scenario, found[1] == "VALID", [] if found[1] == "VALID" else why_not, dict(pairs))


def _library() -> Any:
    try:
        return import_module("mlperf_loadgen")
    except ImportError as error:
        raise BackendUnavailableError(
            'MLPerf\'s LoadGen is not installed; pip install mlcommons-loadgen, or "latentrt[bench]"'
        ) from error


def _seconds(make: Make) -> float:
    """Of one picture."""
    begun = time.perf_counter()
    make([0])
    return time.perf_counter() - begun


def _settings(lg: Any, test: LoadTest, picture: float) -> Any:
    """`picture` is the seconds that one takes; for SingleStream only."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, test.scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1e3 * test.seconds)
    settings.min_query_count = test.queries
    settings.performance_sample_count_override = test.prompts
    if test.scenario == "SingleStream":
        # LoadGen makes up duration / this queries, twice that to be safe, and runs out where they are answered sooner.
        settings.single_stream_expected_latency_ns = max(1, round(1e9 * picture / 2))
    elif test.scenario == "Offline":
        # LoadGen asks for rate x duration x 1.1 pictures in its one query.
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


def _nothing(indices: Sequence[int]) -> None:
    """Prompts are in memory all along."""
