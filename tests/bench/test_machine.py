"""`bench/machine.py`, `grouping.py` and `cases.py`: what a machine is, what fits on it, and what a case takes."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.bench import full, host, machine, worker
from latentrt.bench.cases import CASES, DTYPES, SIDES, default_sides, sides_named
from latentrt.bench.grouping import (
    FreeSpace,
    Grouping,
    free_space,
    group_sides,
    memory_bytes,
    shortage,
    written_bytes,
)
from latentrt.bench.machine import describe_machine, installed_versions
from latentrt.bench.side import factory
from latentrt.cli import build_parser
from latentrt.runtime.weights import open_checkpoint

CPU = torch.device("cpu")
GIB = 2**30


def test_the_machine_names_the_device_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: f"GPU at {device}")
    assert describe_machine(torch.device("cuda:1"))["gpu"] == "GPU at cuda:1"
    on_cpu = describe_machine(CPU)
    assert (on_cpu["device"], "gpu" in on_cpu) == ("cpu", False)
    assert describe_machine(torch.device("cuda:1"))["tuned"] == machine.tuned_digest()


@pytest.mark.parametrize("said", ["0123abc", ""])
def test_without_a_repository_the_commit_is_what_is_said(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setenv("LATENTRT_COMMIT", said)
    monkeypatch.setattr(machine.subprocess, "run", no_git)
    assert machine.commit.__wrapped__() == (said or "unknown")


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        (None, False),
        ("bench/results/new.json", False),
        ("kernels/tuned/sm_90.json", False),
        ("bench/gpu.py", True),
        ("bench/new.py", True),
        ("kernels/new.py", True),
    ],
)
def test_a_repository_knows_better(
    changed: str | None, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a"]
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # in a hook they name the repository that this test is in
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("bench/gpu.py", "bench/results/old.json", "kernels/tuned/sm_90.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    git("init")
    git("add", ".")
    git("commit", "--message", "all")
    if changed is not None:
        (tmp_path / changed).write_text("changed")
    monkeypatch.setenv("LATENTRT_COMMIT", "0123abc")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit.__wrapped__() == git("rev-parse", "--short=12", "HEAD") + ("+" if counts else "")


@pytest.mark.parametrize(("name", "kept"), [("0123abc", True), ("0123abc+", False), ("unknown", False)])
def test_what_was_built_is_used_again_only_by_the_same_sources(
    name: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (host, worker):
        monkeypatch.setattr(module, "commit", lambda: name)
    job = host.job_for(CASES["demo"], SIDES["latentrt-triton"], "cpu", tmp_path)
    job.folder.mkdir()
    job.note_built()
    monkeypatch.setattr(host, "tuned_digest", lambda: "other block sizes")
    assert not host.job_for(CASES["demo"], SIDES["latentrt-triton"], "cpu", tmp_path).is_built()
    assert job.is_built() is kept
    assert job.folder.exists() is kept


def test_versions_are_found_by_any_name_of_a_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {
        "torch": "2.13",
        "onnxruntime-gpu": "1.31",
        "tensorrt-rtx-cu13-libs": "1.7",
        "mlcommons-loadgen": "6",
    }

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("torch.backends.cudnn.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91900)
    assert installed_versions() == {**there, "cudnn": "91900"}


def test_memory_is_estimated_before_a_case_begins() -> None:
    half, exact = sides_named(["diffusers", "diffusers@float32"])
    assert 1 << 30 < memory_bytes(CASES["demo"], half, 1) < 2 << 30
    # 3.5 billion parameters, and 4 GiB to decode 1024x1024 pixels of each picture.
    sdxl = CASES["sdxl"]
    assert memory_bytes(sdxl, half, 1) == pytest.approx(2 * 3.47e9 + 5 * GIB, rel=0.02)
    assert memory_bytes(sdxl, half, 8) - memory_bytes(sdxl, half, 1) == 7 * 4 * GIB
    assert memory_bytes(sdxl, exact, 1) - memory_bytes(sdxl, half, 1) == pytest.approx(2 * 3.47e9, rel=0.02)
    assert memory_bytes(replace(sdxl, size=None), half, 1) == memory_bytes(sdxl, half, 1)
    engine, export = sides_named(["latentrt-tensorrt", "onnxruntime"])
    assert [written_bytes(sdxl, side) for side in (engine, export, half)] == pytest.approx(
        [4 * 3.47e9, 2 * 3.47e9, 0], rel=0.02
    )


def names_of(grouping: Grouping) -> list[list[str]]:
    return [group.sides for group in grouping.groups]


def grouped(
    name: str, memory: float, disk: float = 1000, *, keep_builds: bool = False
) -> tuple[Grouping, int]:
    """How all sides are grouped with as many GiB free; how many sides there are."""
    case = CASES[name]
    sides = sides_named([*SIDES, "diffusers@float32"])
    free = FreeSpace(int(memory * GIB), int(disk * GIB), keep_builds)
    grouping = group_sides(case, sides, free)
    specs = {side.name: side for side in sides}
    for group in grouping.groups:
        largest = max(group.batches)
        assert set(group.batches) <= set.intersection(*(set(grouping.batches[side]) for side in group.sides))
        assert sum(memory_bytes(case, specs[side], largest) for side in group.sides) <= free.memory
        if not keep_builds:
            assert sum(written_bytes(case, specs[side]) for side in group.sides) <= free.disk
    for side in sides:
        sizes = (1,) if side.dtype else case.batches
        for batch in sizes:  # each is measured, or left out with the reason
            assert (batch in grouping.batches.get(side.name, ())) != (
                batch in grouping.skipped.get(side.name, {})
            )
            if not keep_builds and batch in grouping.skipped.get(side.name, {}):
                assert memory_bytes(case, side, batch) > free.memory
    measured = [(side, batch) for group in grouping.groups for side in group.sides for batch in group.batches]
    others = [each for each in measured if each[0] != "diffusers"]
    assert sorted(others) == sorted(
        (side, b) for side, sizes in grouping.batches.items() for b in sizes if side != "diffusers"
    )
    assert {b for side, b in measured if side == "diffusers"} == set(grouping.batches["diffusers"])
    if "diffusers@float32" in grouping.batches:  # what the others are compared with, and is not timed
        assert names_of(grouping)[0] == ["diffusers@float32"]
    return grouping, len(sides)


@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("memory", [138.5, 79.2])
def test_on_a_large_gpu_each_side_is_interleaved_with_the_first(name: str, memory: float) -> None:
    grouping, count = grouped(name, memory, disk=60)
    assert len(grouping.batches) == count
    assert len(grouping.groups) > 2
    assert all(names[0] == "diffusers" for names in names_of(grouping)[1:])
    assert grouping.batches == {
        **dict.fromkeys(grouping.batches, CASES[name].batches),
        "diffusers@float32": (1,),
    }
    assert grouping.skipped == {}


@pytest.mark.parametrize(("memory", "shared"), [(31, (1, 2)), (47, (1, 2, 4)), (78.5, (1, 2, 4))])
def test_sizes_at_which_two_sides_fit_are_interleaved_and_larger_ones_measured_alone(
    memory: float, shared: tuple[int, ...]
) -> None:
    grouping, _ = grouped("sdxl", memory)
    for side in SIDES:
        if side != "diffusers":
            together = [group.batches for group in grouping.groups if {"diffusers", side} <= set(group.sides)]
            assert together == [shared]
    alone = {group.sides[0]: group.batches for group in grouping.groups if len(group.sides) == 1}
    fit = grouping.batches["latentrt-triton"]
    assert alone.pop("diffusers@float32") == (1,)
    assert alone == {
        side: tuple(b for b in fit if b not in shared) for side in SIDES if set(fit) - set(shared)
    }


@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_on_24_gb_every_side_is_measured_one_after_another(name: str) -> None:
    """No two fit together; each fits alone, at the sizes that do."""
    grouping, count = grouped(name, 22.5)
    exact = name == "sdxl"  # the refiner's weights too take 29 GiB in float32
    assert len(grouping.batches) == count - (not exact)
    assert all(len(names) == 1 for names in names_of(grouping))
    assert names_of(grouping)[exact] == ["diffusers"]
    sizes = {"sdxl": (1, 2), "sdxl-refiner": (1,)}[name]
    assert {b for side, b in grouping.batches.items() if side != "diffusers@float32"} == {sizes}
    needed = {"sdxl": "23.5", "sdxl-refiner": "29.1"}[name]
    assert grouping.skipped["latentrt-triton"][4] == (
        f"needs about {needed} GiB; 22.5 GiB of memory and 1000.0 GiB of disk are free"
    )


def test_eager_sides_that_do_not_fit_beside_the_first_come_before_it() -> None:
    """The others are compared with their pictures."""
    case, sides = CASES["sdxl"], sides_named(["latentrt-triton", "latentrt-tensorrt", "diffusers"])
    grouping = group_sides(replace(case, batches=(1,)), sides, FreeSpace(20 * GIB, 1000 * GIB))
    assert names_of(grouping) == [["diffusers"], ["latentrt-triton"], ["latentrt-tensorrt"]]
    both = group_sides(replace(case, batches=(1,)), sides, FreeSpace(25 * GIB, 1000 * GIB))
    assert names_of(both) == [["latentrt-triton", "diffusers"], ["latentrt-triton", "latentrt-tensorrt"]]


def test_what_is_kept_on_disk_adds_up() -> None:
    removed, count = grouped("sdxl", 1000, disk=30)
    assert len(removed.batches) == count
    assert len(removed.groups) > 2
    kept, _ = grouped("sdxl", 1000, disk=30, keep_builds=True)
    assert kept.skipped["latentrt-tensorrt-rtx"][1] == (
        "needs about 12.9 GiB on disk, where 4.2 GiB are left; 1000.0 GiB of memory and 30.0 GiB of disk are free"
    )
    sides = sides_named([*SIDES, "diffusers@float32"])
    again = group_sides(
        CASES["sdxl"], sides, FreeSpace(1000 * GIB, 30 * GIB, True), built={side.name for side in sides}
    )
    assert again.skipped == {}
    writes_too_much = sides_named(["latentrt-tensorrt", "latentrt-triton"])
    grouping = group_sides(CASES["sdxl"], writes_too_much, FreeSpace(1000 * GIB, GIB))
    assert names_of(grouping) == [["latentrt-triton"]]
    assert set(grouping.skipped) == {"latentrt-tensorrt"}


def test_the_digest_of_block_sizes_is_over_names_and_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.kernels.tuning.FOLDER", tmp_path)
    (tmp_path / "sm_80.json").write_text("{}")
    found = {machine.tuned_digest()}
    (tmp_path / "sm_80.json").rename(tmp_path / "sm_90.json")
    found.add(machine.tuned_digest())
    (tmp_path / "sm_90.json").write_text("{ }")
    found.add(machine.tuned_digest())
    assert len(found) == 3


def test_only_what_publishes_by_its_name_writes_to_the_published_results() -> None:
    """Any other command writes there where it is told to: a short trial would replace what README quotes."""
    bench = Path(machine.__file__).parent
    named = {path.stem for path in bench.rglob("*.py") if re.search(r"\bRESULTS\b", path.read_text("utf-8"))}
    assert named == {"machine", "gpu", "readme"}
    for words in (["kernels", "--measure"], ["kernels", "--tune"], ["bench"], ["bench", "sweep"]):
        assert build_parser().parse_args(words).out.parts[0] == "out"
    commands = [word for part in full.PARTS for word in part.command]
    assert not any("results" in word for word in commands)
    assert sum(word.endswith("build/full/full_size_engines.json") for word in commands) == 4


def test_a_container_s_limit_bounds_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.runtime.host_memory._CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("300000000\n")
    (tmp_path / "memory.current").write_text("100000000\n")
    assert free_space(CPU, tmp_path, keep_builds=False).memory == 200_000_000
    monkeypatch.setattr("latentrt.runtime.host_memory._MEMINFO", tmp_path / "none")  # not Linux
    assert free_space(CPU, tmp_path, keep_builds=False).memory > 200_000_000


def test_a_case_without_room_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = sides_named(["diffusers", "latentrt-eager"])
    monkeypatch.setattr("latentrt.bench.grouping._free_memory", lambda device: 10 * GIB)
    assert shortage(CASES["demo"], sides, CPU, tmp_path) == ""
    assert (
        shortage(CASES["sdxl"], sides, CPU, tmp_path)
        == "diffusers needs about 11.5 GiB and 10.0 GiB are free on cpu"
    )
    monkeypatch.setattr("latentrt.bench.grouping._free_memory", lambda device: 40 * GIB)
    monkeypatch.setattr("latentrt.bench.grouping._free_disk", lambda folder: 5 * GIB)
    found = shortage(CASES["sdxl-refiner"], sides, CPU, tmp_path)
    assert re.match(
        r"its random weights take 12\.\d GiB and 5\.0 GiB are free in .*; give another --work", found
    )
    for model in ("sdxl-random", "sdxl-refiner-random"):
        (tmp_path / model).mkdir()
    assert shortage(CASES["sdxl-refiner"], sides, CPU, tmp_path) == ""


def test_the_tables_fit_together() -> None:
    for spec in SIDES.values():
        assert callable(factory(spec))
    for case in CASES.values():
        assert case.dtype in DTYPES
        assert sides_named(default_sides(case, CPU))[0].is_eager_diffusers


def test_steps_are_split_as_the_schedule_splits_them() -> None:
    scheduler = open_checkpoint("demo").config("scheduler")
    assert CASES["demo"].split_steps(scheduler) == {"base": 24, "refiner": 6}
    leading = {**scheduler, "timestep_spacing": "leading"}  # 0.8 of 1000 timesteps, not of 30 steps
    assert CASES["demo"].split_steps(leading) == {"base": 23, "refiner": 7}
    assert CASES["demo-base"].split_steps(scheduler) == {"base": 30}
    assert replace(CASES["demo"], high_noise_frac=1.0).split_steps(scheduler) == {"base": 30, "refiner": 0}
