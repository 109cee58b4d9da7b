"""What a side is: one way to make a case's pictures, timed stage by stage by itself."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from .cases import SideSpec
from .monitor import Span

__all__ = ["Images", "Made", "Side", "factory", "now"]

Images = NDArray[np.float32]
"""[B, H, W, 3] in [0, 1]."""


@dataclass(frozen=True)
class Made:
    """One call's pictures, and its stages in the order they ran: text, base, refiner, decode and others."""

    images: Images
    spans: list[Span]


class Side(Protocol):
    """One way to make the pictures, loaded.

    Attributes:
        settings: how it was set up, for people to read.
    """

    settings: str

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Made:
        """Make picture k from prompt k and seed k."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


Factory = Callable[..., Side]
"""(case, device, dtype, folder, **options) -> the side. The folder is for what it exports or compiles, and is the
same each time, so that the second process finds it there."""


def factory(spec: SideSpec) -> Factory:
    """The function a spec names."""
    module, _, name = spec.factory.partition(":")
    return cast(Factory, getattr(importlib.import_module(module), name))


def now(device: torch.device) -> float:
    """`time.perf_counter`, once the device is through with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def checkpoint_folder(model: str) -> Path:
    """Where a model's diffusers folder is; only the demo's names stand for one."""
    demo = Path(__file__).resolve().parents[1] / "runtime" / "demo"
    return {"demo": demo, "demo-refiner": demo / "refiner"}.get(model, Path(model))
