"""Runs all slow tests, in parts: `make test-full`.

    python -m latentrt.bench.full [--list] [--again] [PART ...]

Each part is a process with a time limit. A part that passed is not run again as long as the sources that it depends on
stay the same; nor is, within a part, a test that passed. So after a failure or an interruption, run the same command
again. It ends with a table and the figures that tests printed; results and logs are in build/full.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..kernels.atomic_file import write_json
from ..runtime.digests import combined
from ..runtime.host_memory import available_bytes
from ..runtime.sha256 import digest_of_files
from . import pytest_resume
from .machine import ROOT
from .shutdown import signals_as_ctrl_c

__all__ = [
    "GRACE_SECONDS",
    "PARTS",
    "Part",
    "PartVerdict",
    "Result",
    "line",
    "main",
    "read_result",
    "run_part",
]

_NO_TESTS_COLLECTED = 5
"""pytest's exit status if every test was skipped because it had passed."""
GRACE_SECONDS = 45.0
"""Time for a part to save its results after it was told to end."""
_SOURCE_FOLDERS = ("bench", "export", "kernels", "runtime")
_SOURCE_SUFFIXES = {".py", ".json", ".safetensors", ".txt", ".html"}
"""What every part depends on, besides its own tests."""


class PartVerdict(NamedTuple):
    """Whether a part passed, and why not, or what remains to be done."""

    passed: bool
    why: str


@dataclass(frozen=True)
class Part:
    """Something to run: tests or a command.

    Attributes:
        name: of the part.
        time_limit: seconds after which it is ended.
        tests: files of tests.
        command: what is run in place of tests: arguments of Python.
        workers: processes that share the tests, one thread each if they are several; 0 runs all in one process, as
            measuring time requires.
        show_output: what its tests print is shown at the end.
        markers: which tests of the files are run: pytest's `-m`.
        options: more options of pytest.
        memory_limit: bytes that it may take.
        digest_excludes: folders that are not in the digest: after a change there, a passed part is not run again.
        reference: the side that it compares with, which is in the digest: with another one the part is run again.
        verdict: called if the exit status is good, to check what the part has written.
    """

    name: str
    time_limit: float
    tests: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workers: int = 0
    show_output: bool = False
    markers: str = "full and not gpu"
    options: tuple[str, ...] = ()
    memory_limit: float = 24e9
    digest_excludes: tuple[str, ...] = ("results",)
    reference: str = ""
    verdict: Callable[[], PartVerdict] | None = None


_BUILD = ROOT / "build" / "full"
_ENGINES = ("-m", "latentrt.bench.full_size_engines", "--out", str(_BUILD / "full_size_engines.json"))
_NAMED = (
    Part("quick", 1800, command=("-m", "pytest", "-q", "-m", "not full", "-n", "2")),
    Part(
        "demo",
        5400,
        (
            "tests/export/test_export_demo.py",
            "tests/export/test_demo_engines.py",
            "tests/export/test_verify.py",
        ),
    ),
    Part("combinations", 5400, ("tests/export/test_export_matrix.py",), workers=2),
    Part("damage", 3600, ("tests/export/test_damaged_exports.py",)),
    Part("parity", 10800, ("tests/runtime/test_pipeline_parity.py",), workers=2),
    Part("kernels", 7200, ("tests/kernels/test_aot.py",), workers=2),
    Part(
        "serving",
        5400,
        ("tests/runtime/serve/test_load.py", "tests/runtime/serve/test_ray.py"),
        show_output=True,
    ),
    Part("quality", 10800, ("tests/bench/test_demo_quality.py",), show_output=True),
    Part("full-size-forward", 1800, command=("-m", "latentrt.bench.full_size")),
    Part("full-size-base", 3600, command=(*_ENGINES, "sdxl_base")),
    Part("full-size-refiner", 3600, command=(*_ENGINES, "sdxl_refiner")),
    Part("full-size-sd", 3600, command=(*_ENGINES, "sd15", "sd21")),
    Part("full-size-split", 3600, command=(*_ENGINES, "sdxl_base", "--split", "--component", "unet")),
)


