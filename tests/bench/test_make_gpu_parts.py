"""`bench/gpu.py`: the parts of `make gpu`, their order, their commands, and what they depend on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from latentrt.bench import cases, full, gpu
from latentrt.bench.cases import CASES, SIDES, pictures_only, sides_named
from latentrt.bench.full import Part
from latentrt.bench.gpu import Step
from latentrt.bench.host import job_for
from latentrt.cli import build_parser

ROOT = Path(__file__).parents[2]


MARK = "pytest.mark" + ".gpu"  # or this file would hold it


def steps() -> list[Step]:
    return gpu.steps(Path("results"), Path("work"))


def test_what_is_worth_most_comes_first() -> None:
    names = [step.part.name for step in steps()]
    assert len(set(names)) == len(names)
    assert names[:11] == [
        *(
            "graph-tests",
            "kernel-tests",
            "kernel-edge-tests",
            "timeline-sdxl",
            "sdxl-latentrt-triton",
            "sdxl-refiner-latentrt-triton",
        ),
        *("timeline-sdxl-refiner", "packing", "tune", "kernels", "stream-tests"),
    ]
    # Graphs are compared with graphs before they are compared with none.
    assert names.index("sdxl-diffusers-reduce-overhead") < names.index("sdxl-diffusers-compile")
    # What compiles for longest is last, since everything after it would wait.
    assert ["max-autotune" in name for name in names] == [False] * (len(names) - 2) + [True] * 2
    assert all(step.part.time_limit <= 600 for step in steps()[:-2])
    sides = {side for step in steps() for side in step.sides}
    assert sides == set(SIDES)


def test_a_side_is_not_waited_for_longer_than_its_part() -> None:
    waited_for = [step for step in steps() if "--patience" in step.part.command]
    assert {side for step in waited_for for side in step.sides} == set(SIDES)
    for part in (step.part for step in waited_for):
        assert part.time_limit >= float(part.command[part.command.index("--patience") + 1]), part.name


def test_the_documented_half_hour_has_time_for_each_of_its_parts() -> None:
    """By CONTRIBUTING's estimates: eight minutes for each of the first two commands, five for the base's benchmark, six
    with the refiner, two for the kernels' edge cases; kernels have what they are given."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("If there is half an hour")[2]
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("    gpu ")]
    takes = {
        "sdxl-latentrt-triton": 300.0,
        "sdxl-refiner-latentrt-triton": 360.0,
        "kernel-edge-tests": 120.0,
    }
    known = {step.part.name: step for step in steps()}
    total = 0.0
    for words in commands:
        options = dict(pairwise(words))
        seconds, kernels = float(options["--seconds"]), float(options.get("--kernel-seconds", "0"))
        parts = [word for word in words if word in known]
        share = 480.0 / len([name for name in parts if name not in takes])
        before = 0.0
        for name in parts:
            needed = kernels if known[name].unfinished is not None else takes.get(name, share)
            assert before + max(needed, gpu._MIN_SECONDS) + full.GRACE_SECONDS <= seconds, name
            before += needed
        total += seconds
    assert total < 29 * 60


def test_every_test_for_a_gpu_is_in_one_part() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK in path.read_text("utf-8")
    }
    listed = [file for step in steps() if step.part.markers == "gpu" for file in step.part.tests]
    assert sorted(listed) == sorted(files)
    assert steps()[0].part.tests == ("tests/runtime/test_graphs_gpu.py",)
    assert steps()[1].part.tests[-1] == "tests/kernels/test_attention_triton.py"


def test_every_test_of_a_kernel_runs_on_the_gpu() -> None:
    """Also those without a marker, which run in the interpreter elsewhere: they have the fixture `device`."""
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests" / "kernels").glob("test_*.py")
        if "device: torch.device" in path.read_text("utf-8")
    }
    (part,) = (step.part for step in steps() if step.part.name == "kernel-edge-tests")
    assert set(part.tests) == files
    assert {"tests/kernels/test_attention_triton.py", "tests/kernels/test_operator_edge_cases.py"} <= files
    assert part.markers == "not gpu and not full"


