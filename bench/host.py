"""Runs a side in a process of its own, so that it has its own memory and a cold start, and a crash is only its own."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, cast

from ..errors import BenchmarkError
from .cases import Case, SideSpec
from .machine import commit, installed_versions, tuned_digest
from .models import weights_on_disk
from .profile import Profile
from .side import Layout
from .worker import Job, Run, serve

_log = logging.getLogger(__name__)

__all__ = ["Host", "OwnProcess", "job_for"]

_EXIT_SECONDS = 5.0
"""Time for a process to exit by itself, before it is killed."""


def job_for(case: Case, side: SideSpec, device: str, folder: Path) -> Job:
    """The job of a side, with a subfolder of `folder` that is another one for other weights, sizes or versions."""
    built_from = {
        "models": [(m, weights_on_disk(m)) for m in (case.model, case.refiner) if m is not None],
        "shapes": [case.size, case.batches],
        "side": [side.factory, dict(side.options), side.dtype or case.dtype, device],
        "versions": installed_versions(),
        "commit": commit(),
        "tuned": tuned_digest(),
    }
    digest = hashlib.sha256(json.dumps(built_from, sort_keys=True).encode()).hexdigest()
    return Job(case, side, device, folder / f"{side.name.replace('@', '-')}-{digest[:12]}")


class Host(Protocol):
    """A place where one side is loaded."""

    def open(self) -> str:
        """Load the side, and return its settings."""
        ...

    def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
        """Generate pictures. With `traced`, memory is sampled, which slows the call down."""
        ...

    def tune(self, layout: Layout | None = None) -> tuple[str, Layout | None]:
        """Let the side choose its fastest settings, or use a layout that was chosen before.

        Returns:
            Its settings, and its layout if it chose one.
        """
        ...

    def profile(self, prompts: Sequence[str], seeds: Sequence[int]) -> Profile:
        """Profile one call of a side whose job says `profiled`."""
        ...

    def close(self) -> None:
        """Free everything. May be called again."""
        ...


class OwnProcess:
    """A side in a process of its own, which `open` starts.

    Args:
        threads: of PyTorch, and so of ONNX Runtime; the same for every side.
        patience: seconds to wait for one answer: to loading, to a picture with all that it compiles, to the
            two or more pictures by which a side is tuned, or to a batch.
    """

    def __init__(self, job: Job, *, threads: int, patience: float = 3600.0) -> None:
        self._job = job
        self._patience = patience
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=serve, args=(job, threads, child_pipe), name=job.side.name)
        self._child_pipe: Connection | None = child_pipe

    def open(self) -> str:
        self._process.start()
        if self._child_pipe is not None:
            self._child_pipe.close()  # so that the pipe ends when the process does
            self._child_pipe = None
        return cast(str, self._ask("open"))

    def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
        return cast(Run, self._ask("run", list(prompts), list(seeds), traced=traced))

    def tune(self, layout: Layout | None = None) -> tuple[str, Layout | None]:
        return cast(tuple[str, Layout | None], self._ask("tune", layout))

    def profile(self, prompts: Sequence[str], seeds: Sequence[int]) -> Profile:
        return cast(Profile, self._ask("profile", list(prompts), list(seeds)))

    def close(self) -> None:
        if self._process.pid is None:
            return
        self._pipe.close()
        self._process.join(_EXIT_SECONDS)
        # The whole group: compilers that it started would slow down the other sides.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            self._pipe.send((method, args, kwargs))
            if not self._pipe.poll(self._patience):
                action = {"open": "loaded", "tune": "tuned", "run": "done making its pictures"}.get(
                    method, "profiled"
                )
                raise BenchmarkError(f"not {action} after {self._patience:.0f} s; raise --patience")
            kind, answer, trace = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            ending = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            killed = "; the system may have been out of memory" if code == -signal.SIGKILL else ""
            raise BenchmarkError(f"its process ended by {ending}{killed}") from error
        if kind == "error":
            _log.info("%s: %s", self._job.side.name, trace)
            raise BenchmarkError(str(answer))
        return answer