def _other_test_files() -> tuple[str, ...]:
    """Files with slow tests that are in no named part."""
    named = {file for part in _NAMED for file in part.tests}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.full\b", path.read_text("utf-8"))
    }
    return tuple(sorted(files - named))


PARTS = (*_NAMED, Part("others", 9000, _other_test_files()))


@dataclass(frozen=True)
class Result:
    """The result of a part's last run.

    Attributes:
        digest: of the sources that it depends on.
        passed: whether all of it passed.
        why: why it did not pass; or, if it did, what remains to be done.
        seconds: of that run, without tests that had passed before.
        memory: by how many bytes the machine's available memory fell, other programs included.
    """

    digest: str
    passed: bool
    why: str
    seconds: float
    memory: int


def run_part(part: Part, folder: Path, *, again: bool = False) -> Result:
    """Run what has not passed yet of a part, and save the result in `folder`.

    Args:
        again: run what passed, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = _digest(part)
    earlier = read_result(folder, part)
    if earlier is not None and earlier.digest == digest and earlier.passed and not again:
        return earlier
    started = time.monotonic()
    with open(folder / f"{part.name}.log", "w", encoding="utf-8") as log:
        command = [sys.executable, *(part.command or _tests(part, folder, digest, again=again))]
        threads = {"OMP_NUM_THREADS": "1"} if part.workers > 1 or part.name == "quick" else {}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **threads},
            stdout=log,
            stderr=subprocess.STDOUT,
            # In a group of its own all that it starts can be ended, and the terminal's signals do not reach it.
            process_group=0,
            preexec_fn=_restore_sigint,  # noqa: PLW1509, there is one thread
        )
        try:
            ended, memory = _watch(process, started + part.time_limit)
        finally:
            _terminate(process, part.name)
    good_statuses = (0, *((_NO_TESTS_COLLECTED,) if part.tests else ()))
    why = ""
    # Tests that finished while they were being terminated have passed: interrupted ones have another status.
    if not ended and not (part.tests and process.returncode in good_statuses):
        why = f"ended after {part.time_limit:,.0f} s"
    elif process.returncode not in good_statuses:
        why = f"exit status {process.returncode}"
    elif memory > part.memory_limit:
        why = f"took {memory / 1e9:.1f} GB, the limit is {part.memory_limit / 1e9:.0f} GB"
    passed = not why
    if passed and part.verdict is not None:
        passed, why = part.verdict()
    result = Result(digest, passed, why, round(time.monotonic() - started, 1), memory)
    write_json(folder / f"{part.name}.json", asdict(result), indent=2)
    return result


def _tests(part: Part, folder: Path, digest: str, *, again: bool) -> list[str]:
    """Python's arguments to run the tests of a part, without those that passed."""
    passed = folder / f"{part.name}.{digest[:12]}.passed"
    passed_before = passed.with_suffix(".before")
    printed = passed.with_suffix(".printed")
    for current in (passed, printed):
        for file in folder.glob(f"{part.name}.*{current.suffix}"):
            if file != current or again:
                file.unlink()
    # Workers read this copy while the original is being written.
    passed_before.write_bytes(passed.read_bytes() if passed.exists() else b"")
    files = ["--note-passed", str(passed), "--skip-passed", str(passed_before)]
    if part.show_output:
        files += ["-rP", "--note-printed", str(printed)]
    command = f"-m pytest -p latentrt.bench.pytest_resume -v --durations=0 -n {part.workers}".split()
    return [*command, "-m", part.markers, *part.options, *files, *part.tests]


def _watch(process: subprocess.Popen[bytes], until: float) -> tuple[bool, int]:
    """Wait for a process until that time: whether it ended by itself, and how much memory was taken meanwhile."""
    first = available_bytes() or 0
    lowest = first
    while time.monotonic() < until:
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            lowest = min(lowest, available_bytes() or first)
            continue
        return True, first - lowest
    return False, first - lowest


