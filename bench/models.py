"""The models of the cases: where they are on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .cases import Case
from .machine import ROOT
from .random_checkpoint import PUBLISHED, write_checkpoint

__all__ = ["RANDOM", "checkpoint_folder", "resolve_models", "weights_on_disk"]

RANDOM = {"sdxl-random": "sdxl_base", "sdxl-refiner-random": "sdxl_refiner"}
"""Model name -> the published configurations that it takes, with random weights."""


def checkpoint_folder(model: str) -> Path:
    """A model's diffusers folder: the shipped one for the demo's names, and otherwise the name itself as a path."""
    demo = ROOT / "runtime" / "demo"
    return {"demo": demo, "demo-refiner": demo / "refiner"}.get(model, Path(model))


def resolve_models(case: Case, folder: Path, device: torch.device) -> Case:
    """The case with the names of random models replaced by folders.

    Their weights are written to subfolders of `folder` unless they exist: 7 GB for the base and 6 for the refiner.

    Args:
        device: on which random weights are drawn.

    Raises:
        OSError: the disk is full, or cannot be written.
    """

    def place(model: str | None) -> str | None:
        if model not in RANDOM:
            return model
        return str(write_checkpoint(folder / model, PUBLISHED / RANDOM[model], device=device))

    return replace(case, model=place(case.model) or "", refiner=place(case.refiner))


def weights_on_disk(model: str) -> list[tuple[str, int, int]]:
    """(name, bytes, modification time) of each file of weights; none for a hub id."""
    folder = checkpoint_folder(model)
    files = sorted(folder.rglob("*.safetensors"))
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
