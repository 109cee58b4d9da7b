"""What make's targets install, what they hand on, and what comes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.planted_reports import report
from latentrt.bench import commands
from latentrt.bench.demo_model.checker import Verdict, find_objects, judge
from latentrt.bench.demo_model.scenes import Scene, Thing
from latentrt.bench.suite import Suite
from latentrt.cli import build_parser

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set-up project whose `latentrt` writes its arguments to stdout, one a line."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "latentrt"):
        (programs / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / ".runtime-cpu").touch()
    return tmp_path


def handed_on(folder: Path, target: str, *variables: str) -> list[str]:
    """What its programs wrote, without the commands that make shows."""
    command = ["make", "--silent", "--no-print-directory", target, *variables]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def generated(folder: Path, *variables: str) -> list[str]:
    return handed_on(folder, "generate", "EXTRA=cpu", *variables)


@pytest.mark.parametrize(
    "prompt", ["costs $5 and $(shell touch spoilt)", "$$ `touch spoilt`", 'it\'s "quoted" # \\', "-1", "日本"]
)
def test_a_prompt_arrives_as_it_was_typed(prompt: str, folder: Path) -> None:
    seed, image = "3; touch spoilt", "a $b.png"
    arguments = generated(folder, f"PROMPT={prompt}", f"SEED={seed}", f"IMAGE={image}")
    assert arguments == ["generate", "--seed", seed, "-o", image, "--", prompt]
    assert not (folder / "spoilt").exists()


def test_what_belongs_to_another_machine_is_removed_first(folder: Path) -> None:
    """`onnxruntime` and `onnxruntime-gpu` are one folder of files: whichever is removed last takes the other's."""
    venv = folder / ".venv"
    (venv / ".test-cpu").touch()
    assert "pip" not in generated(folder)
    lines = generated(folder, "EXTRA=gpu")
    removed = lines.index("onnxruntime")
    assert lines[removed - 4 : removed] == ["pip", "uninstall", "-qq", "--yes"]
    assert removed < lines.index(".[gpu]")
    assert sorted(path.name for path in venv.glob(".*-*")) == [".runtime-gpu"]
    assert "pip" not in generated(folder, "EXTRA=gpu")
    lines = generated(folder)  # without the GPU again
    assert lines.index("onnxruntime-gpu") < lines.index(".[cpu]")
    assert sorted(path.name for path in venv.glob(".*-*")) == [".runtime-cpu"]


def test_what_needs_a_gpu_runs_in_an_environment_that_is_there(folder: Path) -> None:
    """Without a network nothing could be installed."""
    shutil.move(folder / ".venv", folder / "ready")
    lines = handed_on(folder, "gpu", "TEST=", "BIN=ready/bin", "PARTS=--seconds 570 graph-tests")
    assert lines == ["-m", "latentrt.bench.gpu", "--seconds", "570", "graph-tests"]
    assert not (folder / ".venv").exists()


def test_the_benchmark_is_the_demos_on_the_cpu_also_where_there_is_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's figures are of that, and it takes ten minutes; profiles there are of a CPU only."""
    (folder / ".venv" / ".test-cpu").touch()
    monkeypatch.setattr(commands, "parse_device", lambda name: torch.device(name or "cuda"))
    suites: list[Suite] = []
    monkeypatch.setattr(Suite, "run", lambda self: suites.append(self) or report())
    list(commands.bench(build_parser().parse_args(handed_on(folder, "bench", "EXTRA=cpu"))))
    assert [case.name for case, _ in suites[0]._cases] == ["demo"]
    assert suites[0]._settings.device.type == "cpu"


@pytest.mark.timeout(900)  # where nothing has exported the demo yet
def test_the_picture_shows_what_its_prompt_says(
    folder: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    shared_export_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(shared_export_cache))
    command, *rest = generated(folder)
    code, _, err = run_cli(command, "--backend", "onnxruntime", *rest)
    assert code == 0, err
    with PIL.Image.open("image.png") as image:
        picture = np.asarray(image)
    match = re.fullmatch(r"an? (\w+) (\w+) (above|below|left of|right of) an? (\w+) (\w+)", rest[-1])
    assert match, rest[-1]
    colour, shape, relation, other_colour, other_shape = match.groups()
    things = [
        Thing(shape=s, colour=c, size="", radius=0, x=0, y=0)
        for c, s in ((colour, shape), (other_colour, other_shape))
    ]
    verdict = judge(picture, Scene(128, 128, "", (0, 0), tuple(things), relation))
    assert verdict == Verdict(objects=True, colours=True, relation=True), find_objects(picture)
