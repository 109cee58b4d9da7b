"""What needs a CUDA GPU, part after part: what `make gpu` runs.

    python -m latentrt.bench.gpu [--list] [--again] [--out FOLDER] [--seconds N] [PART ...]

What is worth most comes first: whether graphs and kernels are right, where the time of a picture goes, what it takes
beside the reference, the kernels one by one, then everything else. A part that fails or takes too long does not keep
the others from their turn, and what it had found until then is written. What is not installed is left out and said to
be.

A part is judged by what it wrote, not by its exit status alone. It is not run again while the sources are the same.
Tuned block sizes are results, not sources, except to tests, so use `--again` for figures with new ones. With `--out`,
sizes tuned by an earlier run are copied back first, since freshly copied sources lack them.

Where diffusers is not installed, latentrt's own modules in eager PyTorch are what others are held against.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic as _now

import torch

from ..kernels import tuning
from .cases import SIDES, reference_side, unavailable_reason
from .full import FAREWELL, Part, line, read_result, run_part
from .kernel_tuning import import_tuned
from .machine import RESULTS, ROOT
from .shutdown import signals_as_ctrl_c
from .stats import LEAST_ROUNDS
from .verdicts import is_left, of_resumable, of_side

__all__ = ["Step", "main", "steps"]

_BUILD = ROOT / "build" / "gpu"
_LIMIT = 600.0
_COMPILES = 3600.0  # the limit of torch.compile's slowest mode
_PATIENCE = {
    "diffusers-compile": _LIMIT,
    "diffusers-reduce-overhead": _LIMIT,
    "diffusers-max-autotune": _COMPILES,
}
_PATIENCE_ELSE = 240.0  # seconds of one answer of a side
_SHOWN = 40  # lines of a log
_LEAST = 60.0  # seconds below which nothing is begun
_RUNS = 4
"""Of one that goes on by itself, at most: a kernel that never comes back ends it, and the next run passes over that."""
_FIRST = "latentrt-triton"
_LAST = "diffusers-max-autotune"
_REST = (
    "latentrt-triton-plain",
    "latentrt-eager",
    "diffusers-reduce-overhead",
    "diffusers-compile",
    "latentrt-tensorrt",
    "latentrt-onnxruntime",
    "latentrt-tensorrt-rtx",
    "onnxruntime",
)
_CASES = ("sdxl", "sdxl-refiner")


@dataclass(frozen=True)
class Step:
    """A part, and the sides of the benchmark without which it has nothing to do.

    Attributes:
        choosing: one of the sides is enough: it takes those that there are.
        kept: what its side builds, by glob; removed when it passed, since a disk does not hold that of all sides.
        left: for a part that resumes by itself and passes when its time is up: whether work remains. Such a part is
            always run.
        seconds: the time such a part gets, as `--seconds`.
    """

    part: Part
    sides: tuple[str, ...] = ()
    choosing: bool = False
    kept: str = ""
    left: Callable[[], bool] | None = None
    seconds: float = 0.0

    def missing(self) -> list[str]:
        """Why it has nothing to do on this machine; empty where it has."""
        gpu = torch.device("cuda")
        why = [reason for name in self.sides if (reason := unavailable_reason(SIDES[name], gpu, "float16"))]
        return [] if self.choosing and len(why) < len(self.sides) else list(dict.fromkeys(why))


def steps(
    results: Path,
    work: Path,
    *,
    out: Path | None = None,
    kernel_seconds: float = 400.0,
    tuned: Sequence[str] = (),
) -> list[Step]:
    """Everything, in its order.

    Args:
        results: folder of what the benchmark and the timeline find.
        work: folder of random weights and of what sides build.
        out: folder of the kernels' times and tuning; `results` where None.
        kernel_seconds: after which these begin nothing new.
        tuned: the operators that are tuned; all where empty.
    """
    reference = reference_side()
    sides = _Sides(results, work, reference)
    files = _files()
    first = {name: sides.step(name, 1, _FIRST) for name in _CASES}
    found = results if out is None else out
    kernels = ("-m", "latentrt.cli", "kernels", "--out", str(found))
    tune = _part("tune", *kernels, "--tune", *(word for op in tuned for word in ("--op", op)))
    time_them = _part("kernels", *kernels, "--measure")
    rest = [sides.step(case, 1, side) for case in _CASES for side in _REST if side != reference]
    many = [sides.step("sdxl", n, side) for n in (2, 4, 8) for side in (_FIRST, "latentrt-tensorrt")]
    return [
        Step(_tests("graph-tests", files["graph"])),
        # Of a test's first call most is compiling, at most 5 s on a slow core.
        Step(_tests("kernel-tests", files["kernel"], "--timeout=45", workers=4)),
        Step(_timeline("sdxl", results, work)),
        first["sdxl"],
        first["sdxl-refiner"],
        Step(_timeline("sdxl-refiner", results, work)),
        Step(_part("packing", "-m", "latentrt.bench.packing", "--device", "cuda", "--out", str(found))),
        Step(
            replace(tune, verdict=partial(of_resumable, found, "tuning")),
            left=partial(is_left, found, "tuning"),
            seconds=kernel_seconds,
        ),
        Step(
            replace(time_them, verdict=partial(of_resumable, found, "kernels")),
            left=partial(is_left, found, "kernels"),
            seconds=kernel_seconds,
        ),
        Step(_tests("stream-tests", files["stream"])),
        Step(
            _tests("engine-tests", files["engine"]),
            ("latentrt-tensorrt", "latentrt-tensorrt-rtx"),
            choosing=True,
        ),
        *rest,
        *many,
        # What compiles for longest is last, and begins anew where it was stopped.
        *(sides.step(case, 1, _LAST) for case in _CASES),
    ]


def _part(name: str, *command: str, limit: float = _LIMIT) -> Part:
    return Part(name, limit, command=command, memory=math.inf, apart=("results", "tuned"))


def _tests(name: str, files: Sequence[str], *options: str, workers: int = 0) -> Part:
    """A test that waits for a kernel that never returns is ended with its process, which no signal would do; what
    passed before is not run again, unless with other block sizes, which make other kernels."""
    return replace(
        _part(name),
        tests=tuple(files),
        apart=("results",),
        workers=workers,
        marked="gpu",
        options=("-p", "no:randomly", "--timeout-method=thread", *options),
    )


def _files() -> dict[str, list[str]]:
    """Files that hold tests for a GPU: of graphs, of streams, of kernels, with the riskiest last, and of engines. No
    other is imported: it may need what is not installed."""
    found: dict[str, list[str]] = {"graph": [], "stream": [], "kernel": [], "engine": []}
    for path in sorted(
        (ROOT / "tests").rglob("test_*.py"), key=lambda path: ("attention" in path.name, path)
    ):
        if "pytest.mark.gpu" in path.read_text("utf-8"):
            known = {
                "test_graphs_gpu": "graph",
                "test_stream_order_gpu": "stream",
                "test_second_device_gpu": "stream",
            }
            kind = known.get(path.stem, "kernel" if path.parent.name == "kernels" else "engine")
            found[kind].append(path.relative_to(ROOT).as_posix())
    return found


def _timeline(case: str, results: Path, work: Path) -> Part:
    folders = ("--work", str(work), "--out", str(results / "gpu-timeline"))
    return _part(f"timeline-{case}", "-m", "latentrt.bench.timeline", "--case", case, *folders)


@dataclass(frozen=True)
class _Sides:
    results: Path
    work: Path
    reference: str

    def step(self, case: str, batch: int, side: str) -> Step:
        """A side beside the reference; alone, held against pictures of that in float32 and in as few rounds as an
        interval of 95 % takes, and in a batch for its throughput."""
        exact = ["--rounds", "3"]
        if batch == 1:
            exact = f"--side {self.reference}@float32 --pictures 2 --rounds {LEAST_ROUNDS}".split()
        out = self.results / f"gpu-{case}-{batch}" / side
        command = f"-m latentrt.cli bench --device cuda --case {case} --batch {batch}".split()
        command += ["--work", str(self.work), "--patience", f"{_PATIENCE.get(side, _PATIENCE_ELSE):g}"]
        command += ["--side", self.reference, *exact, "--side", side, "--out", str(out)]
        name = "-".join([case, *([f"batch-{batch}"] if batch > 1 else []), side])
        part = _part(name, *command, limit=_COMPILES if side == _LAST else _LIMIT)
        part = replace(part, beside=self.reference, verdict=partial(of_side, out, side))
        return Step(part, (self.reference, side), kept=f"{case}/{side}-{'[0-9a-f]' * 12}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 where a part did not pass or had no time, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="What needs a GPU, part after part.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="see --list; all by default")
    parser.add_argument("--list", action="store_true", help="show what passed, and run nothing")
    parser.add_argument("--again", action="store_true", help="run what passed, too")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of everything that is found (default bench/results, logs in build/gpu)",
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="end before this much has passed")
    parser.add_argument(
        "--kernel-seconds",
        type=float,
        default=400.0,
        help="tuning and timing kernels begin nothing new after",
    )
    parser.add_argument(
        "--tune", action="append", default=[], metavar="OP", help="tune this operator only; may be repeated"
    )
    args = parser.parse_args(argv)
    end = _now() + args.seconds
    out = None if args.out is None else args.out.absolute()
    folder = _BUILD if out is None else out / "parts"
    results = RESULTS if out is None else out
    work = _BUILD / "kept"
    made = steps(results, work, out=out, kernel_seconds=args.kernel_seconds, tuned=args.tune)
    known = {step.part.name: step for step in made}
    unknown = [name for name in args.parts if name not in known]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(args.parts or known)]
    if args.list:
        for step in chosen:
            print(line(step.part, read_result(folder, step.part), folder))
        return 0
    if not torch.cuda.is_available():
        print(f"these parts are for a CUDA GPU, and PyTorch {torch.__version__} sees none")
        return 1
    if out is not None and (taken := import_tuned(out / "tuned")):
        print(f"block sizes from {out / 'tuned'}: {', '.join(taken)}", flush=True)
    lines: list[tuple[str, bool]] = []
    interrupted = False
    with signals_as_ctrl_c():
        try:
            for told in _run(chosen, folder, work, end, again=args.again):
                lines.append(told)
        except KeyboardInterrupt:
            interrupted = True
    print("\n" + "\n".join(text for text, _ in lines))
    if interrupted:
        print("interrupted; what was found is written, and the same command goes on")
        return 130
    return int(not all(good for _, good in lines))


def _run(
    chosen: Sequence[Step], folder: Path, work: Path, end: float, *, again: bool
) -> Iterator[tuple[str, bool]]:
    """A line for each part, and whether there is nothing left to do in it."""
    for step in chosen:
        name = step.part.name
        missing = step.missing()
        if missing:
            yield _told(f"{name:<40}left out: {', '.join(missing)}"), True
            continue
        if _until(end) < _LEAST:
            yield _told(f"{name:<40}not run: no time is left"), False
            continue
        begun = _now()
        for _ in range(_RUNS):
            part = replace(step.part, limit=min(step.part.limit, _until(end)))
            if step.left is not None:
                seconds = begun + step.seconds - _now()
                part = replace(part, command=(*part.command, "--seconds", f"{seconds:.0f}"))
            _told(f"{name}: at most {part.limit:.0f} s; {folder / name}.log")
            try:
                result = run_part(part, folder, again=again or step.left is not None)
            finally:
                if name == "tune" and folder != _BUILD:  # they are written where the kernels read them
                    shutil.copytree(tuning.FOLDER, folder.parent / "tuned", dirs_exist_ok=True)
            with suppress(FileNotFoundError):  # one that passed before may have left its result only
                log = (folder / f"{name}.log").read_text("utf-8", errors="replace").splitlines()
                _told("\n".join(log[-_SHOWN:]))
            spent = min(begun + step.seconds - _now(), _until(end)) < _LEAST
            if result.passed or step.left is None or not step.left() or spent:
                break
        if result.passed and step.kept:
            for built in work.glob(step.kept):
                shutil.rmtree(built, ignore_errors=True)
        yield _told(line(part, result, folder)), result.passed


def _until(end: float) -> float:
    """Seconds that a part may take, so that it may still write down what it found."""
    return end - _now() - FAREWELL


def _told(text: str) -> str:
    print(text, flush=True)
    return text


if __name__ == "__main__":
    raise SystemExit(main())
