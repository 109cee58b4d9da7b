"""Whether a machine has room for a case: what its sides take, and which of them are loaded at the same time.

Sides take turns, so they stay loaded beside each other. Where that is too much for all of them they are measured in
groups, and the first side, which the others are compared with, is in each. What does not even fit beside the first one
is left out, and told with the estimate: a batch size of a side, or all of it.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ..runtime.host_memory import available_bytes
from ..runtime.weight_set import read_header
from .cases import DTYPES, Case, SideSpec, eager_sides
from .models import RANDOM, checkpoint_folder
from .random_checkpoint import PUBLISHED, component_bytes

__all__ = ["Arrangement", "Room", "arrange", "memory_bytes", "room", "too_little", "written_bytes"]

_OVERHEAD = 1 << 30
"""Of one side's process: the libraries, and the device's context."""
_BYTES_PER_PIXEL = 4096
"""Where the decoder is widest: a few tensors of 128 to 256 channels in float32."""
_RANDOM_SIZE = 2
"""Bytes of a random weight on disk: float16."""
_USUAL_SIZE = (1024, 1024)
_LATENT_SCALE = 8


@dataclass(frozen=True)
class Room:
    """Bytes that are free: on the device, and where sides write.

    Attributes:
        keeps: what a side wrote stays; otherwise its group's end makes room.
    """

    memory: int
    disk: int
    keeps: bool = False


@dataclass(frozen=True)
class Arrangement:
    """Who is measured beside whom.

    Attributes:
        groups: names of sides that are loaded together; the first side begins each.
        batches: the batch sizes of each of them.
        lost: side -> batch size -> why it is not measured.
    """

    groups: list[list[str]]
    batches: dict[str, tuple[int, ...]]
    lost: dict[str, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def together(cls, case: Case, sides: Sequence[SideSpec]) -> Arrangement:
        """All at once, at every size."""
        names = [side.name for side in sides]
        return cls([names], dict.fromkeys(names, case.batches))


def memory_bytes(case: Case, side: SideSpec, batch: int) -> int:
    """Of a side on its device, a rough estimate.

    Weights of a hub id count as none: they are not looked into before they are loaded.
    """
    height, width = case.size or _own_size(case.model)
    weights = _parameters(case) * _itemsize(case, side)
    return _OVERHEAD + weights + batch * height * width * _BYTES_PER_PIXEL


def written_bytes(case: Case, side: SideSpec) -> int:
    """What a side writes before its first picture: exports and engines."""
    return side.copies * _parameters(case) * _itemsize(case, side)


def room(device: torch.device, folder: Path, *, keeps: bool) -> Room:
    """As it is now; `folder` need not be there yet."""
    return Room(_free_memory(device), _free_disk(folder), keeps)


def too_little(case: Case, sides: Sequence[SideSpec], device: torch.device, folder: Path) -> str:
    """Why a case is skipped: not even its first side fits, or its random weights; empty where they do."""
    first, free = sides[0], _free_memory(device)
    needed = memory_bytes(case, first, min(case.batches))
    if needed > free:
        return f"{first.name} needs about {_gib(needed)} GiB and {_gib(free)} GiB are free on {device}"
    random = {model for model in (case.model, case.refiner) if model in RANDOM}
    weights = sum(_RANDOM_SIZE * _count(model) for model in random if not (folder / model).exists())
    disk = _free_disk(folder)
    if weights > disk:
        need = f"its random weights take {_gib(weights)} GiB"
        return f"{need} and {_gib(disk)} GiB are free in {folder}; give another --work"
    return ""


def arrange(case: Case, sides: Sequence[SideSpec], found: Room, built: Container[str] = ()) -> Arrangement:
    """Who is measured beside whom; sides that make the reference's pictures are in the first group.

    Args:
        sides: the first one fits by itself.
        built: names of sides that write nothing more.
    """
    first, *others = sides
    size = functools.partial(memory_bytes, case)
    alone = [b for b in case.batches if size(first, b) <= found.memory]
    beside = [b for b in alone if any(size(first, b) + size(other, b) <= found.memory for other in others)]
    mine = tuple(beside or alone)
    own = size(first, max(mine, default=min(case.batches)))
    left = found.memory - own
    disk = found.disk - (0 if first.name in built else written_bytes(case, first))

    batches = {first.name: mine}
    crowded = ", which leaves no room for another side"
    lost = {
        first.name: {
            b: f"about {_gib(size(first, b))} GiB{crowded if b in alone else ''}"
            for b in case.batches
            if b not in mine
        }
    }
    beside_it = {
        b: f"beside {first.name}, which takes about {_gib(max(own, size(first, b)))} GiB"
        for b in case.batches
    }
    groups = [[first.name]]
    memory_here, disk_here = left, disk
    eager = eager_sides(sides)
    for side in sorted(others, key=lambda side: side.name not in eager):
        written = 0 if side.name in built else written_bytes(case, side)
        fits = tuple(b for b in mine if size(side, b) <= left)
        lost[side.name] = {
            b: f"about {_gib(size(side, b))} GiB {beside_it[b]}" for b in case.batches if b not in fits
        }
        writable = disk_here if found.keeps else disk
        if fits and written > writable:
            why = f"about {_gib(written)} GiB on disk, where the sides before it leave {_gib(max(0, writable))} GiB"
            lost[side.name] = dict.fromkeys(case.batches, why)
            fits = ()
        if not fits:
            continue
        needed = size(side, max(fits))
        if len(groups[-1]) > 1 and (needed > memory_here or written > disk_here):
            groups.append([first.name])
            memory_here, disk_here = left, disk_here if found.keeps else disk
        groups[-1].append(side.name)
        batches[side.name] = fits
        memory_here -= needed
        disk_here -= written

    free = f"{_gib(found.memory)} GiB of memory and {_gib(found.disk)} GiB of disk are free"
    told = {
        name: {b: f"needs {why}; {free}" for b, why in sizes.items()} for name, sizes in lost.items() if sizes
    }
    return Arrangement(groups, batches, told)


def _own_size(model: str) -> tuple[int, int]:
    """(height, width) that a model makes where nobody says another; SDXL's where its folder is not here."""
    folder = PUBLISHED / RANDOM[model] if model in RANDOM else checkpoint_folder(model)
    file = folder / "unet" / "config.json"
    if not file.is_file():
        return _USUAL_SIZE
    sample = json.loads(file.read_text("utf-8")).get("sample_size")
    return (_LATENT_SCALE * sample, _LATENT_SCALE * sample) if isinstance(sample, int) else _USUAL_SIZE


def _parameters(case: Case) -> int:
    return sum(_count(model) for model in (case.model, case.refiner) if model is not None)


@functools.cache
def _count(model: str) -> int:
    """Of a model's parameters."""
    if model in RANDOM:
        return sum(component_bytes(PUBLISHED / RANDOM[model]).values()) // _RANDOM_SIZE
    files = checkpoint_folder(model).glob("*/*.safetensors")
    return sum(math.prod(tensor.shape) for file in files for tensor in read_header(file).values())


def _itemsize(case: Case, side: SideSpec) -> int:
    return DTYPES[side.dtype or case.dtype].itemsize


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = available_bytes()  # which heeds a container's limit; psutil tells what the machine has
    return int(psutil.virtual_memory().available) if free is None else free


def _free_disk(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
