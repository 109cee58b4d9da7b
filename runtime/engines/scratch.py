"""The one buffer that all TensorRT engines of a device compute in, and whose turn it is."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ...errors import BackendError

__all__ = ["Scratch"]


class Scratch:
    """The memory that the engines of one device compute in, and whose turn it is.

    Attributes:
        lock: held while a call is put on its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def begin(self, stream: torch.cuda.Stream, size: int) -> Tensor:
        """At least `size` bytes, for work put on `stream` from now on."""
        if torch.cuda.is_current_stream_capturing():
            if self._buffer.numel() < size:
                raise BackendError("an engine was captured before it had run; run it once at these sizes")
            return self._buffer
        self._follow(stream)
        if self._buffer.numel() < size:
            # torch keeps the old one until the work that was put on this stream has used it.
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffer

    def end(self, stream: torch.cuda.Stream) -> None:
        """What was put on `stream` since `begin` is all."""
        if not torch.cuda.is_current_stream_capturing():
            self._buffer.record_stream(stream)
            self._last = (stream, stream.record_event())

    def wait(self) -> None:
        """Until the device has done what was put on streams between `begin` and `end`, and on the current stream.

        TensorRT forbids to destroy a context that is running.
        """
        stream = torch.cuda.current_stream(self._device)
        self._follow(stream)
        stream.synchronize()

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """What is put on `stream` from now on runs after all that ran in the buffer: each waited for the one before."""
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