@pytest.mark.timeout(120)
def test_tests_for_a_gpu_are_collected_without_what_they_do_not_need(tmp_path: Path) -> None:
    """Where somebody else has set up PyTorch: of the extra `test` there is pytest and little more."""
    absent = (
        *(
            "diffusers",
            "transformers",
            "accelerate",
            "openai",
            "schemathesis",
            "playwright",
            "httpx2",
            "fastapi",
        ),
        *(
            "uvicorn",
            "tensorrt",
            "tensorrt_rtx",
            "ray",
            "mlperf_loadgen",
            "scipy",
            "torchmetrics",
            "hypothesis",
        ),
    )
    (tmp_path / "without.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    parts = [step.part for step in steps() if step.part.tests]
    files = [file for part in parts for file in part.tests]
    markers = " or ".join({f"({part.markers})" for part in parts})
    options = [*parts[0].options, "-m", markers, "--collect-only", "-q", *files]
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-p", "without", "-p", "pytest_timeout", "-p", "xdist.plugin", *options),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # some of theirs import what they are for
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == set(files)


def test_kernels_are_tuned_and_timed_as_it_is_asked(tmp_path: Path) -> None:
    plain = {step.part.name: step.part.command for step in steps()}
    assert plain["tune"] == ("-m", "latentrt.cli", "kernels", "--out", "results", "--tune")
    asked = gpu.steps(Path("r"), Path("w"), out=Path("o"), kernel_seconds=90, tune_ops=["attention", "geglu"])
    found = {step.part.name: step.part.command[3:] for step in asked}
    assert found["tune"] == ("--out", "o", "--tune", "--op", "attention", "--op", "geglu")
    assert found["kernels"] == ("--out", "o", "--measure")
    assert {step.part.name: step.seconds for step in asked if step.unfinished} == {"tune": 90, "kernels": 90}
    commands = [step.part.command[1:] for step in asked if step.part.command]
    for module, *arguments in commands:  # which take what they are given
        if module == "latentrt.cli":
            assert build_parser().parse_args(arguments).out


@pytest.mark.parametrize("there", [True, False])
def test_a_side_is_held_against_eager_pytorch(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_spec", lambda name: object() if there else None)
    reference = "diffusers" if there else "latentrt-eager"
    found = {step.part.name: step for step in steps()}
    step = found["sdxl-latentrt-triton"]
    assert step.part.command == (
        *(
            "-m",
            "latentrt.cli",
            "bench",
            "--device",
            "cuda",
            "--case",
            "sdxl",
            "--batch",
            "1",
            "--work",
            "work",
        ),
        *("--patience", "240", "--side", reference, "--side", f"{reference}@float32"),
        *("--side", "latentrt-triton", "--pictures", "2", "--rounds", "6"),
        *("--out", "results/gpu-sdxl-1/latentrt-triton"),
    )
    assert step.sides == (reference, "latentrt-triton")
    assert ("sdxl-latentrt-eager" in found) is there  # nothing is held against itself
    for step in found.values():
        if "bench" in step.part.command:
            asked = build_parser().parse_args(step.part.command[2:])
            (name,) = asked.case
            exact = pictures_only(CASES[name], sides_named(asked.side))
            # Of two results in half precision neither says how far off the other is.
            assert exact is not None, step.part.name
            assert exact.name == f"{reference}@float32"


def test_tests_of_some_back_ends_are_run_where_one_of_them_is(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = next(step for step in steps() if step.part.name == "engine-tests")
    lacking = {"latentrt-tensorrt": "not installed"}
    monkeypatch.setattr(gpu, "unavailable_reason", lambda side, *_: lacking.get(side.name, ""))
    assert engines.unavailable_reasons() == []
    assert Step(engines.part, engines.sides).unavailable_reasons() == ["not installed"]
    lacking["latentrt-tensorrt-rtx"] = "too old"
    assert engines.unavailable_reasons() == ["not installed", "too old"]


def test_only_what_its_own_side_built_is_removed(tmp_path: Path) -> None:
    sides = ("latentrt-triton", "latentrt-triton-plain", "latentrt-tensorrt", "latentrt-tensorrt-rtx")
    for side in sides:
        job_for(CASES["sdxl"], SIDES[side], "cpu", tmp_path / "sdxl").folder.mkdir(parents=True)
    found = {step.part.name: step.build_glob for step in steps()}
    for side in sides:
        (built,) = tmp_path.glob(found[f"sdxl-{side}"])
        assert built.name.rpartition("-")[0] == side


def test_what_passed_beside_another_reference_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for there in (None, object()):
        monkeypatch.setattr(cases, "find_spec", lambda name, there=there: there)
        known = {step.part.name: step.part for step in steps()}
        digests.append([full._digest(known[name]) for name in ("sdxl-latentrt-triton", "kernels")])
    (alone, kernels), (beside, same) = digests
    assert alone != beside
    assert kernels == same


def test_block_sizes_make_no_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what a part finds: it would never be done. Tests are of the kernels that they make."""
    tuned = tmp_path / "kernels" / "tuned"
    tuned.mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    for file in (tmp_path / "pyproject.toml", tmp_path / "kernels" / "attention.py", tuned / "sm_90.json"):
        file.write_text("1")
    monkeypatch.setattr(full, "ROOT", tmp_path)

    def digest(part: Part) -> str:
        full._package_digest.cache_clear()
        return full._digest(part)

    tests, mine = steps()[1].part, steps()[3].part
    assert tests.tests
    assert not mine.tests
    tests = replace(tests, tests=("pyproject.toml",))  # in place of those that are not here
    before = [digest(part) for part in (tests, mine)]
    (tuned / "sm_90.json").write_text("2")
    after = [digest(part) for part in (tests, mine)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]
    (tmp_path / "kernels" / "attention.py").write_text("2")
    assert digest(mine) != after[1]
