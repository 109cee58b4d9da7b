"""What `make gpu` runs, in which order, and what becomes of parts that fail, hang or have nothing to do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import until
from latentrt.bench import full, gpu
from latentrt.bench.cases import CASES, SIDES, default_sides
from latentrt.bench.full import Judged, Part, run_part
from latentrt.bench.gpu import Step
from latentrt.bench.host import job_for
from latentrt.cli import build_parser
from latentrt.runtime.engines.base import Availability

ROOT = Path(__file__).parents[2]
MARK = "pytest.mark" + ".gpu"  # or this file would hold it


def steps() -> list[Step]:
    return gpu.steps(Path("results"), Path("work"))


def test_what_is_worth_most_comes_first() -> None:
    names = [step.part.name for step in steps()]
    assert len(set(names)) == len(names)
    assert names[:10] == [
        *(
            "graph-tests",
            "kernel-tests",
            "timeline-sdxl",
            "sdxl-latentrt-triton",
            "sdxl-refiner-latentrt-triton",
        ),
        *("timeline-sdxl-refiner", "packing", "tune", "kernels", "stream-tests"),
    ]
    # What compiles for longest is last, since everything after it would wait.
    assert ["max-autotune" in name for name in names] == [False] * (len(names) - 2) + [True] * 2
    assert all(step.part.limit <= 600 for step in steps()[:-2])
    sides = {side for step in steps() for side in step.sides}
    assert sides == set(default_sides(CASES["sdxl"], torch.device("cuda"))) - {"diffusers@float32"}


def test_every_test_for_a_gpu_is_in_one_part() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK in path.read_text("utf-8")
    }
    listed = [file for step in steps() for file in step.part.tests]
    assert sorted(listed) == sorted(files)
    assert steps()[0].part.tests == ("tests/runtime/test_graphs_gpu.py",)
    assert steps()[1].part.tests[-1] == "tests/kernels/test_attention_triton.py"


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
    options = [*parts[0].options, "-m", parts[0].marked, "--collect-only", "-q", *files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "without", "-p", "pytest_timeout", *options],
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
    assert plain["tune"] == ("-m", "latentrt.cli", "kernels", "--tune")
    asked = gpu.steps(Path("r"), Path("w"), out=Path("o"), kernel_seconds=90, tuned=["attention", "geglu"])
    found = {step.part.name: step.part.command[3:] for step in asked}
    assert found["tune"] == ("--out", "o", "--tune", "--op", "attention", "--op", "geglu")
    assert found["kernels"] == ("--out", "o", "--measure")
    assert {step.part.name: step.seconds for step in asked if step.left} == {"tune": 90, "kernels": 90}
    commands = [step.part.command[1:] for step in asked if step.part.command]
    for module, *arguments in commands:  # which take what they are given
        if module == "latentrt.cli":
            assert build_parser().parse_args(arguments).out


@pytest.mark.parametrize("there", [True, False])
def test_a_side_is_held_against_eager_pytorch(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: object() if there else None)
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
        *("--patience", "240", "--side", reference, "--side", f"{reference}@float32", "--pictures", "2"),
        *("--rounds", "6", "--side", "latentrt-triton", "--out", "results/gpu-sdxl-1/latentrt-triton"),
    )
    assert step.sides == (reference, "latentrt-triton")
    assert ("sdxl-latentrt-eager" in found) is there  # nothing is held against itself
    assert "--rounds" in found["sdxl-batch-8-latentrt-triton"].part.command


def test_what_is_not_installed_is_known_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Backend:
        def availability(self, *place: Any) -> Availability:
            asked.append(place)
            return Availability(len(asked) < 3, "it is not installed", "install it")

    monkeypatch.setattr(gpu, "get_backend", lambda name: asked.append(name) or Backend())
    assert gpu.lacking("latentrt-triton-plain") == ""
    assert gpu.lacking("latentrt-tensorrt") == "it is not installed; install it"
    assert asked == ["triton", (torch.device("cuda"), torch.float16), "tensorrt", asked[1]]
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    for side in ("diffusers", "diffusers-max-autotune", "onnxruntime"):
        assert gpu.lacking(side) == "diffusers is not installed"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three parts: one that fails, one whose side is not there, and one that goes on by itself."""

    def part(name: str, code: str) -> Part:
        return Part(name, 60, command=("-c", f"open({str(tmp_path / name)!r}, 'a').write('x'); {code}"))

    made = [
        Step(
            part("broken", "print('it broke'); raise SystemExit(3)"),
            ("latentrt-eager",),
            kept="sdxl/broken-*",
        ),
        Step(part("absent", ""), ("diffusers",)),
        Step(part("good", ""), kept="sdxl/good-*"),
        Step(part("tune", ""), left=lambda: False, seconds=90),
    ]
    monkeypatch.setattr(gpu, "steps", lambda *args, **kwargs: made)
    monkeypatch.setattr(gpu, "lacking", lambda side: "it is not installed" * (side == "diffusers"))
    monkeypatch.setattr(gpu, "_BUILD", tmp_path / "build")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(full, "_digest", lambda part: "the same")
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def ran(folder: Path) -> dict[str, int]:
    names = ("broken", "absent", "good", "tune")
    return {name: len(file.read_text()) for name in names if (file := folder / name).exists()}


