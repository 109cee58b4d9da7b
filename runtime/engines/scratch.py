"""The one workspace of all TensorRT engines of a device, which they use one after another."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ...errors import BackendError

__all__ = ["Scratch"]


class Scratch:
    """The workspace of one device's engines, whose uses are ordered whatever streams they are on.

    Attributes:
        lock: hold it while a call is put on its stream, from `begin` to `end`.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def begin(self, stream: torch.cuda.Stream, size: int) -> Tensor:
        """The workspace, uint8 of at least `size` bytes, for work that is put on `stream` from now on.

        Raises:
            BackendError: it is too small, and cannot grow while a graph is captured.
        """
        if torch.cuda.is_current_stream_capturing():
            if self._buffer.numel() < size:
                raise BackendError("an engine cannot be captured before it has run once at these sizes")
            return self._buffer
        self._follow(stream)
        if self._buffer.numel() < size:
            # PyTorch reuses the old one only after the work that was put on this stream.
            self._buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffer

    def end(self, stream: torch.cuda.Stream) -> None:
        """Call this after the last work that `begin` was called for."""
        if not torch.cuda.is_current_stream_capturing():
            self._buffer.record_stream(stream)
            self._last = (stream, stream.record_event())

    def wait(self) -> None:
        """Wait for all work put on streams between `begin` and `end`, and for the current stream.

        TensorRT forbids to destroy a context that is running.
        """
        stream = torch.cuda.current_stream(self._device)
        self._follow(stream)
        stream.synchronize()

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Order `stream` after the last use, which was ordered after those before it."""
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
