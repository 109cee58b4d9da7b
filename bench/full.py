"""Everything that is slow, part after part: what `make test-full` runs.

    python -m latentrt.bench.full [--list] [--again] [PART ...]

Each part is a process, with a limit to its time. A part that passed, and within a part of tests each test that passed,
is not run again while the sources it depends on stay the same: run the same command again after a failure, or after it
was stopped. Ends with a table and the figures that tests printed; results and logs are in build/full.
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

__all__ = ["FAREWELL", "PARTS", "Judged", "Part", "Result", "line", "main", "read_result", "run_part"]

_NOTHING_LEFT = 5  # pytest's exit status where every test was left out
FAREWELL = 45.0
"""Seconds in which a part that is stopped may write down what it has."""
# What any part depends on, besides its own tests.
_SOURCES = ("bench", "export", "kernels", "runtime")
_KINDS = {".py", ".json", ".safetensors", ".txt", ".html"}


class Judged(NamedTuple):
    """Whether a part did what it is for, and why not, or what is left of it."""

    passed: bool
    why: str


@dataclass(frozen=True)
class Part:
    """Something to run.

    Attributes:
        name: of the part.
        limit: seconds after which it is ended.
        tests: files of tests of which those marked `full` are run.
        command: what is run in place of tests: arguments of Python's.
        workers: processes that share the tests; 0 runs them in one, as what measures time has to.
        figures: what its tests print is shown in the end.
        marked: which tests of the files are run.
        options: more of pytest's.
        memory: bytes that it may take.
        apart: folders left out of the digest: a change there does not make a passed part stale.
        beside: the side it is compared with; part of the digest, so another one runs the part anew.
        verdict: asked about what a part has written that ended well by its exit status.
    """

    name: str
    limit: float
    tests: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workers: int = 0
    figures: bool = False
    marked: str = "full and not gpu"
    options: tuple[str, ...] = ()
    memory: float = 24e9
    apart: tuple[str, ...] = ("results",)
    beside: str = ""
    verdict: Callable[[], Judged] | None = None


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
        figures=True,
    ),
    Part("quality", 10800, ("tests/bench/test_demo_quality.py",), figures=True),
    Part("full-size-forward", 1800, command=("-m", "latentrt.bench.full_size")),
    Part("full-size-base", 3600, command=(*_ENGINES, "sdxl_base")),
    Part("full-size-refiner", 3600, command=(*_ENGINES, "sdxl_refiner")),
    Part("full-size-sd", 3600, command=(*_ENGINES, "sd15", "sd21")),
    Part("full-size-split", 3600, command=(*_ENGINES, "sdxl_base", "--split", "--component", "unet")),
)


def _unnamed() -> tuple[str, ...]:
    """The other files that hold slow tests."""
    named = {file for part in _NAMED for file in part.tests}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.full\b", path.read_text("utf-8"))
    }
    return tuple(sorted(files - named))


PARTS = (*_NAMED, Part("others", 9000, _unnamed()))


@dataclass(frozen=True)
class Result:
    """How a part went, the last time it was run.

    Attributes:
        digest: of the sources it depends on.
        passed: whether all of it did.
        why: where it did not; where it did, what is left to say.
        seconds: that run's; tests that had passed before are not in it.
        memory: by how many bytes the machine's available memory fell meanwhile, other programs included.
    """

    digest: str
    passed: bool
    why: str
    seconds: float
    memory: int


def run_part(part: Part, folder: Path, *, again: bool = False) -> Result:
    """Run what of a part has not passed yet, and note how it went in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = _digest(part)
    known = read_result(folder, part)
    if known is not None and known.digest == digest and known.passed and not again:
        return known
    begun = time.monotonic()
    with open(folder / f"{part.name}.log", "w", encoding="utf-8") as log:
        command = [sys.executable, *(part.command or _tests(part, folder, digest, again=again))]
        threads = {"OMP_NUM_THREADS": "1"} if part.workers or part.name == "quick" else {}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **threads},
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # so that all it starts can be ended; no terminal's signals reach it
            preexec_fn=_heed_ctrl_c,  # noqa: PLW1509, there is one thread
        )
        try:
            ended, memory = _watch(process, begun + part.limit)
        finally:
            _end(process, part.name)
    good_statuses = (0, *((_NOTHING_LEFT,) if part.tests else ()))
    why = ""
    # Tests that were through while they were being ended have passed: interrupted ones have another status.
    if not ended and not (part.tests and process.returncode in good_statuses):
        why = f"ended after {part.limit:,.0f} s"
    elif process.returncode not in good_statuses:
        why = f"exit status {process.returncode}"
    elif memory > part.memory:
        why = f"took {memory / 1e9:.1f} GB, the limit is {part.memory / 1e9:.0f} GB"
    good = not why
    if good and part.verdict is not None:
        good, why = part.verdict()
    result = Result(digest, good, why, round(time.monotonic() - begun, 1), memory)
    write_json(folder / f"{part.name}.json", asdict(result), indent=2)
    return result


