"""The models of the cases: what a name stands for on disk, and whether a machine has memory for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from ..runtime.weight_set import read_header
from .cases import DTYPES, Case, SideSpec
from .random_checkpoint import PUBLISHED, component_bytes, write_checkpoint

__all__ = ["RANDOM", "checkpoint_folder", "located", "needed_bytes", "too_little", "weights_on_disk"]

RANDOM = {"sdxl-random": "sdxl_base", "sdxl-refiner-random": "sdxl_refiner"}
"""Name -> published configurations that get random weights."""

_OVERHEAD = 1 << 30
"""Of one side's process: the libraries, and the device's context."""
_BYTES_PER_PIXEL = 4096
"""Where the decoder is widest: a few tensors of 128 to 256 channels in float32."""
_RANDOM_SIZE = 2
"""Bytes of a random weight on disk: float16."""


def checkpoint_folder(model: str) -> Path:
    """Where a model's diffusers folder is; only the demo's names stand for one."""
    demo = Path(__file__).resolve().parents[1] / "runtime" / "demo"
    return {"demo": demo, "demo-refiner": demo / "refiner"}.get(model, Path(model))


def located(case: Case, folder: Path) -> Case:
    """The case with folders in the place of random models' names; their weights are written to `folder`, 7 GB for the
    base and 6 for the refiner, unless they are there.

    Raises:
        OSError: the disk is full, or cannot be written.
    """

    def place(model: str | None) -> str | None:
        if model not in RANDOM:
            return model
        return str(write_checkpoint(folder / model, PUBLISHED / RANDOM[model]))

    return replace(case, model=place(case.model) or "", refiner=place(case.refiner))


def weights_on_disk(model: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of each file of weights; none for a hub id."""
    folder = checkpoint_folder(model)
    files = sorted(folder.rglob("*.safetensors"))
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def needed_bytes(case: Case, sides: Sequence[SideSpec]) -> int:
    """Of all sides together, which stay loaded beside each other: a rough estimate.

    Weights of a hub id count as none: they are not looked into before they are loaded.
    """
    parameters = sum(_parameters(model) for model in (case.model, case.refiner) if model is not None)
    height, width = case.size or (1024, 1024)
    work = height * width * _BYTES_PER_PIXEL if case.size else 0
    weights = [parameters * DTYPES[side.dtype or case.dtype].itemsize for side in sides]
    return sum(_OVERHEAD + weight + work for weight in weights)


def too_little(case: Case, sides: Sequence[SideSpec], device: torch.device) -> str:
    """Why a case is skipped; empty where there is memory enough."""
    needed, free = needed_bytes(case, sides), _free_bytes(device)
    if needed <= free:
        return ""
    return (
        f"its {len(sides)} sides need about {needed / 2**30:.1f} GiB together and {free / 2**30:.1f} GiB are free on "
        f"{device}; take fewer with --side"
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


@functools.cache
def _parameters(model: str) -> int:
    if model in RANDOM:
        return sum(component_bytes(PUBLISHED / RANDOM[model]).values()) // _RANDOM_SIZE
    files = checkpoint_folder(model).glob("*/*.safetensors")
    return sum(math.prod(tensor.shape) for file in files for tensor in read_header(file).values())
