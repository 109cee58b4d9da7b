"""Estimates each side's memory and disk, and groups the sides that fit together.

Interleaved rounds need sides that are resident at the same time. If not all of them fit, they are measured in groups.
Each group has the first side, which the others are compared with, and the batch sizes at which the group fits in
memory. At sizes at which a side does not fit beside the first one, it is measured by itself. Only what does not even
fit alone is skipped, with the estimate as the reason: single batch sizes of a side, or all of them.
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

__all__ = [
    "FreeSpace",
    "Group",
    "Grouping",
    "free_space",
    "group_sides",
    "memory_bytes",
    "shortage",
    "written_bytes",
]

_OVERHEAD = 1 << 30
"""Bytes of a side's process besides weights and activations: libraries, and the device's context."""
_BYTES_PER_PIXEL = 4096
"""Peak of the decoder's activations: a few tensors of 128 to 256 channels in float32."""
_RANDOM_WEIGHT_BYTES = 2
"""Random weights are float16 on disk."""
_SDXL_SIZE = (1024, 1024)
_LATENT_SCALE = 8


@dataclass(frozen=True)
class FreeSpace:
    """Bytes that are free.

    Attributes:
        memory: on the device.
        disk: where sides write.
        keep_builds: what sides write stays on disk. Otherwise it is removed after their last group.
    """

    memory: int
    disk: int
    keep_builds: bool = False


@dataclass
class Group:
    """Sides that are resident together and take turns.

    Attributes:
        sides: their names.
        batches: the batch sizes that they are measured at.
    """

    sides: list[str]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Grouping:
    """Which sides are resident together, and at which batch sizes.

    Attributes:
        groups: in the order in which they are measured. Sides of a group without the first side are not interleaved
            with it. A side may be in several groups: with the first side, and by itself at larger batch sizes.
        batches: side -> the batch sizes that it is measured at.
        skipped: side -> batch size -> why it is not measured.
    """

    groups: list[Group]
    batches: dict[str, tuple[int, ...]]
    skipped: dict[str, dict[int, str]] = field(default_factory=dict)

    @classmethod
    def together(cls, case: Case, sides: Sequence[SideSpec]) -> Grouping:
        """One group of all sides, at every batch size."""
        names = [side.name for side in sides]
        return cls([Group(names, case.batches)], dict.fromkeys(names, case.batches))


def memory_bytes(case: Case, side: SideSpec, batch: int) -> int:
    """A rough estimate of the memory that a side takes on its device.

    The weights of a hub id count as 0, because their size is not known before they are loaded.
    """
    height, width = case.size or _own_size(case.model)
    weights = _parameters(case) * _itemsize(case, side)
    return _OVERHEAD + weights + batch * height * width * _BYTES_PER_PIXEL


def written_bytes(case: Case, side: SideSpec) -> int:
    """Disk space of the exports and engines that a side writes before its first picture."""
    return side.copies * _parameters(case) * _itemsize(case, side)


def free_space(device: torch.device, folder: Path, *, keep_builds: bool) -> FreeSpace:
    """What is free now on the device and in `folder`, which need not exist yet."""
    return FreeSpace(_free_memory(device), _free_disk(folder), keep_builds)


def shortage(case: Case, sides: Sequence[SideSpec], device: torch.device, folder: Path) -> str:
    """Why a case has to be skipped: its first side or its random weights do not fit. Empty if both fit."""
    first, free = sides[0], _free_memory(device)
    needed = memory_bytes(case, first, min(case.batches))
    if needed > free:
        return f"{first.name} needs about {_gib(needed)} GiB and {_gib(free)} GiB are free on {device}"
    random = {model for model in (case.model, case.refiner) if model in RANDOM}
    weights = sum(
        _RANDOM_WEIGHT_BYTES * _count_parameters(model) for model in random if not (folder / model).exists()
    )
    disk = _free_disk(folder)
    if weights > disk:
        need = f"its random weights take {_gib(weights)} GiB"
        return f"{need} and {_gib(disk)} GiB are free in {folder}; give another --work"
    return ""


