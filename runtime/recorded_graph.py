"""Work recorded and replayed on the CPU by the rules of CUDA graphs: their stand-in where there is no GPU.

A recorded graph is the list of PyTorch operations that the work ran, over the very tensors it ran them on. A replay
first overwrites the graph's own tensors with NaN, so that reading a buffer left from the replay before, a mistake with
CUDA graphs, is one here as well; operations that read a value back to the host are refused. What bypasses PyTorch's
dispatcher (`tolist`, `numpy`) is not seen, nor is a static tensor that was given other memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import CaptureError

__all__ = ["RecordedGraph", "Recording", "capture_error"]

_HOST_READS = (
    *("_local_scalar_dense", "equal", "is_nonzero", "allclose"),
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
)
"""Operations that wait for the device to tell the host a value or a size."""

_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""Operations whose result is uninitialised."""


def capture_error(what: str, operation: str, why: str) -> CaptureError:
    """That `what` cannot be captured, since an operation failed."""
    return CaptureError(
        f"{what} cannot be captured as a CUDA graph: {operation or 'its first operation'} failed ({why}); "
        "run without graphs (graphs=False, or --no-graphs)"
    )


class Recording(TorchDispatchMode):
    """The operations that ran, with the tensors they took and made."""

    def __init__(self, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self._what = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _HOST_READS:
            raise capture_error(self._what, func.name(), "it reads a value back to the host")
        out = func(*args, **kwargs)
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [
            (k, x)
            for k, x in enumerate(tree_leaves(out))
            if isinstance(x, Tensor) and x.numel() and _address(x) not in given
        ]
        self.operations.append((func, args, kwargs, made))
        return out


class RecordedGraph:
    """What a recording ran, as a `Graph`."""

    def __init__(self, recording: Recording) -> None:
        self._operations = recording.operations

    @torch.inference_mode()
    def replay(self) -> None:
        for _, _, _, made in self._operations:
            for _, x in made:
                _poison(x)
        for func, args, kwargs, made in self._operations:
            if func.overloadpacket.__name__ in _UNWRITTEN:
                continue
            out = tree_leaves(func(*args, **kwargs))
            for k, x in made:
                x.copy_(out[k])


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _poison(x: Tensor) -> None:
    """Fill with NaN; integers with their minimum, booleans with the opposite."""
    if x.dtype.is_floating_point:
        x.fill_(float("nan"))
    elif x.dtype == torch.bool:
        x.logical_not_()
    else:
        x.fill_(torch.iinfo(x.dtype).min)
