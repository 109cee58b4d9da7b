"""`bench/gates.py` and `report.py`: what pictures are held against where diffusers is not installed, and what a report
says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.planted_reports import report
from helpers.planted_sides import planted
from latentrt.bench import cases, tables
from latentrt.bench.cases import CASES, SIDES, Case, SideSpec, default_sides, eager_sides, sides_named
from latentrt.bench.gates import GATES
from latentrt.bench.grouping import Group, Grouping
from latentrt.bench.host import Host
from latentrt.bench.report import markdown
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import Layout
from latentrt.bench.suite import Settings, Suite
from latentrt.bench.worker import Job, Run, Worker
from latentrt.runtime.engines.base import Availability

CASE = Case("planted", "nothing real", "none", steps=1, dtype="float16")


def eager(dtype: str | None = None) -> SideSpec:
    name = "latentrt-eager" + (f"@{dtype}" if dtype else "")
    return SideSpec(name, "", "helpers.planted_sides:open_backend", {"backend": "eager"}, dtype=dtype)


def measure(
    folder: Path,
    *sides: SideSpec,
    case: Case = CASE,
    open_host: Callable[[Job], Host] = Worker,
    grouping: Grouping | None = None,
) -> CaseResult:
    run = CaseRun(
        case,
        sides,
        Plan(["a"], GATES["eager"], rounds=1, pictures=2),
        steps={"base": 1},
        device="cpu",
        folder=folder,
        open_host=open_host,
        grouping=grouping,
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


GPU = torch.device("cuda")


class Backend:
    """One that is installed or not."""

    asked: list[Any]

    def __init__(self, name: str, absent: Sequence[str] = ()) -> None:
        self._name, self._absent = name, absent

    def availability(self, *place: Any) -> Availability:
        Backend.asked.append((self._name, *place))
        return Availability(self._name not in self._absent, "it is not installed", "install it")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Plant what is installed; all is, without arguments."""

    def plant(*absent: str, diffusers: bool = True) -> None:
        Backend.asked = []
        monkeypatch.setattr(cases, "find_spec", lambda name: object() if diffusers else None)
        monkeypatch.setattr(cases, "get_backend", lambda name: Backend(name, absent))

    return plant


def test_what_is_not_installed_is_known_before_anything_is_measured(installed: Callable[..., None]) -> None:
    def reason(name: str) -> str:
        return cases.unavailable_reason(*sides_named([name]), GPU, "float16")

    installed("tensorrt")
    assert reason("latentrt-triton-plain") == ""
    assert reason("latentrt-tensorrt@bfloat16") == "it is not installed; install it"
    assert Backend.asked == [("triton", GPU, torch.float16), ("tensorrt", GPU, torch.bfloat16)]
    assert [reason("diffusers"), reason("onnxruntime")] == ["", ""]
    installed(diffusers=False)
    for side in ("diffusers", "diffusers-max-autotune", "onnxruntime"):
        assert reason(side) == "diffusers is not installed; pip install diffusers"
    assert reason("latentrt-eager") == ""


def test_without_diffusers_sides_are_compared_with_latentrts_eager_modules(
    installed: Callable[..., None],
) -> None:
    sdxl = CASES["sdxl"]
    installed("tensorrt", "tensorrt-rtx")
    everything = default_sides(sdxl, GPU)
    assert (everything[0], everything[-1]) == ("diffusers", "diffusers@float32")
    assert set(everything[:-1]) == set(SIDES) - {"latentrt-tensorrt", "latentrt-tensorrt-rtx"}
    assert default_sides(CASES["demo"], torch.device("cpu")) == [
        "diffusers",
        "diffusers-compile",
        "onnxruntime",
        "latentrt-onnxruntime",
        "latentrt-eager",
    ]
    installed("tensorrt", "tensorrt-rtx", diffusers=False)
    ours = default_sides(sdxl, GPU)
    assert (ours[0], ours[-1]) == ("latentrt-eager", "latentrt-eager@float32")
    assert sorted(ours[1:-1]) == ["latentrt-onnxruntime", "latentrt-triton", "latentrt-triton-plain"]
    assert eager_sides(sides_named(ours)) == {"latentrt-eager", "latentrt-eager@float32"}


def test_a_side_that_cannot_run_is_skipped_and_is_no_reference(
    installed: Callable[..., None], tmp_path: Path
) -> None:
    """It was named, so it is a row; nothing of it is opened, and the others have their reference all the same."""
    installed(diffusers=False)
    opened = []

    def counting(job: Job) -> Host:
        opened.append(job.side.name)
        return Worker(job)

    sides = [*sides_named(["diffusers"]), eager(), planted("quick")]
    plan = Plan(["a"], GATES["eager"], rounds=1, pictures=2)
    settings = Settings(plan, torch.device("cpu"), tmp_path, "as typed", metrics=("psnr", "ssim"))
    case = replace(CASE, model="demo", dtype="float32")
    (found,) = Suite([(case, sides)], settings, open_host=counting).run().cases
    assert found.reference == "latentrt-eager"
    assert [(row.side, row.status) for row in found.rows] == [
        ("diffusers", "skipped"),
        ("latentrt-eager", "measured"),
        ("quick", "measured"),
    ]
    assert found.rows[0].reason == "diffusers is not installed; pip install diffusers"
    assert set(opened) == {"latentrt-eager", "quick"}
    (found,) = Suite([(case, sides[:1])], settings, open_host=counting).run().cases
    assert found.skipped == "diffusers: diffusers is not installed; pip install diffusers"


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

        def tune(self, layout: Layout | None = None) -> tuple[str, Layout | None]:
            tuned[self._job.side.name] += 1
            return super().tune(layout)

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


@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_in_half_precision_is_judged_by_float32(exact: bool, tmp_path: Path) -> None:
    """Each rounds in its own way: the two are further from one another than either may be from what is right."""

    class Rounding(Worker):
        def run(self, prompts: Sequence[str], seeds: Sequence[int], *, traced: bool = False) -> Run:
            made = super().run(prompts, seeds, traced=traced)
            if self._job.dtype == "float32":
                return made
            digits = np.random.default_rng(len(self._job.side.name)).standard_normal(made.images.shape[1:])
            return replace(made, images=(made.images + 0.015 * digits).astype(np.float32))

    sides = [eager(), *([eager("float32")] if exact else []), planted("half")]
    case = replace(CASE, batches=(3,))
    names = ["latentrt-eager", "half"]
    groups = [Group(["latentrt-eager@float32"], (1,)), Group(names, (3,))] if exact else [Group(names, (3,))]
    grouping = Grouping(groups, {name: group.batches for group in groups for name in group.sides})
    half = measure(tmp_path, *sides, case=case, open_host=Rounding, grouping=grouping).rows[-1]
    assert half.status == ("measured" if exact else "invalid")
    assert 33 < (half.quality.psnr if exact else 36) < 39


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
    assert f"compared with {reference}" in told
    assert ("latentrt's own: there is no diffusers beside it" in told) is reference.startswith("latentrt")