def group_sides(
    case: Case, sides: Sequence[SideSpec], free: FreeSpace, built: Container[str] = ()
) -> Grouping:
    """Group the sides that fit in memory and on disk together.

    Sides whose pictures may become the reference come first, because the others are compared with them. Eager PyTorch
    in float32 gets a group of its own at the start: it only generates reference pictures, one at a time, and is not
    timed.

    Args:
        sides: the first one must fit by itself.
        built: names of sides that are already built and write nothing more.
    """
    exact = pictures_only(case, sides)
    fit = _fit_alone(case, sides, free, built, exact)

    def fit_together(*names: str) -> tuple[int, ...]:
        """The batch sizes at which these sides can be resident at the same time."""
        if not all(name in fit.batches for name in names) or sum(fit.disk[n] for n in names) > free.disk:
            return ()
        common = (b for b in fit.batches[names[0]] if all(b in fit.batches[n] for n in names))
        return tuple(b for b in common if sum(fit.memory[n][b] for n in names) <= free.memory)

    first, eager = sides[0].name, eager_sides(sides)
    exact_name = None if exact is None else exact.name
    others = [name for name in fit.batches if name != first]
    # The float32 reference, then the other eager sides, then the rest.
    others.sort(key=lambda name: (name != exact_name, name not in eager))
    with_first: list[Group] = []
    alone: list[str] = []
    for name in others:
        sizes = () if name == exact_name else fit_together(first, name)
        if not sizes:
            alone.append(name)
        elif with_first and with_first[-1].batches == sizes == fit_together(*with_first[-1].sides, name):
            with_first[-1].sides.append(name)
        else:
            with_first.append(Group([first, name], sizes))

    groups = [Group([name], fit.batches[name]) for name in alone if name in eager]
    for group in with_first:
        groups.append(group)
        # The sizes at which a side does not fit beside the first come right after its group, so that what the side
        # wrote is removed before the next one writes.
        for name in group.sides[1:]:
            if rest := tuple(b for b in fit.batches[name] if b not in group.batches):
                groups.append(Group([name], rest))
    shared = {b for group in with_first for b in group.batches}
    if rest := tuple(b for b in fit.batches.get(first, ()) if b not in shared):
        groups.append(Group([first], rest))
    groups += [Group([name], fit.batches[name]) for name in alone if name not in eager]
    return Grouping(groups, fit.batches, fit.skipped)


@dataclass(frozen=True)
class _Fit:
    """What each side takes, and the batch sizes at which it fits by itself.

    Attributes:
        batches: side -> batch sizes; sides that do not fit at all are missing.
        memory: side -> batch size -> bytes.
        disk: side -> bytes that it writes.
        skipped: side -> batch size -> why it is not measured.
    """

    batches: dict[str, tuple[int, ...]] = field(default_factory=dict)
    memory: dict[str, dict[int, int]] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, dict[int, str]] = field(default_factory=dict)


def _fit_alone(
    case: Case, sides: Sequence[SideSpec], free: FreeSpace, built: Container[str], exact: SideSpec | None
) -> _Fit:
    """`exact` is the side that generates reference pictures only, one at a time."""
    fit = _Fit()
    total = f"{_gib(free.memory)} GiB of memory and {_gib(free.disk)} GiB of disk are free"
    remaining_disk = free.disk
    for side in sides:
        memory = {b: memory_bytes(case, side, b) for b in ((1,) if side is exact else case.batches)}
        disk = 0 if side.name in built else written_bytes(case, side)
        sizes = tuple(b for b, needed in memory.items() if needed <= free.memory)
        reasons = {b: f"needs about {_gib(memory[b])} GiB; {total}" for b in memory if b not in sizes}
        if disk > remaining_disk:
            needed = f"needs about {_gib(disk)} GiB on disk"
            reasons = dict.fromkeys(memory, f"{needed}, where {_gib(remaining_disk)} GiB are left; {total}")
            sizes = ()
        if reasons:
            fit.skipped[side.name] = reasons
        if sizes:
            fit.batches[side.name], fit.memory[side.name], fit.disk[side.name] = sizes, memory, disk
            remaining_disk -= disk if free.keep_builds else 0
    return fit


def _own_size(model: str) -> tuple[int, int]:
    """A model's default (height, width), or SDXL's if its folder is not on this machine."""
    folder = PUBLISHED / RANDOM[model] if model in RANDOM else checkpoint_folder(model)
    file = folder / "unet" / "config.json"
    if not file.is_file():
        return _SDXL_SIZE
    sample = json.loads(file.read_text("utf-8")).get("sample_size")
    return (_LATENT_SCALE * sample, _LATENT_SCALE * sample) if isinstance(sample, int) else _SDXL_SIZE


def _parameters(case: Case) -> int:
    return sum(_count_parameters(model) for model in (case.model, case.refiner) if model is not None)


@functools.cache
def _count_parameters(model: str) -> int:
    if model in RANDOM:
        return sum(component_bytes(PUBLISHED / RANDOM[model]).values()) // _RANDOM_WEIGHT_BYTES
    files = checkpoint_folder(model).glob("*/*.safetensors")
    return sum(math.prod(tensor.shape) for file in files for tensor in read_header(file).values())


def _itemsize(case: Case, side: SideSpec) -> int:
    return DTYPES[side.dtype or case.dtype].itemsize


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # This respects a container's limit; psutil only knows the whole machine.
    free = available_bytes()
    return int(psutil.virtual_memory().available) if free is None else free


def _free_disk(folder: Path) -> int:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