def _tests(part: Part, folder: Path, digest: str, *, again: bool) -> list[str]:
    """Arguments that run the tests of a part, without those that passed."""
    now = folder / f"{part.name}.{digest[:12]}.passed"
    before = now.with_suffix(".before")
    printed = now.with_suffix(".printed")
    for kept in (now, printed):
        for old in folder.glob(f"{part.name}.*{kept.suffix}"):
            if old != kept or again:
                old.unlink()
    # A copy, since workers read it while others write the first.
    before.write_bytes(now.read_bytes() if now.exists() else b"")
    files = ["--note-passed", str(now), "--skip-passed", str(before)]
    if part.figures:
        files += ["-rP", "--note-printed", str(printed)]
    command = f"-m pytest -p latentrt.bench.pytest_resume -v --durations=0 -n {part.workers}".split()
    return [*command, "-m", part.marked, *part.options, *files, *part.tests]


def _watch(process: subprocess.Popen[bytes], until: float) -> tuple[bool, int]:
    """Whether it ended by itself before then, and the memory that was taken meanwhile."""
    first = available_bytes() or 0
    least = first
    while time.monotonic() < until:
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            least = min(least, available_bytes() or first)
            continue
        return True, first - least
    return False, first - least


def _heed_ctrl_c() -> None:
    """What a shell begins in its background ignores Ctrl-C, and so would all that it begins itself."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes], name: str) -> None:
    """It and all it started; by Ctrl-C first, so that it writes down what it has, unless nobody waits for that."""
    try:
        if process.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                with suppress(OSError):  # of a terminal that is gone
                    print(
                        f"ending {name}, which has {FAREWELL:.0f} s to write down what it found", flush=True
                    )
                process.wait(FAREWELL)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_result(folder: Path, part: Part) -> Result | None:
    """How a part went, as `run_part` noted it."""
    try:
        return Result(**json.loads((folder / f"{part.name}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _digest(part: Part) -> str:
    """Of the sources that a part depends on: the package, what tests share, and its own tests."""
    own = [ROOT / file for file in part.tests]
    if not part.tests and "pytest" in part.command:
        own = sorted((ROOT / "tests").rglob("*.py"))
    return combined([_package_digest(part.apart), part.beside, digest_of_files(own, ROOT)])


@cache
def _package_digest(apart: tuple[str, ...]) -> str:
    files = [path for folder in _SOURCES for path in sorted((ROOT / folder).rglob("*"))]
    files = [
        path for path in files if path.suffix in _KINDS and not set(apart) & set(path.relative_to(ROOT).parts)
    ]
    files += [*sorted(ROOT.glob("*.py")), ROOT / "pyproject.toml"]
    files += [*sorted((ROOT / "tests").glob("*.py")), *sorted((ROOT / "tests" / "helpers").glob("*.py"))]
    return digest_of_files(files, ROOT)


def line(part: Part, result: Result | None, folder: Path) -> str:
    """How a part stands, in one line."""
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
    """What its tests printed, also those that failed, with the sources as they are."""
    file = folder / f"{part.name}.{_digest(part)[:12]}.printed"
    rows = pytest_resume.read_printed(file) if part.figures else {}
    return "".join(f"\n{name.rpartition('::')[2]}:\n{text.strip()}\n" for name, text in rows.items())


def main(
    argv: Sequence[str] | None = None, *, parts: Iterable[Part] = PARTS, folder: Path | None = None
) -> int:
    """Command line; 1 where a part did not pass."""
    known = {part.name: part for part in parts}
    parser = argparse.ArgumentParser(description="The slow tests, part after part.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--list", action="store_true", help="show what passed, and run nothing")
    parser.add_argument("--again", action="store_true", help="run what passed, too")
    args = parser.parse_args(argv)
    unknown = [name for name in args.parts if name not in known]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    folder = folder or _BUILD
    chosen = [known[name] for name in dict.fromkeys(args.parts or known)]
    if not args.list:
        with signals_as_ctrl_c():
            for part in chosen:
                print(
                    f"{part.name}: at most {part.limit / 60:.0f} minutes; {folder / part.name}.log",
                    flush=True,
                )
                print(line(part, run_part(part, folder, again=args.again), folder), flush=True)
        print()
    results = [read_result(folder, part) for part in chosen]
    for part, result in zip(chosen, results, strict=True):
        print(line(part, result, folder))
    print("".join(_figures(part, folder) for part in chosen), end="")
    good = [
        r is not None and r.passed and r.digest == _digest(p) for p, r in zip(chosen, results, strict=True)
    ]
    return int(not all(good) and not args.list)


if __name__ == "__main__":
    sys.exit(main())
