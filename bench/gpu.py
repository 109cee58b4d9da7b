"""Runs everything that needs a CUDA GPU, in parts: `make gpu`.

    python -m latentrt.bench.gpu [--list] [--again] [--out FOLDER] [--seconds N] [PART ...]

The most valuable parts come first: tests of graphs and kernels, where the time of a picture goes, speed compared with
the reference, the kernels one by one, then everything else. If a part fails or takes too long, its results so far are
saved, and the others still run. Parts of what is not installed are skipped and reported.

Whether a part passed depends on what it wrote, and not only on its exit status. A part that passed is not run again as
long as the sources are the same. Tuned block sizes are not sources, except for tests, so use `--again` to measure with
new ones. With `--out`, block sizes that an earlier run tuned are copied back first, since freshly copied sources do not
have them.

If diffusers is not installed, sides are compared with latentrt's own modules in eager PyTorch.
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
from .full import GRACE_SECONDS, Part, line, read_result, run_part
from .kernel_tuning import import_tuned
from .machine import RESULTS, ROOT
from .shutdown import signals_as_ctrl_c
from .stats import LEAST_ROUNDS
from .verdicts import is_unfinished, resumable_verdict, side_verdict

__all__ = ["Step", "main", "steps"]

_BUILD = ROOT / "build" / "gpu"
_TIME_LIMIT = 600.0
_MAX_AUTOTUNE_LIMIT = 3600.0
"""For torch.compile's slowest mode."""
_PATIENCE = {
    "diffusers-compile": _TIME_LIMIT,
    "diffusers-reduce-overhead": _TIME_LIMIT,
    "diffusers-max-autotune": _MAX_AUTOTUNE_LIMIT,
}
_DEFAULT_PATIENCE = 240.0
"""`--patience` of a side that is not in `_PATIENCE`."""
_LOG_LINES = 40
"""The last lines of a part's log, which are printed."""
_MIN_SECONDS = 60.0
"""With less time left, no part is started."""
_MAX_ATTEMPTS = 4
"""Runs of a part that resumes by itself: a kernel that hangs or that loses the GPU ends a run, and the next one skips
that kernel."""
_MAX_RESTARTS = 16
"""Of workers in a part of tests: enough for tests that lose the GPU, and an end where all of them would."""
_MAIN_SIDE = "latentrt-triton"
_SLOWEST_SIDE = "diffusers-max-autotune"
_OTHER_SIDES = (
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
    """A part, and the sides of the benchmark that it needs.

    Attributes:
        any_side: one of the sides is enough.
        build_glob: what its side builds, as a glob in the work folder. It is removed when the part has passed, since a
            disk cannot hold the builds of all sides.
        unfinished: for a part that resumes by itself, and passes even if its time was up: whether work remains. Such a
            part is always run.
        seconds: the time that such a part gets, as `--seconds`.
    """

    part: Part
    sides: tuple[str, ...] = ()
    any_side: bool = False
    build_glob: str = ""
    unfinished: Callable[[], bool] | None = None
    seconds: float = 0.0

    def unavailable_reasons(self) -> list[str]:
        """Why it cannot run on this machine; empty if it can."""
        gpu = torch.device("cuda")
        reasons = [why for name in self.sides if (why := unavailable_reason(SIDES[name], gpu, "float16"))]
        return [] if self.any_side and len(reasons) < len(self.sides) else list(dict.fromkeys(reasons))


def steps(
    results: Path,
    work: Path,
    *,
    out: Path | None = None,
    kernel_seconds: float = 400.0,
    tune_ops: Sequence[str] = (),
) -> list[Step]:
    """All steps, in the order in which they run.

    Args:
        results: folder for the results of the benchmark and the timeline.
        work: folder for random weights and for what sides build.
        out: folder for the kernels' times and tuning; `results` if None.
        kernel_seconds: time after which these start nothing new.
        tune_ops: the operators that are tuned; all if empty.
    """
    reference = reference_side()
    sides = _Sides(results, work, reference)
    files = _files()
    main_side = {name: sides.step(name, 1, _MAIN_SIDE) for name in _CASES}
    other_sides = [sides.step(case, 1, side) for case in _CASES for side in _OTHER_SIDES if side != reference]
    batches = [sides.step("sdxl", n, side) for n in (2, 4, 8) for side in (_MAIN_SIDE, "latentrt-tensorrt")]
    kernels_out = results if out is None else out
    kernels = ("-m", "latentrt.cli", "kernels", "--out", str(kernels_out))
    tune = _part("tune", *kernels, "--tune", *(word for op in tune_ops for word in ("--op", op)))
    measure = _part("kernels", *kernels, "--measure")
    unmarked = "not gpu and not full"
    return [
        Step(_tests("graph-tests", files["graph"], "--timeout=120")),
        # Most of a test's first call is compiling, which takes at most 5 s on a slow core.
        Step(_tests("kernel-tests", files["kernel"], "--timeout=45", workers=4)),
        Step(_tests("kernel-edge-tests", files["kernel edges"], "--timeout=45", workers=4, markers=unmarked)),
        Step(_timeline("sdxl", results, work)),
        main_side["sdxl"],
        main_side["sdxl-refiner"],
        Step(_timeline("sdxl-refiner", results, work)),
        Step(_part("packing", "-m", "latentrt.bench.packing", "--device", "cuda", "--out", str(kernels_out))),
        Step(
            replace(tune, verdict=partial(resumable_verdict, kernels_out, "tuning")),
            unfinished=partial(is_unfinished, kernels_out, "tuning"),
            seconds=kernel_seconds,
        ),
        Step(
            replace(measure, verdict=partial(resumable_verdict, kernels_out, "kernels")),
            unfinished=partial(is_unfinished, kernels_out, "kernels"),
            seconds=kernel_seconds,
        ),
        Step(_tests("stream-tests", files["stream"])),
        Step(
            _tests("engine-tests", files["engine"]),
            ("latentrt-tensorrt", "latentrt-tensorrt-rtx"),
            any_side=True,
        ),
        *other_sides,
        *batches,
        # The side that compiles for longest is last. If it is stopped, it has to start again.
        *(sides.step(case, 1, _SLOWEST_SIDE) for case in _CASES),
    ]


def _part(name: str, *command: str, time_limit: float = _TIME_LIMIT) -> Part:
    return Part(
        name, time_limit, command=command, memory_limit=math.inf, digest_excludes=("results", "tuned")
    )


def _tests(name: str, files: Sequence[str], *options: str, workers: int = 1, markers: str = "gpu") -> Part:
    """A part of tests.

    A test that hangs ends its process (`--timeout-method=thread`), since a signal cannot interrupt a wait for a kernel;
    one that loses the GPU ends it too. So there is at least one worker: another takes its place for the tests that
    follow. Tests that passed are run again with other block sizes, which make other kernels.
    """
    always = f"-p no:randomly --timeout-method=thread --max-worker-restart={_MAX_RESTARTS}"
    return replace(
        _part(name),
        tests=tuple(files),
        digest_excludes=("results",),
        workers=workers,
        markers=markers,
        options=(*always.split(), *options),
    )


def _files() -> dict[str, list[str]]:
    """Kind -> files with tests for a GPU, the riskiest last. Other files are not even imported: they may need something
    that is not installed. "kernel edges" are tests that run in Triton's interpreter where there is no GPU."""
    files: dict[str, list[str]] = {"graph": [], "stream": [], "kernel": [], "kernel edges": [], "engine": []}
    kinds = {
        "test_graphs_gpu": "graph",
        "test_stream_order_gpu": "stream",
        "test_second_device_gpu": "stream",
    }
    for path in sorted(
        (ROOT / "tests").rglob("test_*.py"), key=lambda path: ("attention" in path.name, path)
    ):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        of_kernels = path.parent.name == "kernels"
        if "pytest.mark.gpu" in text:
            files[kinds.get(path.stem, "kernel" if of_kernels else "engine")].append(name)
        if of_kernels and "device: torch.device" in text:  # the fixture
            files["kernel edges"].append(name)
    return files


def _timeline(case: str, results: Path, work: Path) -> Part:
    folders = ("--work", str(work), "--out", str(results / "gpu-timeline"))
    return _part(f"timeline-{case}", "-m", "latentrt.bench.timeline", "--case", case, *folders)


@dataclass(frozen=True)
class _Sides:
    results: Path
    work: Path
    reference: str

    def step(self, case: str, batch: int, side: str) -> Step:
        """A side compared with the reference.

        Its pictures are compared with the reference's in float32, two or as many as the batch. Those are generated one
        by one, by estimate in ten seconds each on an H200. At batch size 1 there are just enough rounds for a 95 %
        interval. Larger batches only measure throughput.
        """
        rounds = LEAST_ROUNDS if batch == 1 else 3
        out = self.results / f"gpu-{case}-{batch}" / side
        command = f"-m latentrt.cli bench --device cuda --case {case} --batch {batch}".split()
        command += ["--work", str(self.work), "--patience", f"{_PATIENCE.get(side, _DEFAULT_PATIENCE):g}"]
        command += f"--side {self.reference} --side {self.reference}@float32 --side {side}".split()
        command += ["--pictures", "2", "--rounds", str(rounds), "--out", str(out)]
        name = "-".join([case, *([f"batch-{batch}"] if batch > 1 else []), side])
        time_limit = _MAX_AUTOTUNE_LIMIT if side == _SLOWEST_SIDE else _TIME_LIMIT
        part = _part(name, *command, time_limit=time_limit)
        part = replace(part, reference=self.reference, verdict=partial(side_verdict, out, side))
        return Step(part, (self.reference, side), build_glob=f"{case}/{side}-{'[0-9a-f]' * 12}")


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
        help="tuning and timing kernels start nothing new after",
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
    all_steps = steps(results, work, out=out, kernel_seconds=args.kernel_seconds, tune_ops=args.tune)
    by_name = {step.part.name: step for step in all_steps}
    unknown = [name for name in args.parts if name not in by_name]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(by_name)}")
    chosen = [by_name[name] for name in dict.fromkeys(args.parts or by_name)]
    if args.list:
        for step in chosen:
            print(line(step.part, read_result(folder, step.part), folder))
        return 0
    if not torch.cuda.is_available():
        print(f"these parts are for a CUDA GPU, and PyTorch {torch.__version__} sees none")
        return 1
    if out is not None and (imported := import_tuned(out / "tuned")):
        print(f"block sizes from {out / 'tuned'}: {', '.join(imported)}", flush=True)
    summary: list[tuple[str, bool]] = []
    interrupted = False
    with signals_as_ctrl_c():
        try:
            for text, passed in _run(chosen, folder, work, end, again=args.again):
                summary.append((text, passed))
        except KeyboardInterrupt:
            interrupted = True
    print("\n" + "\n".join(text for text, _ in summary))
    if interrupted:
        print("interrupted; what was found is written, and the same command goes on")
        return 130
    return int(not all(passed for _, passed in summary))