def _restore_sigint() -> None:
    """A shell's background jobs ignore SIGINT, and their child processes would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _terminate(process: subprocess.Popen[bytes], name: str) -> None:
    """End a process and all that it started. It first gets SIGINT and some time, so that it can save its results."""
    try:
        if process.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                with suppress(OSError):  # if the terminal is gone
                    print(
                        f"ending {name}, which has {GRACE_SECONDS:.0f} s to write down what it found",
                        flush=True,
                    )
                process.wait(GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_result(folder: Path, part: Part) -> Result | None:
    """The result of a part that `run_part` saved, if there is one."""
    try:
        return Result(**json.loads((folder / f"{part.name}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _digest(part: Part) -> str:
    """Digest of the sources that a part depends on: the package, what tests share, and its own tests."""
    own_tests = [ROOT / file for file in part.tests]
    if not part.tests and "pytest" in part.command:
        own_tests = sorted((ROOT / "tests").rglob("*.py"))
    package = _package_digest(part.digest_excludes)
    return combined([package, part.reference, digest_of_files(own_tests, ROOT)])


@cache
def _package_digest(excludes: tuple[str, ...]) -> str:
    files = [path for folder in _SOURCE_FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
    files = [
        path
        for path in files
        if path.suffix in _SOURCE_SUFFIXES and not set(excludes) & set(path.relative_to(ROOT).parts)
    ]
    files += [*sorted(ROOT.glob("*.py")), ROOT / "pyproject.toml"]
    files += [*sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "tests" / "helpers").glob("*.py"))]
    return digest_of_files(files, ROOT)


def line(part: Part, result: Result | None, folder: Path) -> str:
    """The state of a part, in one line."""
    if result is None or result.digest != _digest(part):
        done = sum(
            len(pytest_resume.read_passed(file))
            for file in folder.glob(f"{part.name}.{_digest(part)[:12]}.passed")
        )
        return f"{part.name:<40}not run" + (f", {done} of its tests passed" if done else "")
    state = "passed" if result.passed else "FAILED"
    seconds, memory = f"{result.seconds:,.0f} s", f"{result.memory / 1e9:.1f} GB"
    return f"{part.name:<40}{state:<8}{seconds:>10}{memory:>10}" + (f"   {result.why}" if result.why else "")


def _figures(part: Part, folder: Path) -> str:
    """What the tests of a part printed, passed or failed, with the present sources."""
    file = folder / f"{part.name}.{_digest(part)[:12]}.printed"
    rows = pytest_resume.read_printed(file) if part.show_output else {}
    return "".join(f"\n{name.rpartition('::')[2]}:\n{text.strip()}\n" for name, text in rows.items())


def main(
    argv: Sequence[str] | None = None, *, parts: Iterable[Part] = PARTS, folder: Path | None = None
) -> int:
    """Command line; 1 where a part did not pass."""
    by_name = {part.name: part for part in parts}
    parser = argparse.ArgumentParser(description="The slow tests, part after part.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(by_name)}; all by default")
    parser.add_argument("--list", action="store_true", help="show what passed, and run nothing")
    parser.add_argument("--again", action="store_true", help="run what passed, too")
    args = parser.parse_args(argv)
    unknown = [name for name in args.parts if name not in by_name]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(by_name)}")
    folder = folder or _BUILD
    chosen = [by_name[name] for name in dict.fromkeys(args.parts or by_name)]
    if not args.list:
        with signals_as_ctrl_c():
            for part in chosen:
                print(
                    f"{part.name}: at most {part.time_limit / 60:.0f} minutes; {folder / part.name}.log",
                    flush=True,
                )
                print(line(part, run_part(part, folder, again=args.again), folder), flush=True)
        print()
    results = [read_result(folder, part) for part in chosen]
    for part, result in zip(chosen, results, strict=True):
        print(line(part, result, folder))
    print("".join(_figures(part, folder) for part in chosen), end="")
    passed = [
        r is not None and r.passed and r.digest == _digest(p) for p, r in zip(chosen, results, strict=True)
    ]
    return int(not all(passed) and not args.list)


if __name__ == "__main__":
    sys.exit(main())
