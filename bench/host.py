"""Runs a side in a process of its own: it has memory of its own and a cold start, and if it crashes the others go
on."""

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
from .machine import commit, installed_versions, tuned
from .models import weights_on_disk
from .profile import Profile
from .worker import Job, Run, serve

_log = logging.getLogger(__name__)

__all__ = ["Host", "OwnProcess", "job_for"]

_FAREWELL = 5.0
"""Seconds that a process may take to end by itself."""


def job_for(case: Case, side: SideSpec, device: str, folder: Path) -> Job:
    """With a folder in `folder`: another one for other weights, sizes or versions."""
    built_from = {
        "models": [(m, weights_on_disk(m)) for m in (case.model, case.refiner) if m is not None],
        "shapes": [case.size, case.batches],
        "side": [side.factory, dict(side.options), side.dtype or case.dtype, device],
        "versions": installed_versions(),
        "commit": commit(),
        "tuned": tuned(),
    }
    digest = hashlib.sha256(json.dumps(built_from, sort_keys=True).encode()).hexdigest()
    return Job(case, side, device, folder / f"{side.name.replace('@', '-')}-{digest[:12]}")


class Host(Protocol):
    """A place where one side is loaded."""

    def open(self) -> str:
        """Load the side; how it was set up."""
        ...

    def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
        """Make pictures; with `traced`, memory is sampled, which takes time of its own."""
        ...

    def tune(self, memory_format: str | None = None) -> tuple[str, str | None]:
        """Let the side try out what suits this machine, or take a memory format that was tried out before.

        Returns:
            Its settings, and its memory format if it chose one.
        """
        ...

    def profile(self, prompts: Sequence[str], seeds: Sequence[int]) -> Profile:
        """Where the time goes, of a side that was opened for it."""
        ...

    def close(self) -> None:
        """Free everything; closing again is no error."""
        ...


class OwnProcess:
    """A side in a process of its own, begun by `open`.

    Args:
        threads: of PyTorch, and so of ONNX Runtime; the same for every side.
        patience: seconds that one answer may take: loading, a picture with all that it compiles, or a batch.
    """

    def __init__(self, job: Job, *, threads: int, patience: float = 3600.0) -> None:
        self._job = job
        self._patience = patience
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(job, threads, theirs), name=job.side.name)
        self._theirs: Connection | None = theirs

    def open(self) -> str:
        self._process.start()
        if self._theirs is not None:
            self._theirs.close()  # so that the process's end is the pipe's end
            self._theirs = None
        return cast(str, self._ask("open"))

    def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
        return cast(Run, self._ask("run", list(prompts), list(seeds), traced=traced))

    def tune(self, memory_format: str | None = None) -> tuple[str, str | None]:
        return cast(tuple[str, str | None], self._ask("tune", memory_format))

    def profile(self, prompts: Sequence[str], seeds: Sequence[int]) -> Profile:
        return cast(Profile, self._ask("profile", list(prompts), list(seeds)))

    def close(self) -> None:
        if self._process.pid is None:
            return
        self._pipe.close()
        self._process.join(_FAREWELL)
        # The whole group: compilers that it began would slow down the others.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def _ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        try:
            self._pipe.send((what, arguments, options))
            if not self._pipe.poll(self._patience):
                done = {"open": "loaded", "tune": "tuned", "run": "done making its pictures"}.get(
                    what, "profiled"
                )
                raise BenchmarkError(f"not {done} after {self._patience:.0f} s; raise --patience")
            kind, answer, trace = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            killed = "; the system may have been out of memory" if code == -signal.SIGKILL else ""
            raise BenchmarkError(f"its process ended by {how}{killed}") from error
        if kind == "error":
            _log.info("%s: %s", self._job.side.name, trace)
            raise BenchmarkError(str(answer))
        return answer
