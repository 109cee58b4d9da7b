"""What a side is: one way to make a case's pictures, timed stage by stage by itself."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime.place import release_memory
from .cases import SideSpec
from .monitor import Span

__all__ = [
    "MEMORY_FORMATS",
    "Images",
    "Made",
    "Picture",
    "Pictures",
    "Side",
    "as_bytes",
    "as_float",
    "factory",
    "now",
    "take_quicker_layout",
    "try_convolutions",
    "vae_in",
]

_TRIAL_STEPS = 4
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Images = NDArray[np.float32]
"""[B, H, W, 3] in [0, 1]."""
Pictures = Images | NDArray[np.uint8]
"""The same, or in bytes, as where many are kept."""
Picture = NDArray[np.uint8]
"""[H, W, 3], as it is written to a file."""


def as_bytes(images: Images) -> list[Picture]:
    """Pictures in [0, 1] as they are written to files."""
    return [np.round(image * 255).clip(0, 255).astype(np.uint8) for image in images]


def as_float(pictures: Pictures) -> NDArray[np.float64]:
    """In [0, 1], whatever they are kept in."""
    scale = 255.0 if pictures.dtype == np.uint8 else 1.0
    return pictures.astype(np.float64) / scale


@dataclass(frozen=True)
class Made:
    """One call's pictures, and its stages in the order they ran: text, base, refiner, decode and others."""

    images: Images
    spans: list[Span]


class Side:
    """One way to make the pictures, loaded.

    Attributes:
        settings: how it is set up, for people to read.
        memory_format: of `MEMORY_FORMATS`, once `tune` has chosen one; None for a side that does not choose.
    """

    settings: str
    memory_format: str | None = None

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Made:
        """Make picture k from prompt k and seed k."""
        raise NotImplementedError

    def tune(self, memory_format: str | None = None) -> None:
        """Try out what suits this machine; called once, after the first picture, whose time is a cold process's.

        Args:
            memory_format: to be taken without a trial, as where the same side was tuned before.
        """

    def close(self) -> None:
        """Free what it holds; what its process's end frees may stay."""


Factory = Callable[..., Side]
"""(case, device, dtype, folder, **options) -> the side. The folder is for what it exports or compiles, and is the
same each time, so that the second process finds it there."""


def factory(spec: SideSpec) -> Factory:
    """The function a spec names."""
    module, _, name = spec.factory.partition(":")
    return cast(Factory, getattr(importlib.import_module(module), name))


def vae_in(dtype: torch.dtype) -> str:
    """Of a side's settings: in a float16 case the VAE may run in something wider, and not in the same everywhere."""
    return f"VAE in {str(dtype).removeprefix('torch.')}"


def try_convolutions(device: torch.device) -> str:
    """Let cuDNN try its ways to convolve a size when it first meets it, which pays where sizes stay the same: for every
    side whose convolutions are PyTorch's, or their times would not compare. How this is told of in `settings`."""
    if device.type != "cuda":
        return ""
    torch.backends.cudnn.benchmark = True
    return ", cudnn.benchmark"


def take_quicker_layout(
    lay_out: Callable[[torch.memory_format], None],
    make: Callable[[Sequence[str], Sequence[int], int], object],
    device: torch.device,
    memory_format: str | None = None,
) -> str:
    """Which layout convolutions are faster in depends on the machine: takes a few steps in each and stays in the best.

    Args:
        make: pictures of these prompts and seeds in that many steps.
        memory_format: the only one to be tried.

    Returns:
        Its name in `MEMORY_FORMATS`.
    """
    seconds = {}
    for name in MEMORY_FORMATS if memory_format is None else (memory_format,):
        lay_out(MEMORY_FORMATS[name])
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            make([""], [0], _TRIAL_STEPS)
            times.append(now(device) - begin)
        seconds[name] = min(times)
    best = min(seconds, key=lambda name: seconds[name])
    lay_out(MEMORY_FORMATS[best])
    if device.type == "cuda":
        release_memory()  # or NVML would count it as this side's
    return best


def now(device: torch.device) -> float:
    """`time.perf_counter`, once the device is through with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
