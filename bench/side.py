"""The interface of a side: one way to generate a case's pictures. A side reports the times of its stages itself."""

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
    "Picture",
    "Pictures",
    "Side",
    "as_bytes",
    "as_float",
    "choose_layout",
    "factory",
    "now",
    "try_convolutions",
    "vae_in",
]

_TRIAL_STEPS = 4
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Images = NDArray[np.float32]
"""[B, H, W, 3] in [0, 1]."""
Pictures = Images | NDArray[np.uint8]
"""The same, or [B, H, W, 3] in bytes, which large numbers of pictures are stored in."""
Picture = NDArray[np.uint8]
"""[H, W, 3], as in an image file."""


def as_bytes(images: Images) -> list[Picture]:
    """Pictures in [0, 1], rounded as in an image file."""
    return [np.round(image * 255).clip(0, 255).astype(np.uint8) for image in images]


def as_float(pictures: Pictures) -> NDArray[np.float64]:
    """Floats in [0, 1], whatever pictures are stored as."""
    scale = 255.0 if pictures.dtype == np.uint8 else 1.0
    return pictures.astype(np.float64) / scale


@dataclass(frozen=True)
class SideOutput:
    """What one call returns.

    Attributes:
        images: the pictures.
        spans: the stages in the order in which they ran: text, base, refiner, decode and others.
    """

    images: Images
    spans: list[Span]


class Side:
    """One loaded way to generate the pictures.

    Attributes:
        settings: how it is configured, for people to read.
        memory_format: the name in `MEMORY_FORMATS` that `tune` chose; None for a side that does not choose.
    """

    settings: str
    memory_format: str | None = None

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
        """Generate picture k from prompt k and seed k."""
        raise NotImplementedError

    def tune(self, memory_format: str | None = None) -> None:
        """Choose the settings that are fastest on this machine.

        Called once, after the first picture, so that the first picture's time is a cold process's.

        Args:
            memory_format: use this one without a trial, because the same side was tuned before.
        """

    def close(self) -> None:
        """Release resources that outlive the process; the rest is freed when the process ends."""


Factory = Callable[..., Side]
"""(case, device, dtype, folder, **options) -> the side. It exports and compiles into the folder, which is the same each
time, so that the second process finds what the first one built."""


def factory(spec: SideSpec) -> Factory:
    """The function that a spec names."""
    module, _, name = spec.factory.partition(":")
    return cast(Factory, getattr(importlib.import_module(module), name))


def vae_in(dtype: torch.dtype) -> str:
    """For a side's settings: in a float16 case the VAE may run in a wider dtype, and sides differ in which one."""
    return f"VAE in {str(dtype).removeprefix('torch.')}"


def try_convolutions(device: torch.device) -> str:
    """Turn on `cudnn.benchmark`, which times cuDNN's algorithms on the first convolution of each size.

    Every side with PyTorch's convolutions has to use it; otherwise their times could not be compared.

    Returns:
        What to add to the side's `settings`.
    """
    if device.type != "cuda":
        return ""
    torch.backends.cudnn.benchmark = True
    return ", cudnn.benchmark"


def choose_layout(
    set_memory_format: Callable[[torch.memory_format], None],
    generate: Callable[[Sequence[str], Sequence[int], int], object],
    device: torch.device,
    memory_format: str | None = None,
) -> str:
    """Time a few steps in each memory format, and set the fastest one. Which one that is depends on the machine.

    Args:
        set_memory_format: puts the model's weights into a memory format.
        generate: (prompts, seeds, steps) -> pictures.
        memory_format: use this one, and try no other.

    Returns:
        The name in `MEMORY_FORMATS` of the one that was set.
    """
    seconds = {}
    for name in MEMORY_FORMATS if memory_format is None else (memory_format,):
        set_memory_format(MEMORY_FORMATS[name])
        times = []
        for _ in range(3):
            started = time.perf_counter()
            generate([""], [0], _TRIAL_STEPS)
            times.append(now(device) - started)
        seconds[name] = min(times)
    best = min(seconds, key=lambda name: seconds[name])
    set_memory_format(MEMORY_FORMATS[best])
    if device.type == "cuda":
        release_memory()  # NVML would count cached memory as this side's
    return best


def now(device: torch.device) -> float:
    """`time.perf_counter`, after waiting for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
