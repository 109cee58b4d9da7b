"""A call's progress: bar, callbacks, interruption, and the time of each stage."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import BackendError, OutOfMemoryError, RequestError
from .checks import shown
from .image import check_readable
from .place import memory_ran_out
from .previews import Previewer, StepReports
from .streams import Event, Pace, current_stream

__all__ = ["CallProgress", "ProgressCallback", "StepCallback"]

StepCallback = Callable[[int, float, dict[str, Any]], Mapping[str, Any] | None]
"""(step, timestep, {"latents": x}) -> None, or a mapping with `latents` to go on with or `interrupt`."""

ProgressCallback = Callable[[int, dict[str, Any]], Mapping[str, Any] | None]
"""(steps done, {"preview": uint8 [B, h, w, 3] on the CPU, or None}) -> None, or a mapping with `interrupt` or
`discard`."""


class CallProgress:
    """One call's progress; the `StepHooks` of its loops.

    Attributes:
        stop: set to end the call after the current step.
        interrupted: whether a loop ended early because of that.
        discarded: whether the caller no longer wants the images.
        in_callback: a callback is running, or has raised an error.
        timings: seconds of each stage, and their `total`, once the call has ended.
    """

    def __init__(
        self,
        steps: int,
        options: Mapping[str, Any],
        device: torch.device,
        *,
        on_step: StepCallback | None = None,
        on_progress: ProgressCallback | None = None,
        previewer: Previewer | None = None,
    ) -> None:
        """A bar over `steps`; `options` are tqdm's, and by default it shows on a terminal only."""
        self.stop = threading.Event()
        self.interrupted = False
        self.discarded = False
        self.in_callback = False
        self.timings: dict[str, float] = {}
        # A service may have no stderr at all, which tqdm does not bear.
        file = io.StringIO() if sys.stderr is None else sys.stderr
        shown_as = {"disable": None, "leave": False, "unit": "step", "file": file, **options}
        self._bar = tqdm(total=steps, **shown_as)
        self._on_step, self._on_progress = on_step, on_progress
        self._step = 0
        self._device = device
        self._stream = current_stream(device)
        self._stages: list[tuple[str, Event, Event]] = []
        self._reports = None if on_progress is None else StepReports(self._stream, previewer, self._report)
        self._pace = Pace(self._stream)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block on the device, for which the host does not wait; blocks of one name are added up.

        Raises:
            OutOfMemoryError: in place of the error of PyTorch or a back end. Errors of a callback are left as they are.
        """
        self._bar.set_description(name)
        begun = self._stream.record_event(timed=True)
        try:
            yield
        except (RuntimeError, MemoryError, BackendError) as error:
            if self.in_callback or not memory_ran_out(error):
                raise
            why = next(iter(str(error).splitlines()), "")
            raise OutOfMemoryError(
                f"no memory left on {self._device} in stage {name!r} ({why}); ask for fewer images at once, a smaller "
                "size or a dtype of half precision, or end what else runs there"
            ) from error
        self._stages.append((name, begun, self._stream.record_event(timed=True)))

    def before_step(self) -> bool:
        """Wait for the step before the last, report those that are done, and say whether to go on."""
        self._pace.wait()
        self.deliver()
        self.interrupted = self.stop.is_set()
        return not self.interrupted

    def after_step(self, timestep: float, latents: Tensor) -> None:
        """Count the step; where there is a step callback, wait for the device and take its answer.

        Raises:
            RequestError: the callback returned something that it may not.
        """
        self._pace.submitted()
        if self._reports is not None:
            self._reports.take(latents)
        self._step += 1
        self._bar.update()
        if self._on_step is not None:
            copy = latents.clone()
            self._pace.drain()
            replacement = self._replacement(timestep, copy)
            if replacement is not None:
                latents.copy_(replacement)

    def deliver(self) -> None:
        """Report the steps that are done by now; the callback may then interrupt the call or discard its images."""
        if self._reports is not None:
            self._reports.deliver()

    def finish(self) -> None:
        """Wait for the device, report the remaining steps, and sum the timings."""
        if self._reports is not None:
            self._reports.finish()
        if self._stages:
            self._stages[-1][2].synchronize()
        for name, begun, ended in self._stages:
            self.timings[name] = self.timings.get(name, 0.0) + begun.elapsed_time(ended) / 1000
        self.timings["total"] = sum(self.timings.values())

    def close(self) -> None:
        """Remove the bar, and drop the callbacks: they refer to the pipeline, and the reports to this (a cycle)."""
        self._bar.close()
        self._on_step = self._on_progress = self._reports = None

    def begin_again(self) -> None:
        """Forget the steps and stages so far."""
        self._step = 0
        self._bar.reset()
        self._stages.clear()
        if self._reports is not None:
            self._reports.begin_again()

    @contextmanager
    def _calling_back(self) -> Iterator[None]:
        self.in_callback = True
        yield
        # Not in a `finally`: if the callback raised, `stage` and `Calls.make` leave its error as it is.
        self.in_callback = False

    def _report(self, steps: int, preview: Tensor | None) -> None:
        """Call the progress callback."""
        assert self._on_progress is not None
        with self._calling_back():
            answer = self._on_progress(steps, {"preview": preview})
        if answer is None:
            return
        if not isinstance(answer, Mapping) or not set(answer) <= {"interrupt", "discard"}:
            raise RequestError(
                f"callback_on_progress returned {shown(answer)}; "
                "it can return a mapping with 'interrupt' or 'discard'"
            )
        self.discarded |= _is_true("discard", answer.get("discard"))
        if _is_true("interrupt", answer.get("interrupt")) or self.discarded:
            self.stop.set()

    def _replacement(self, timestep: float, latents: Tensor) -> Tensor | None:
        """The latents that the step callback returns, if any; it may also interrupt the call."""
        assert self._on_step is not None
        with self._calling_back():
            answer = self._on_step(self._step - 1, timestep, {"latents": latents})
        if answer is None:
            return None
        if not isinstance(answer, Mapping) or not set(answer) <= {"latents", "interrupt"}:
            raise RequestError(
                f"callback_on_step_end returned {shown(answer)}; "
                "it can return a mapping with 'latents' or 'interrupt'"
            )
        if _is_true("interrupt", answer.get("interrupt")):
            self.stop.set()
        replaced = answer.get("latents")
        if replaced is None:
            return None
        if isinstance(replaced, Tensor):
            check_readable("latents of callback_on_step_end", replaced)
        if not isinstance(replaced, Tensor) or replaced.shape != latents.shape:
            got = list(replaced.shape) if isinstance(replaced, Tensor) else f"as a {type(replaced).__name__}"
            raise RequestError(
                f"callback_on_step_end returned latents {got}; they are a tensor {list(latents.shape)}"
            )
        return replaced


def _is_true(name: str, answer: object) -> bool:
    """What a callback answers, as `if` would take it.

    Raises:
        RequestError: it is neither true nor false, as an array of several.
    """
    try:
        return bool(answer)
    except Exception as error:
        raise RequestError(f"{name} is {shown(answer)}; it can be True or False") from error
