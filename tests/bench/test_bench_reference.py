"""What pictures are held against where diffusers is not installed, and what a report says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from latentrt.bench import tables
from latentrt.bench.cases import Case, SideSpec, eager_sides, sides_named
from latentrt.bench.gates import GATES
from latentrt.bench.host import Worker
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from planted_reports import report
from planted_sides import planted

CASE = Case("planted", "nothing real", "none", steps=1, dtype="float16")


def eager(dtype: str | None = None) -> SideSpec:
    name = "latentrt-eager" + (f"@{dtype}" if dtype else "")
    return SideSpec(name, "", "planted_sides:open_backend", {"backend": "eager"}, dtype=dtype)


def measure(folder: Path, *sides: SideSpec) -> CaseResult:
    run = CaseRun(
        CASE,
        sides,
        Plan(["a"], GATES["eager"], rounds=1, pictures=2),
        steps={"base": 1},
        device="cpu",
        folder=folder,
        open_host=Worker,
    )
    run.measure()
    return run.result()


def test_latentrts_eager_modules_stand_in_for_diffusers_where_that_is_not_asked_for() -> None:
    ours = ("latentrt-eager", "latentrt-eager@float32")
    assert eager_sides(sides_named([*ours, "latentrt-triton"])) == set(ours)
    assert eager_sides(sides_named([*ours, "diffusers@float32", "diffusers-compile"])) == {
        "diffusers@float32"
    }
    assert eager_sides(sides_named(["latentrt-triton"])) == set()


def test_a_side_is_no_reference_of_its_own_beside_an_eager_one(tmp_path: Path) -> None:
    """Wherever that stands in the order; in float32 it goes before."""
    found = measure(tmp_path, planted("latentrt-triton", wrong_from=0), eager(), eager("float32"))
    assert found.reference == "latentrt-eager@float32"
    assert {row.side: row.status for row in found.rows} == {
        "latentrt-triton": "invalid",
        "latentrt-eager": "measured",
        "latentrt-eager@float32": "measured",
    }


@pytest.mark.parametrize("reference", ["diffusers@float32", "latentrt-eager@float32", "latentrt-triton"])
def test_a_reference_of_latentrts_own_is_called_so(reference: str) -> None:
    told = tables.settings(replace(report().cases[0], reference=reference))
    assert f"held against {reference}" in told
    assert ("latentrt's own: there is no diffusers beside it" in told) is reference.startswith("latentrt")
