"""Block sizes by architecture, as data: `tuned/sm_90.json` and its like. Nothing is tuned at run time.

A file is {"arch": 90, "measured_on": {table: what `latentrt kernels --tune` ran on, and the keys it chose}, "tables":
{table: {key: constants}}}; what is not named there is reasoned, not measured. A table is an operator, or one of its
kernels; a key is the width of the dtype and a shape class of the operator's choosing, such as "16/d64". Constants are
the kernel's own plus num_warps and num_stages.

In place of constants a row may be {"LIBRARY": 1}: PyTorch's libraries are quicker there than the kernel. A row with
"TMA" loads by tensor descriptors. Beside either, "16/d64-kernel" is the row of the plain kernel, for where nothing else
can be launched: in a TensorRT plugin, or with tensors that cannot be described.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .atomic_file import write_atomic

__all__ = [
    "FOLDER",
    "LIBRARY",
    "PLAIN",
    "Row",
    "architectures",
    "choice",
    "constants",
    "is_plain",
    "load",
    "plain",
    "save",
    "trying",
    "width",
]

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tuned"

LIBRARY: Mapping[str, int] = {"LIBRARY": 1}
"""The row, and the candidate, that stands for PyTorch's libraries."""

PLAIN = "-kernel"
"""What is added to a key whose row is no plain kernel's, for the row that is."""

_trials: list[tuple[str, Mapping[str, int], set[str]]] = []


@dataclass(frozen=True)
class Row:
    """What to launch a kernel with that has variants."""

    blocks: Mapping[str, int]
    """The kernel's own constants."""
    warps: int
    stages: int
    tma: bool
    """Whether it loads by tensor descriptors."""
    specialize: bool
    """Whether these loads have warps of their own."""


def choice(table: str, arch: int, dtype: torch.dtype, shape_class: str, *, descriptors: bool) -> Row | None:
    """What the data, found as by `constants`, choose for tensors that descriptors can carry, or cannot; None for
    PyTorch's libraries.

    Raises:
        KeyError: the data lack the table or the shape class, or have only a row that is no plain kernel's.
        ValueError: the row says both a kernel and the libraries, or neither.
    """
    row = constants(table, arch, dtype, shape_class)
    if row == LIBRARY:
        return None
    if descriptors and row.get("TMA"):
        return _row(row, tma=True)
    return plain(table, arch, dtype, shape_class)


def plain(table: str, arch: int, dtype: torch.dtype, shape_class: str) -> Row:
    """What the kernel without tensor descriptors is launched with, also where the data choose something else; in a
    trial the candidate's blocks.

    Raises:
        KeyError, ValueError: as `choice`.
    """
    row = constants(table, arch, dtype, shape_class)
    if not is_plain(row):
        row = constants(table, arch, dtype, f"{shape_class}{PLAIN}")
    return _row(row, tma=False)


def _row(row: Mapping[str, int], tma: bool) -> Row:
    if "LIBRARY" in row or "num_warps" not in row or "num_stages" not in row:
        raise ValueError(
            f"a row of tuned block sizes is a kernel's constants, num_warps and num_stages, or {dict(LIBRARY)} alone, "
            f"not {dict(row)}"
        )
    options = ("num_warps", "num_stages", "TMA", "SPECIALIZE")
    blocks = {name: value for name, value in row.items() if name not in options}
    return Row(blocks, row["num_warps"], row["num_stages"], tma, tma and bool(row.get("SPECIALIZE")))


def constants(table: str, arch: int, dtype: torch.dtype, shape_class: str) -> Mapping[str, int]:
    """The constants to launch `table`'s kernel with, from the data of `arch` or of the nearest older architecture.

    Raises:
        KeyError: the data lack the table or the shape class, which is a mistake in this package.
    """
    key = f"{width(dtype)}/{shape_class}"
    for name, candidate, asked in reversed(_trials):
        if name == table:
            asked.add(key.removesuffix(PLAIN))
            return candidate
    tables: Mapping[str, Any] = load(_with_data(arch))["tables"]
    try:
        found: Mapping[str, int] = tables[table][key]
    except KeyError:
        raise KeyError(f"tuned/sm_{_with_data(arch)}.json has no {table} {key}") from None
    return found


def is_plain(row: Mapping[str, int]) -> bool:
    """Whether a row's kernel can be launched with any tensors and by anyone: it needs neither libraries nor TMA."""
    return row != LIBRARY and not row.get("TMA")


def width(dtype: torch.dtype) -> int:
    """Bits: 16 for both half types, which share their block sizes."""
    return 8 * dtype.itemsize


@cache
def architectures() -> tuple[int, ...]:
    """Those with data, oldest first."""
    return tuple(sorted(int(path.stem.removeprefix("sm_")) for path in FOLDER.glob("sm_*.json")))


@cache
def _with_data(arch: int) -> int:
    known = architectures()
    if arch in known:
        return arch
    nearest = max((a for a in known if a < arch), default=known[0])
    _log.warning("no tuned block sizes for sm_%d; using those of sm_%d", arch, nearest)
    return nearest


@cache
def load(arch: int) -> Mapping[str, Any]:
    """The file of one architecture."""
    data: Mapping[str, Any] = json.loads((FOLDER / f"sm_{arch}.json").read_text(encoding="utf-8"))
    return data


def save(
    arch: int,
    table: str,
    entries: Mapping[str, Mapping[str, int]],
    measured_on: Mapping[str, Any] | None = None,
) -> Path:
    """Put entries (by key) into one architecture's file, leaving the others; one line each, sorted.

    Beside a row that is no plain kernel's one with `PLAIN` stays: from the entries, or the plain row that it replaces.
    """
    path = FOLDER / f"sm_{arch}.json"
    data: dict[str, Any] = {"arch": arch, "measured_on": {}, "tables": {}}
    if path.exists():
        data = json.loads(path.read_text(encoding="utf-8"))
    tables: dict[str, dict[str, Mapping[str, int]]] = data["tables"]
    rows_now = tables.setdefault(table, {})
    for key, row in sorted(entries.items()):  # a key comes before the same with PLAIN
        if not key.endswith(PLAIN):
            before = rows_now.get(key)
            if is_plain(row):
                rows_now.pop(f"{key}{PLAIN}", None)
            elif before is not None and is_plain(before):
                rows_now[f"{key}{PLAIN}"] = before
        rows_now[key] = row
    if measured_on is not None:
        data["measured_on"][table] = {**measured_on, "keys": sorted(entries)}
    rows = [
        f"    {json.dumps(name)}: {{\n"
        + ",\n".join(
            f"      {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(tables[name].items())
        )
        + "\n    }"
        for name in sorted(tables)
    ]
    head = f'  "arch": {arch},\n  "measured_on": {json.dumps(data["measured_on"])},\n'
    write_atomic(path, "{\n" + head + '  "tables": {\n' + ",\n".join(rows) + "\n  }\n}\n")
    for function in (load, architectures, _with_data):
        function.cache_clear()
    return path


@contextmanager
def trying(table: str, candidate: Mapping[str, int]) -> Iterator[set[str]]:
    """Launch `table`'s kernel with `candidate`, whatever the data say; yields the keys that were asked for."""
    asked = set[str]()
    _trials.append((table, candidate, asked))
    try:
        yield asked
    finally:
        _trials.pop()
