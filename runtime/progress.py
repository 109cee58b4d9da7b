"""What a call reports while it runs: a progress bar, the time each stage took, and whether to stop."""

from __future__ import annotations

import reprlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import BackendError, OutOfMemoryError, RequestError
from .denoise import OnStep

__all__ = ["StepCallback", "Watch"]

StepCallback = Callable[[int, float, dict[str, Any]], Mapping[str, Any] | None]
"""(step, timestep, {"latents": x}) -> None, or a mapping with `latents` to go on with or `interrupt`."""


class Watch:
    """One call's progress.

    Attributes:
        stop: set to end the call after the step it is at.
        timings: seconds of each stage that has ended; `total` when the call has.
    """

    def __init__(self, steps: int, options: Mapping[str, Any], callback: StepCallback | None) -> None:
        """A bar over `steps`; `options` are tqdm's, and by default it shows on a terminal only."""
        self.stop = threading.Event()
        self.timings: dict[str, float] = {}
        self._bar = tqdm(total=steps, **{"disable": None, "leave": False, "unit": "step", **options})
        self._callback = callback
        self._step = 0

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Time what happens inside, work queued on the device included.

        Raises:
            OutOfMemoryError: in place of what PyTorch or a back end says of that.
        """
        self._bar.set_description(name)
        begun = time.perf_counter()
        try:
            yield
            if device.type == "cuda":
                torch.cuda.current_stream(
                    device
                ).synchronize()  # the whole device would break another thread's capture
        except (RuntimeError, MemoryError, BackendError) as error:
            if not _is_out_of_memory(error):
                raise
            why = next(iter(str(error).splitlines()), "")
            raise OutOfMemoryError(
                f"no memory left on {device} in stage {name!r} ({why}); ask for fewer images at once, a smaller size "
                "or a dtype of half precision, or end what else runs there"
            ) from error
        self.timings[name] = time.perf_counter() - begun

    def begin_again(self) -> None:
        """Forget the steps and stages so far."""
        self._step = 0
        self._bar.reset()
        self.timings.clear()

    def count(self) -> None:
        """A step of whichever expert."""
        self._step += 1
        self._bar.update()

    @property
    def on_step(self) -> OnStep | None:
        """What the loop is to call after each step; None where the caller wants to hear nothing."""
        return None if self._callback is None else self._ask

    def _ask(self, _: int, timestep: float, latents: Tensor) -> Tensor | None:
        """Hear the caller.

        Raises:
            RequestError: the callback returned something else than it may.
        """
        assert self._callback is not None
        answer = self._callback(self._step - 1, timestep, {"latents": latents})
        if answer is None:
            return None
        if not isinstance(answer, Mapping) or not set(answer) <= {"latents", "interrupt"}:
            raise RequestError(
                f"callback_on_step_end returned {reprlib.repr(answer)}; "
                "it can return a mapping with 'latents' or 'interrupt'"
            )
        if answer.get("interrupt"):
            self.stop.set()
        replaced = answer.get("latents")
        if replaced is None:
            return None
        if not isinstance(replaced, Tensor) or replaced.shape != latents.shape:
            got = list(replaced.shape) if isinstance(replaced, Tensor) else f"as a {type(replaced).__name__}"
            raise RequestError(
                f"callback_on_step_end returned latents {got}; they are a tensor {list(latents.shape)}"
            )
        return replaced

    def close(self) -> None:
        """Remove the bar and sum the timings."""
        self._bar.close()
        self.timings["total"] = sum(self.timings.values())


def _is_out_of_memory(error: Exception) -> bool:
    """Whether that is what PyTorch, ONNX Runtime or TensorRT mean: only on CUDA does PyTorch have an error for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "outofmemory", "allocate memory", "bad_alloc"))