def _run(
    chosen: Sequence[Step], folder: Path, work: Path, end: float, *, again: bool
) -> Iterator[tuple[str, bool]]:
    """Run steps; yields for each a line of the summary, and whether nothing remains to be done."""
    for step in chosen:
        name = step.part.name
        unavailable = step.unavailable_reasons()
        if unavailable:
            yield _printed(f"{name:<40}left out: {', '.join(unavailable)}"), True
            continue
        if _seconds_until(end) < _MIN_SECONDS:
            yield _printed(f"{name:<40}not run: no time is left"), False
            continue
        started = _now()
        for _ in range(_MAX_ATTEMPTS):
            part = replace(step.part, time_limit=min(step.part.time_limit, _seconds_until(end)))
            if step.unfinished is not None:
                seconds = started + step.seconds - _now()
                part = replace(part, command=(*part.command, "--seconds", f"{seconds:.0f}"))
            _printed(f"{name}: at most {part.time_limit:.0f} s; {folder / name}.log")
            try:
                result = run_part(part, folder, again=again or step.unfinished is not None)
            finally:
                # Tuned block sizes are written where kernels read them, and copied to the results.
                if name == "tune" and folder != _BUILD:
                    shutil.copytree(tuning.FOLDER, folder.parent / "tuned", dirs_exist_ok=True)
            with suppress(FileNotFoundError):  # of a part that passed before, only the result may remain
                log = (folder / f"{name}.log").read_text("utf-8", errors="replace").splitlines()
                _printed("\n".join(log[-_LOG_LINES:]))
            time_is_up = min(started + step.seconds - _now(), _seconds_until(end)) < _MIN_SECONDS
            if step.unfinished is None or not step.unfinished() or time_is_up:
                break
        if result.passed and step.build_glob:
            for build in work.glob(step.build_glob):
                shutil.rmtree(build, ignore_errors=True)
        yield _printed(line(part, result, folder)), result.passed


def _seconds_until(end: float) -> float:
    """The time that a part may take, and still save its results before `end`."""
    return end - _now() - GRACE_SECONDS


def _printed(text: str) -> str:
    """Print a text and return it."""
    print(text, flush=True)
    return text


if __name__ == "__main__":
    raise SystemExit(main())
