"""Estimates each side's memory and disk, and groups the sides that fit together.

Interleaved rounds need sides that are resident together. Where not all fit, they are measured in groups, each with the
first side, which the others are compared with, and at the batch sizes at which they fit together. A side is measured by
itself at those at which it does not fit together with the first one. Only what does not even fit alone is left out,
with the estimate as the reason: a batch size of a side, or all of it.
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
from .cases import DTYPES, Case, SideSpec, eager_sides, pictures_only
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
    """Which sides are resident together, and at which batch sizes.

    Attributes:
        groups: names of sides, in the order in which they are measured. Sides of a group without the first side are
            not interleaved with it. A side may be in a group of its own after one with the first side.
        batches: the batch sizes of each side.
        lost: side -> batch size -> why it is not measured.
        group_batches: the batch sizes of each group; every group has all of them where empty.
    """

    groups: list[list[str]]
    batches: dict[str, tuple[int, ...]]
    lost: dict[str, dict[int, str]] = field(default_factory=dict)
    group_batches: list[tuple[int, ...]] = field(default_factory=list)

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
    """Groups of sides that fit together.

    What the reference's pictures come from is in the first groups: other sides are compared with them. Eager PyTorch
    in float32 has a group of its own there, since it makes pictures, one by one, and is not timed.

    Args:
        sides: the first one fits by itself.
        built: names of sides that write nothing more.
    """
    exact = pictures_only(case, sides)
    batches: dict[str, tuple[int, ...]] = {}
    lost: dict[str, dict[int, str]] = {}
    memory: dict[str, dict[int, int]] = {}
    written: dict[str, int] = {}
    free = f"{_gib(found.memory)} GiB of memory and {_gib(found.disk)} GiB of disk are free"
    disk = found.disk
    for side in sides:
        sizes = {b: memory_bytes(case, side, b) for b in ((1,) if side is exact else case.batches)}
        fits = tuple(b for b, needed in sizes.items() if needed <= found.memory)
        why = {b: f"needs about {_gib(sizes[b])} GiB; {free}" for b in sizes if b not in fits}
        written[side.name] = 0 if side.name in built else written_bytes(case, side)
        if written[side.name] > disk:
            needed = f"needs about {_gib(written[side.name])} GiB on disk"
            why = dict.fromkeys(sizes, f"{needed}, where {_gib(disk)} GiB are left; {free}")
            fits = ()
        if why:
            lost[side.name] = why
        if fits:
            batches[side.name] = fits
            memory[side.name] = sizes
            disk -= written[side.name] if found.keeps else 0

    def fit_together(*names: str) -> tuple[int, ...]:
        """The batch sizes at which these are resident together."""
        if not all(name in batches for name in names) or sum(written[n] for n in names) > found.disk:
            return ()
        common = (b for b in batches[names[0]] if all(b in batches[n] for n in names))
        return tuple(b for b in common if sum(memory[n][b] for n in names) <= found.memory)

    first, eager = sides[0].name, eager_sides(sides)
    alone = None if exact is None else exact.name
    before: list[tuple[list[str], tuple[int, ...]]] = []
    shared: list[tuple[list[str], tuple[int, ...]]] = []
    after: list[tuple[list[str], tuple[int, ...]]] = []
    for name in sorted(batches, key=lambda name: (name != alone, name not in eager)):
        if name == first:
            continue
        at = () if name == alone else fit_together(first, name)
        if not at:
            (before if name in eager else after).append(([name], batches[name]))
        elif shared and shared[-1][1] == at == fit_together(*shared[-1][0], name):
            shared[-1][0].append(name)
        else:
            shared.append(([first, name], at))
    groups = before
    for names, at in shared:
        groups.append((names, at))
        # Right after its group, so that what it wrote is removed before the next one writes.
        for name in names[1:]:
            if rest := tuple(b for b in batches[name] if b not in at):
                groups.append(([name], rest))
    met = {b for _, at in shared for b in at}
    if rest := tuple(b for b in batches.get(first, ()) if b not in met):
        groups.append(([first], rest))
    groups += after
    return Arrangement([names for names, _ in groups], batches, lost, [at for _, at in groups])


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
