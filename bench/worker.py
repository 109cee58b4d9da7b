"""The process of one side: it takes requests from a pipe and answers them. Tests use `Worker` in their own process."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..errors import BenchmarkError
from .cases import DTYPES, Case, SideSpec
from .machine import commit, is_commit
from .monitor import BusyElsewhere, MemorySampler, Series, memory_now
from .nvml import GpuShare, open_nvml
from .profile import Profile, Sessions, profile_sessions, profiled
from .shutdown import exit_with_parent
from .side import Images, Side, factory

__all__ = ["Job", "Run", "Trace", "Worker", "serve"]

_BUILT = "built"
_CODE = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
"""Where PyTorch, Triton and the driver keep compiled code."""


@dataclass(frozen=True)
class Job:
    """What a process is to do: one side of one case, in a folder of its own for what it builds; with `profiled`, so
    that its operators can be told apart, which makes them slower."""

    case: Case
    side: SideSpec
    device: str
    folder: Path
    profiled: bool = False

    @property
    def dtype(self) -> str:
        """The side's, else the case's."""
        return self.side.dtype or self.case.dtype

    def is_built(self) -> bool:
        """Whether an earlier run was through with building here. What one left that was not is removed, since with it
        building would look short; and what sources made that are not those of a commit, since nobody knows whether
        they are the same as now."""
        if (self.folder / _BUILT).exists() and is_commit(commit()):
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def note_built(self) -> None:
        """The next run need not build."""
        (self.folder / _BUILT).touch()


@dataclass(frozen=True)
class Trace:
    """Memory during one run, in bytes.

    Attributes:
        series: samples over time.
        peaks: the most of each kind.
        by_stage: the same for each stage.
        stages: (name, begin, end), in seconds of the series.
    """

    series: Series
    peaks: dict[str, float]
    by_stage: dict[str, dict[str, float]]
    stages: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Run:
    """One call of a side.

    Attributes:
        seconds: of the whole call.
        stages: seconds of each stage; what was between them is in none.
        memory: bytes of the process after it, by kind (see `monitor.Series`).
        busy_elsewhere: cores that others kept busy meanwhile.
        joules: of the GPU, where it tells.
        gpu: clocks, power and temperature after it, where it tells.
    """

    images: Images
    seconds: float
    stages: dict[str, float]
    memory: dict[str, float]
    busy_elsewhere: float
    joules: float | None = None
    gpu: dict[str, float] = field(default_factory=dict)
    trace: Trace | None = None


class Worker:
    """A side in this process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._device = torch.device(job.device)
        self._nvml = open_nvml(self._device)
        self._share = None if self._nvml is None else GpuShare(self._nvml)
        self._side: Side | None = None
        self._closing = ExitStack()
        self._sessions: Sessions | None = None

    def open(self) -> str:
        job = self._job
        job.folder.mkdir(parents=True, exist_ok=True)
        make = factory(job.side)
        if job.profiled:
            folder = self._closing.enter_context(tempfile.TemporaryDirectory(prefix="latentrt-profile-"))
            self._sessions = self._closing.enter_context(profile_sessions(Path(folder)))
        if job.dtype == "float32":
            _float32_is_float32()
        with self._turn():
            self._side = make(job.case, self._device, DTYPES[job.dtype], job.folder, **job.side.options)
        return self._settings(self._side)

    def tune(self, memory_format: str | None = None) -> tuple[str, str | None]:
        side = self._opened()
        with self._turn():
            side.tune(memory_format)
        return self._settings(side), side.memory_format

    def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
        side = self._opened()
        with self._turn():
            return (self._traced if traced else self._timed)(side, prompts, seeds)

    def profile(self, prompts: Sequence[str], seeds: Sequence[int]) -> Profile:
        side = self._opened()
        if self._sessions is None:
            raise BenchmarkError(f"{self._job.side.name} was not opened to be profiled")
        return profiled(partial(side, prompts, seeds), self._sessions)

    def _settings(self, side: Side) -> str:
        exact = self._job.dtype == "float32" and self._device.type == "cuda"
        return side.settings + (", no TF32" if exact else "")

    def _opened(self) -> Side:
        if self._side is None:
            raise BenchmarkError(f"{self._job.side.name} was asked for pictures before it was opened")
        return self._side

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """What changes in GPU memory meanwhile is this process's: the other sides wait."""
        if self._share is None:
            yield
            return
        self._share.begin()
        yield
        self._share.end()

    def _traced(self, side: Side, prompts: Sequence[str], seeds: Sequence[int]) -> Run:
        with MemorySampler(self._device, self._share) as sampler:
            made = side(prompts, seeds)
        trace = Trace(
            series=sampler.series,
            peaks=sampler.peaks(),
            by_stage=sampler.peaks_by_stage(made.spans),
            stages=[(s.name, s.begin - sampler.begun, s.end - sampler.begun) for s in made.spans],
        )
        after = memory_now(self._device, self._share)
        return Run(made.images, sampler.series["seconds"][-1], {}, after, 0.0, trace=trace)

    def _timed(self, side: Side, prompts: Sequence[str], seeds: Sequence[int]) -> Run:
        elsewhere = BusyElsewhere()
        energy = self._nvml.joules() if self._nvml else None
        begun = time.perf_counter()
        made = side(prompts, seeds)
        seconds = time.perf_counter() - begun
        spent = self._nvml.joules() if self._nvml else None
        stages: dict[str, float] = {}
        for span in made.spans:
            stages[span.name] = stages.get(span.name, 0.0) + span.end - span.begin
        return Run(
            images=made.images,
            seconds=seconds,
            stages=stages,
            memory=memory_now(self._device, self._share),
            busy_elsewhere=elsewhere.lap(),
            joules=None if energy is None or spent is None else spent - energy,
            gpu=self._nvml.state() if self._nvml else {},
        )

    def close(self) -> None:
        if self._side is not None:
            self._side.close()
            self._side = None
        self._closing.close()


def _float32_is_float32() -> None:
    """On a GPU cuDNN convolves float32 in TF32 unless it is told not to."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def serve(job: Job, threads: int, pipe: Connection) -> None:
    """The process: answers until the pipe is closed. Ctrl-C is the parent's to handle."""
    os.setsid()
    # A parent that was killed closes no pipe, and this process would disturb what runs next.
    exit_with_parent()
    os.dup2(sys.stderr.fileno(), 1)  # what libraries print is no part of a result on standard output
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _CODE:  # what another side or an earlier run compiled would make building look short
        os.environ[name] = str(job.folder / name.lower())
    torch.set_num_threads(threads)
    worker = Worker(job)
    while True:
        try:
            what, arguments, options = pipe.recv()
        except EOFError:
            return
        try:
            answer: Any = getattr(worker, what)(*arguments, **options)
            told = ("ok", answer, "")
        except Exception as error:
            told = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            pipe.send(told)
        except BrokenPipeError:  # nobody waits any more
            return
