"""`bench/gates.py` and `report.py`: what pictures are held against where diffusers is not installed, and what a report
says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.planted_reports import report
from helpers.planted_sides import planted
from latentrt.bench import tables
from latentrt.bench.cases import Case, SideSpec, eager_sides, sides_named
from latentrt.bench.gates import GATES
from latentrt.bench.host import Host
from latentrt.bench.report import markdown
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.worker import Job, Run, Worker

CASE = Case("planted", "nothing real", "none", steps=1, dtype="float16")


def eager(dtype: str | None = None) -> SideSpec:
    name = "latentrt-eager" + (f"@{dtype}" if dtype else "")
    return SideSpec(name, "", "helpers.planted_sides:open_backend", {"backend": "eager"}, dtype=dtype)


def measure(
    folder: Path, *sides: SideSpec, case: Case = CASE, open_host: Callable[[Job], Host] = Worker
) -> CaseResult:
    run = CaseRun(
        case,
        sides,
        Plan(["a"], GATES["eager"], rounds=1, pictures=2),
        steps={"base": 1},
        device="cpu",
        folder=folder,
        open_host=open_host,
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
        "latentrt-eager@float32": "reference",
    }


def test_a_reference_makes_its_pictures_and_no_more(tmp_path: Path) -> None:
    """In float32 it is the slowest of all, and nobody asks how long it takes."""
    opened, tuned, made = Counter[str](), Counter[str](), Counter[str]()

    class Counting(Worker):
        def open(self) -> str:
            opened[self._job.side.name] += 1
            return super().open()

        def tune(self, like: str = "") -> str:
            tuned[self._job.side.name] += 1
            return super().tune(like)

        def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
            made[self._job.side.name] += len(seeds)
            return super().run(prompts, seeds, traced=traced)

    found = measure(tmp_path, eager(), eager("float32"), planted("wrong", wrong_from=0), open_host=Counting)
    assert found.reference == "latentrt-eager@float32"
    assert (opened[found.reference], tuned[found.reference], made[found.reference]) == (1, 0, 2)
    assert (opened["latentrt-eager"], tuned["latentrt-eager"]) == (2, 1)
    timed, reference, wrong = found.rows
    assert len(timed.batches[0].seconds) == 1
    assert (reference.status, reference.batches, reference.first_image_seconds) == ("reference", [], None)
    assert wrong.status == "invalid"  # held against it though its process has gone
    told = markdown(replace(report(), cases=[found]))
    assert "| latentrt-eager@float32 | reference | - |" in told
    assert "**latentrt-eager@float32** reference: only its pictures are taken" in told


def test_a_reference_that_speed_is_compared_with_is_timed(tmp_path: Path) -> None:
    """So is one in float32 where the case is, and one in a dtype that is no reference."""
    found = measure(tmp_path, eager("float32"), eager("bfloat16"))
    assert found.reference == "latentrt-eager@float32"
    assert [(row.status, len(row.batches)) for row in found.rows] == [("measured", 1)] * 2
    same = measure(tmp_path, eager("bfloat16"), eager(), case=replace(CASE, dtype="float32"))
    assert same.reference == "latentrt-eager"
    assert [(row.status, len(row.batches)) for row in same.rows] == [("measured", 1)] * 2


@pytest.mark.parametrize("reference", ["diffusers@float32", "latentrt-eager@float32", "latentrt-triton"])
def test_a_reference_of_latentrts_own_is_called_so(reference: str) -> None:
    told = tables.settings(replace(report().cases[0], reference=reference))
    assert f"held against {reference}" in told
    assert ("latentrt's own: there is no diffusers beside it" in told) is reference.startswith("latentrt")