def test_a_part_that_fails_is_not_the_end(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("broken-1", "good-1"):
        (planted / "build" / "kept" / "sdxl" / name).mkdir(parents=True)
    out = planted / "out"
    assert gpu.main(["--out", str(out)]) == 1
    assert ran(planted) == {"broken": 1, "good": 1, "tune": 1}
    told = capsys.readouterr().out
    assert "it broke" in told
    assert re.search(r"^absent +left out: it is not installed$", told, re.MULTILINE)
    assert re.search(r"^broken +FAILED .*exit status 3$", told, re.MULTILINE)
    # What a side built stays where its part is to be run again.
    assert [path.name for path in (planted / "build" / "kept" / "sdxl").iterdir()] == ["broken-1"]
    assert list((out / "tuned").glob("sm_*.json"))
    assert json.loads((out / "parts" / "good.json").read_text())["passed"]
    assert gpu.main(["--out", str(out)]) == 1
    assert ran(planted) == {"broken": 2, "good": 1, "tune": 2}
    assert gpu.main(["--out", str(out), "good", "absent"]) == 0
    assert gpu.main(["--out", str(out), "--again", "good"]) == 0
    assert ran(planted) == {"broken": 2, "good": 2, "tune": 2}
    capsys.readouterr()
    assert gpu.main(["--list", "--out", str(out), "good"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["good", "passed"]
    with pytest.raises(SystemExit):
        gpu.main(["great"])
    assert "there is no part great; there are broken, absent, good, tune" in capsys.readouterr().err


def test_nothing_is_begun_that_has_no_time(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--seconds", "100", "good"]) == 1
    assert ran(planted) == {}
    assert "no time is left" in capsys.readouterr().out
    (good,) = (step for step in gpu.steps(planted, planted) if step.part.name == "good")
    monkeypatch.setattr(
        gpu, "steps", lambda *args, **kwargs: [replace(good, part=replace(good.part, limit=600))]
    )
    assert gpu.main(["--seconds", "140", "good"]) == 0
    assert 60 <= int(re.search(r"good: at most (\d+) s", capsys.readouterr().out)[1]) <= 95


def test_without_a_gpu_it_says_so(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert ran(planted) == {}


def test_a_part_whose_time_is_over_may_write_down_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "note"

    def over_once_it_works(*_: object) -> tuple[bool, int]:
        until(note.exists)
        return False, 0

    monkeypatch.setattr(full, "_digest", lambda part: "")
    monkeypatch.setattr(full, "_watch", over_once_it_works)
    works = f"import signal, time; from pathlib import Path; note = Path({str(note)!r})\n"
    willing = "try: note.touch(); time.sleep(600)\nexcept KeyboardInterrupt: note.write_text('7 of 9')"
    part = Part("slow", 2, command=("-c", works + willing))
    result = run_part(part, tmp_path)
    assert (result.passed, result.why) == (False, "ended after 2 s")
    assert note.read_text() == "7 of 9"
    note.unlink()
    monkeypatch.setattr(full, "FAREWELL", 0.2)
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN); note.touch(); time.sleep(600)"
    assert run_part(replace(part, command=("-c", works + deaf)), tmp_path, again=True).seconds < 60


def test_tests_of_some_back_ends_are_run_where_one_of_them_is(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = next(step for step in steps() if step.part.name == "engine-tests")
    lacking = {"latentrt-tensorrt": "not installed"}
    monkeypatch.setattr(gpu, "lacking", lambda side: lacking.get(side, ""))
    assert engines.missing() == []
    assert Step(engines.part, engines.sides).missing() == ["not installed"]
    lacking["latentrt-tensorrt-rtx"] = "too old"
    assert engines.missing() == ["not installed", "too old"]


def test_only_what_its_own_side_built_is_removed(tmp_path: Path) -> None:
    sides = ("latentrt-triton", "latentrt-triton-plain", "latentrt-tensorrt", "latentrt-tensorrt-rtx")
    for side in sides:
        job_for(CASES["sdxl"], SIDES[side], "cpu", tmp_path / "sdxl").folder.mkdir(parents=True)
    found = {step.part.name: step.kept for step in steps()}
    for side in sides:
        (built,) = tmp_path.glob(found[f"sdxl-{side}"])
        assert built.name.rpartition("-")[0] == side


def test_what_passed_beside_another_reference_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for there in (None, object()):
        monkeypatch.setattr(gpu, "find_spec", lambda name, there=there: there)
        known = {step.part.name: step.part for step in steps()}
        digests.append([full._digest(known[name]) for name in ("sdxl-latentrt-triton", "kernels")])
    (alone, kernels), (beside, same) = digests
    assert alone != beside
    assert kernels == same


@pytest.mark.parametrize(
    ("hangs", "lost", "time_of_its_own", "runs"),
    [(2, 0, 200, 3), (9, 0, 200, 4), (9, 0, 110, 2), (9, 9, 200, 1)],
    ids=["two", "all", "no time", "nothing left"],
)
def test_a_hang_does_not_end_tuning(
    hangs: int, lost: int, time_of_its_own: int, runs: int, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with what is left, in what is left of its time."""
    told = planted / "seconds"
    code = (
        "import sys; from pathlib import Path; "
        f"file = Path({str(told)!r}); file.open('a').write(sys.argv[-1] + ' '); "
        f"sys.exit(len(file.read_text().split()) <= {hangs})"
    )
    part = Part("tune", 60, command=("-c", code))
    step = Step(part, left=lambda: not lost, seconds=time_of_its_own)
    # Each run takes 30 s, and nothing else takes time.
    monkeypatch.setattr(gpu, "_now", lambda: 30.0 * len(told.read_text().split()) if told.exists() else 0.0)
    monkeypatch.setattr(gpu, "steps", lambda *args, **kwargs: [step])
    assert gpu.main(["--out", str(planted / "out")]) == int(hangs >= runs)
    seconds = [int(word) for word in told.read_text().split()]
    assert seconds == [time_of_its_own - 30 * k for k in range(runs)]


def test_what_an_interrupted_run_found_is_kept_and_told(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(part: Part, *args: Any, **kwargs: Any) -> Any:
        if part.name == "tune":
            raise KeyboardInterrupt
        return run_part(part, *args, **kwargs)

    monkeypatch.setattr(gpu, "run_part", interrupted)
    assert gpu.main(["--out", str(planted / "out")]) == 130
    assert list((planted / "out" / "tuned").glob("sm_*.json"))
    *_, broken, absent, good, last = capsys.readouterr().out.strip().splitlines()
    assert [text.split()[0] for text in (broken, absent, good, last)] == [
        "broken",
        "absent",
        "good",
        "interrupted;",
    ]


def test_block_sizes_that_an_earlier_run_found_are_taken_first(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[tuple[Path, dict[str, int]]] = []
    monkeypatch.setattr(
        gpu, "take_tuned", lambda folder: taken.append((folder, ran(planted))) or ["attention of sm_90"]
    )
    out = planted / "out"
    assert gpu.main(["--out", str(out), "good"]) == 0
    assert taken == [(out / "tuned", {})]
    assert f"block sizes from {out / 'tuned'}: attention of sm_90" in capsys.readouterr().out


def test_a_part_that_passed_needs_no_log(planted: Path) -> None:
    for _ in range(2):
        assert gpu.main(["good"]) == 0
        (planted / "build" / "good.log").unlink(missing_ok=True)
    assert ran(planted) == {"good": 1}


def test_a_part_passes_by_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "_digest", lambda part: "")
    asked: list[str] = []

    def verdict() -> Judged:
        asked.append("")
        return Judged(len(asked) > 1, ("it is wrong", "2 left")[len(asked) - 1])

    part = Part("side", 60, command=("-c", "raise SystemExit(3)"), verdict=verdict)
    assert run_part(part, tmp_path).why == "exit status 3"
    assert asked == []
    part = replace(part, command=("-c", ""))
    for passed, why in ((False, "it is wrong"), (True, "2 left"), (True, "2 left")):
        result = run_part(part, tmp_path)
        assert (result.passed, result.why) == (passed, why)
        assert full.line(part, result, tmp_path).endswith(why)
    by_status = ("packing", "timeline-sdxl", "timeline-sdxl-refiner")
    others = [step.part for step in steps() if not step.part.tests and step.part.name not in by_status]
    assert all(part.verdict for part in others)


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
