"""The models of the cases: what a name stands for on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .cases import Case
from .machine import ROOT
from .random_checkpoint import PUBLISHED, write_checkpoint

__all__ = ["RANDOM", "checkpoint_folder", "located", "weights_on_disk"]

RANDOM = {"sdxl-random": "sdxl_base", "sdxl-refiner-random": "sdxl_refiner"}
"""Name -> published configurations that get random weights."""


def checkpoint_folder(model: str) -> Path:
    """Where a model's diffusers folder is; only the demo's names stand for one."""
    demo = ROOT / "runtime" / "demo"
    return {"demo": demo, "demo-refiner": demo / "refiner"}.get(model, Path(model))


def located(case: Case, folder: Path, device: torch.device) -> Case:
    """The case with folders in the place of random models' names; their weights are written to `folder`, 7 GB for the
    base and 6 for the refiner, unless they are there.

    Args:
        device: on which they are drawn.

    Raises:
        OSError: the disk is full, or cannot be written.
    """

    def place(model: str | None) -> str | None:
        if model not in RANDOM:
            return model
        return str(write_checkpoint(folder / model, PUBLISHED / RANDOM[model], device=device))

    return replace(case, model=place(case.model) or "", refiner=place(case.refiner))


def weights_on_disk(model: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of each file of weights; none for a hub id."""
    folder = checkpoint_folder(model)
    files = sorted(folder.rglob("*.safetensors"))
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
