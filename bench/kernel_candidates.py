"""The block sizes and kernel variants that `kernel_tuning` tries, and the cases that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..kernels import aot, tuning
from ..kernels._triton import Launch, Library
from ..kernels.registry import Case, OpSpec

__all__ = ["DTYPE", "TableUse", "table_uses", "tuning_requests"]

DTYPE = torch.bfloat16
"""What candidates are timed in."""
_SPECIALIZED_WARPS = (90, 100)
"""Architectures on which Triton specialises warps."""


@dataclass(frozen=True)
class TableUse:
    """A case that reads a tuning table."""

    spec: OpSpec
    case: Case
    key: str
    candidates: Sequence[Mapping[str, int]]

    @property
    def name(self) -> str:
        return f"{self.spec.name}, {self.case.name}"


def table_uses(operators: Sequence[OpSpec], arch: int) -> dict[str, list[TableUse]]:
    """Table -> the cases that read it, which planning each case finds out. Several operators may share a table."""
    tables: dict[str, list[TableUse]] = {}
    for spec in operators:
        for table, candidates in spec.candidates.items():
            for case in spec.cases:
                keys = _planned(spec, case, table, candidates[0], arch)[1]
                if keys:
                    tried = [c for c in candidates if _can_be_tried(spec, case, table, c, arch)]
                    uses = [TableUse(spec, case, key, tried) for key in keys]
                    tables.setdefault(table, []).extend(uses)
    return tables


def tuning_requests(tables: Mapping[str, Sequence[TableUse]], arch: int) -> list[aot.Request]:
    """What Triton compiles so that every candidate can be timed at every case that reads its table."""
    meta = torch.device("meta")
    return [
        aot.Request(use.spec.name, use.case.inputs(DTYPE, meta), arch, (table, candidate))
        for table, uses in tables.items()
        for use in uses
        for candidate in use.candidates
    ]


def _planned(
    spec: OpSpec, case: Case, table: str, candidate: Mapping[str, int], arch: int
) -> tuple[Sequence[Launch | Library], set[str]]:
    """The steps of a case with a candidate, and the table's keys that were asked for."""
    with tuning.trying(table, candidate) as keys:
        _, steps = spec.plan(*case.inputs(DTYPE, torch.device("meta")), arch=arch)
    return steps, keys


def _can_be_tried(spec: OpSpec, case: Case, table: str, candidate: Mapping[str, int], arch: int) -> bool:
    """Whether a candidate with specialised warps has them there. Without, its few warps hold too much: on sm_90 Triton
    3.6 spills 876 times."""
    if not candidate.get("SPECIALIZE"):
        return True
    if arch not in _SPECIALIZED_WARPS:
        return False
    steps, _ = _planned(spec, case, table, candidate, arch)
    return any(isinstance(step, Launch) and step.constants.get("SPECIALIZE") for step in steps)
