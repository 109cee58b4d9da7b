"""The interface of a side: one way to generate a case's pictures. A side reports the times of its stages itself."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
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
    "Layout",
    "Picture",
    "Pictures",
    "Side",
    "as_bytes",
    "as_float",
    "choose_layout",
    "factory",
    "layout_text",
    "now",
    "try_convolutions",
    "vae_in",
]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_STAGES = {"UNet": ("base", "refiner"), "VAE": ("decode",)}
"""Network -> the stages that are its work."""
Layout = Mapping[str, str]
"""Network in `_STAGES` -> the name in `MEMORY_FORMATS` of the format that its weights have."""
_TRIAL_SECONDS = 10.0
"""A memory format is not tried again after so long."""
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
        layout: what `tune` chose; None for a side that does not choose.
    """

    settings: str
    layout: Layout | None = None

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
        """Generate picture k from prompt k and seed k."""
        raise NotImplementedError

    def tune(self, layout: Layout | None = None) -> None:
        """Choose the settings that are fastest on this machine.

        Called once, after the first picture, so that the first picture's time is a cold process's.

        Args:
            layout: use this one without a trial, because the same side was tuned before.
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
    side: Side, set_layout: Callable[[Layout], None], device: torch.device, layout: Layout | None = None
) -> Layout:
    """Set each network's fastest memory format. Which one that is depends on the machine, and on the network.

    Whole pictures are timed, of batch size 1, each network by its own stages: up to three in each format, and one where
    that takes long, since whoever waits for this does not wait for ever. On a GPU an untimed one comes before them: it
    loads the weights anew, and cuDNN tries its algorithms, which would decide where only one is timed.

    Args:
        set_layout: puts the weights into memory formats.
        layout: set this one, and try no other.

    Returns:
        The layout that was set.
    """
    if layout is None:
        seconds: dict[tuple[str, str], float] = {}
        for name in MEMORY_FORMATS:
            set_layout(dict.fromkeys(_STAGES, name))
            if device.type == "cuda":
                side([""], [0])
            runs = [side([""], [0]).spans]
            while len(runs) < 3 and sum(spans[-1].end - spans[0].begin for spans in runs) < _TRIAL_SECONDS:
                runs.append(side([""], [0]).spans)
            for network, stages in _STAGES.items():
                seconds[network, name] = min(
                    sum(span.end - span.begin for span in spans if span.name in stages) for spans in runs
                )
        layout = {
            network: min(MEMORY_FORMATS, key=lambda name: seconds[network, name]) for network in _STAGES
        }
    set_layout(layout)
    if device.type == "cuda":
        release_memory()  # NVML would count cached memory as this side's
    return layout


def layout_text(layout: Layout) -> str:
    """For a side's settings."""
    return ", ".join(f"{network} {name}" for network, name in layout.items())


def now(device: torch.device) -> float:
    """`time.perf_counter`, after waiting for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
