"""The process of one side: it answers requests from a pipe. Tests use `Worker` in their own process."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..errors import BenchmarkError
from .cases import DTYPES, Case, SideSpec
from .machine import commit, is_clean_commit
from .monitor import BusyElsewhere, GpuSampler, MemorySampler, Series, memory_now
from .nvml import GpuShare, open_nvml
from .profile import Profile, Sessions, profile_call, profile_sessions
from .shutdown import exit_with_parent
from .side import Images, Layout, Side, factory

__all__ = ["Job", "Run", "Trace", "Worker", "serve"]

_BUILT_MARKER = "built"
_CODE_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
"""Variables that say where PyTorch, Triton and the driver store compiled code."""


@dataclass(frozen=True)
class Job:
    """One side of one case, for a process to load.

    Attributes:
        folder: for what the side builds, and for nothing else.
        profiled: load it so that it can be profiled, which makes it slower.
    """

    case: Case
    side: SideSpec
    device: str
    folder: Path
    profiled: bool = False

    @property
    def dtype(self) -> str:
        """The side's own dtype, or else the case's."""
        return self.side.dtype or self.case.dtype

    def is_built(self) -> bool:
        """Whether an earlier run has finished building here, from sources of a clean commit.

        Anything else in the folder is removed: an unfinished build would make building look faster, and a build from
        modified sources need not be of the present ones.
        """
        if (self.folder / _BUILT_MARKER).exists() and is_clean_commit(commit()):
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def note_built(self) -> None:
        """Record that the build is finished, so that the next run can use it."""
        (self.folder / _BUILT_MARKER).touch()


@dataclass(frozen=True)
class Trace:
    """Memory during one run, in bytes.

    Attributes:
        series: samples over time.
        peaks: the largest value of each kind.
        by_stage: stage -> the same during this stage.
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
        stages: seconds of each stage; time between stages is in none of them.
        memory: bytes of the process after the call, by kind (see `monitor.Series`).
        busy_elsewhere: cores that other processes kept busy during the call.
        joules: of the GPU; None if it does not report them.
        gpu: medians of its clocks, power and temperature during the call; empty if it does not report them, or if the
            call was too short to sample any.
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
        self._exit_stack = ExitStack()
        self._sessions: Sessions | None = None

    def open(self) -> str:
        job = self._job
        job.folder.mkdir(parents=True, exist_ok=True)
        open_side = factory(job.side)
        if job.profiled:
            folder = self._exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="latentrt-profile-"))
            self._sessions = self._exit_stack.enter_context(profile_sessions(Path(folder)))
        if job.dtype == "float32":
            _disable_tf32()
        with self._gpu_turn():
            self._side = open_side(job.case, self._device, DTYPES[job.dtype], job.folder, **job.side.options)
        return self._settings(self._side)

    def tune(self, layout: Layout | None = None) -> tuple[str, Layout | None]:
        side = self._loaded_side()
        with self._gpu_turn():
            side.tune(layout)
        return self._settings(side), side.layout

    def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
        side = self._loaded_side()
        with self._gpu_turn():
            return (self._traced if traced else self._timed)(side, prompts, seeds)

    def profile(self, prompts: Sequence[str], seeds: Sequence[int]) -> Profile:
        side = self._loaded_side()
        if self._sessions is None:
            raise BenchmarkError(f"{self._job.side.name} was not opened to be profiled")
        return profile_call(partial(side, prompts, seeds), self._sessions)

    def _settings(self, side: Side) -> str:
        exact = self._job.dtype == "float32" and self._device.type == "cuda"
        return side.settings + (", no TF32" if exact else "")

    def _loaded_side(self) -> Side:
        if self._side is None:
            raise BenchmarkError(f"{self._job.side.name} was asked for pictures before it was opened")
        return self._side

    @contextmanager
    def _gpu_turn(self) -> Iterator[None]:
        """Count changes of the GPU's memory in this block as this process's: the other sides wait meanwhile."""
        if self._share is None:
            yield
            return
        self._share.begin()
        yield
        self._share.end()

    def _traced(self, side: Side, prompts: Sequence[str], seeds: Sequence[int]) -> Run:
        with MemorySampler(self._device, self._share) as sampler:
            output = side(prompts, seeds)
        trace = Trace(
            series=sampler.series,
            peaks=sampler.peaks(),
            by_stage=sampler.peaks_by_stage(output.spans),
            stages=[(s.name, s.begin - sampler.started, s.end - sampler.started) for s in output.spans],
        )
        after = memory_now(self._device, self._share)
        return Run(output.images, sampler.series["seconds"][-1], {}, after, 0.0, trace=trace)

    def _timed(self, side: Side, prompts: Sequence[str], seeds: Sequence[int]) -> Run:
        elsewhere = BusyElsewhere()
        energy_before = self._nvml.joules() if self._nvml else None
        with nullcontext() if self._nvml is None else GpuSampler(self._nvml) as sampler:
            started = time.perf_counter()
            output = side(prompts, seeds)
            seconds = time.perf_counter() - started
        energy_after = self._nvml.joules() if self._nvml else None
        stages: dict[str, float] = {}
        for span in output.spans:
            stages[span.name] = stages.get(span.name, 0.0) + span.end - span.begin
        return Run(
            images=output.images,
            seconds=seconds,
            stages=stages,
            memory=memory_now(self._device, self._share),
            busy_elsewhere=elsewhere.lap(),
            joules=None if energy_before is None or energy_after is None else energy_after - energy_before,
            gpu={} if sampler is None else sampler.state(),
        )

    def close(self) -> None:
        if self._side is not None:
            self._side.close()
            self._side = None
        self._exit_stack.close()


def _disable_tf32() -> None:
    """Turn TF32 off, in which cuDNN would convolve float32 by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def serve(job: Job, threads: int, pipe: Connection) -> None:
    """The process's main function: answers until the pipe is closed. Only the parent handles Ctrl-C."""
    os.setsid()
    # A parent that was killed closes no pipe, and this process would disturb what runs next.
    exit_with_parent()
    # Standard output is for results, and libraries print to it.
    os.dup2(sys.stderr.fileno(), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Code that another side or an earlier run compiled would make building look faster.
    for name in _CODE_CACHES:
        os.environ[name] = str(job.folder / name.lower())
    torch.set_num_threads(threads)
    worker = Worker(job)
    while True:
        try:
            method, arguments, options = pipe.recv()
        except EOFError:
            return
        try:
            answer: Any = getattr(worker, method)(*arguments, **options)
            reply = ("ok", answer, "")
        except Exception as error:
            reply = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            pipe.send(reply)
        except BrokenPipeError:  # the parent no longer waits for an answer
            return
