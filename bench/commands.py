"""What `latentrt bench` and `latentrt kernels` run: they take parsed arguments and yield lines to print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendUnavailableError, BenchmarkError, RequestError
from ..kernels import aot, roofline
from ..kernels.registry import specs
from ..runtime.place import parse_device
from .cases import Case, SideSpec
from .machine import command, describe_machine
from .shutdown import signals_as_ctrl_c

__all__ = ["bench", "bench_compare", "bench_list", "bench_loadgen", "bench_sweep", "kernels"]

_SERVER_RATE, _OFFLINE_RATE = 0.5, 2.0
"""LoadGen's rates over the measured one: below it queues stay short in Server, above it Offline lasts long enough."""


def bench(args: argparse.Namespace) -> Iterator[str]:
    """Measure sides beside each other; yields the report's tables and its path."""
    _require_libraries()
    from . import report
    from .cases import case_named, default_sides, sides_named
    from .gates import gate_named
    from .run import Plan
    from .suite import Settings, Suite

    device = parse_device(args.device)
    names = args.case or (["demo"] if device.type == "cpu" else ["sdxl", "sdxl-refiner"])
    cases: list[tuple[Case, list[SideSpec]]] = []
    for name in dict.fromkeys(names):
        case = _adjusted(case_named(name), args)
        cases.append((case, sides_named(args.side or default_sides(case, device))))
    side_names = [side.name for _, sides in cases for side in sides]
    for name in args.profile:
        if name not in side_names:
            raise RequestError(
                f"--profile {name}: it is not measured; {', '.join(dict.fromkeys(side_names))} are"
            )
    plan = Plan(
        prompts=_prompts(args.prompts),
        gate=gate_named(args.gate),
        rounds=args.rounds,
        pictures=args.pictures,
        seed=args.seed,
        profile=args.profile,
        builders=args.builders,
    )
    settings = Settings(
        plan,
        device,
        args.out,
        command(),
        metrics=args.metric,
        clip=args.clip,
        inception=args.inception,
        truth=args.truth,
        lpips=args.lpips,
        work=args.work,
        beside=args.beside,
        patience=args.patience,
    )
    with signals_as_ctrl_c():
        result = Suite(cases, settings).run()
    if args.json:
        yield (args.out / "bench.json").read_text("utf-8").rstrip()
    else:
        yield report.markdown(result)
        yield f"{args.out / 'bench.html'} shows it with plots and pictures; {args.out / 'bench.json'} has all figures"
    rows = [row for case in result.cases for row in case.rows]
    if not any(row.batches for row in rows):
        skipped = [f"{case.case['name']}: {case.skipped}" for case in result.cases if case.skipped]
        reasons = [f"{row.side}: {row.reason}" for row in rows] + skipped
        raise BenchmarkError(f"nothing could be measured; {'; '.join(reasons)}")


def _adjusted(case: Case, args: argparse.Namespace) -> Case:
    """The case with its fields replaced by the options given. They are listed in its summary, which would no longer be
    true otherwise."""
    changes: dict[str, Any] = {
        "model": args.model,
        "refiner": args.refiner,
        "size": args.size,
        "steps": args.steps,
        "batches": args.batch,
        "dtype": args.dtype,
        "guidance": args.guidance,
        "high_noise_frac": args.high_noise_frac,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.refiner == "none" or (args.model is not None and args.refiner is None):
        # A refiner belongs to its base: with another base, only the one given with it is used.
        changes["refiner"] = None
    changes = {name: value for name, value in changes.items() if value != getattr(case, name)}
    described = [f"{name} {_as_option(value)}" for name, value in changes.items() if name != "batches"]
    summary = f"{case.name} with {', '.join(described)}" if described else case.summary
    return replace(case, summary=summary, **changes)


def _as_option(value: Any) -> str:
    """A field of a case, written as its command line option."""
    if isinstance(value, tuple):
        height, width = value
        return f"{width}x{height}"
    return "none" if value is None else str(value)


def _require_libraries() -> None:
    """Check for libraries that every side needs.

    Raises:
        BackendUnavailableError: one is not installed.
    """
    if find_spec("psutil") is None:
        raise BackendUnavailableError(
            'psutil is not installed; pip install "latentrt[bench]" has what benchmarks need'
        )


def _prompts(file: Path | None) -> list[str]:
    """The lines of a file, without empty ones; no prompts if there is no file."""
    if file is None:
        return []
    prompts = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    if not prompts:
        raise RequestError(f"{file} holds no prompts; write one a line")
    return prompts


def bench_list(args: argparse.Namespace) -> Iterator[str]:
    """All cases, sides and gates."""
    from .cases import CASES, SIDES
    from .gates import GATES

    width = 2 + max(map(len, (*CASES, *SIDES, *GATES)))
    for title, table in (("cases", CASES), ("sides", SIDES), ("gates", GATES)):
        yield title
        for row in table.values():
            yield f"    {row.name:<{width}}{row.summary}"


def bench_compare(args: argparse.Namespace) -> Iterator[str]:
    """What changed between two results.

    Raises:
        BenchmarkError: something got worse.
    """
    from .compare import compare
    from .results import read_report

    changes = compare(read_report(args.before), read_report(args.after), args.tolerance)
    yield from map(str, changes)
    regressions = [f"{c.case}, {c.side}, {c.what}" for c in changes if c.verdict == "worse"]
    if regressions:
        raise BenchmarkError(
            f"{len(regressions)} of {len(changes)} figures got worse: {'; '.join(regressions)}"
        )


def bench_loadgen(args: argparse.Namespace) -> Iterator[str]:
    """Run MLPerf's scenarios over a pipeline; yields LoadGen's verdict on each.

    Raises:
        BenchmarkError: one is INVALID.
    """
    from ..runtime.commands import refiner_of
    from ..runtime.pipeline import Pipeline
    from .features import demo_prompts
    from .loadgen import QUERIES, LoadTest, PipelineRunner, Verdict, run_loadgen

    prompts = _prompts(args.prompts) or demo_prompts(64)
    # Before the pipeline is loaded, so that options are checked first.
    tests = [
        LoadTest(
            scenario,
            prompts=len(prompts),
            seconds=args.seconds,
            queries=QUERIES.get(scenario, 1) if args.queries is None else args.queries,
            rate=1.0 if args.rate is None else args.rate,
            latency=args.latency,
            batch=args.batch,
        )
        for scenario in dict.fromkeys(args.scenario) or QUERIES
    ]
    pipe = Pipeline.from_pretrained(
        args.model, refiner_of(args), backend=args.backend, dtype=args.dtype, device=args.device
    )
    generate = PipelineRunner(pipe, prompts, size=args.size, steps=args.steps, guidance=args.guidance)
    if args.rate is None:
        measured_rate = generate.rate(args.batch)
        factors = {"Server": _SERVER_RATE, "Offline": _OFFLINE_RATE}
        tests = [replace(test, rate=measured_rate * factors.get(test.scenario, 1.0)) for test in tests]
    verdicts: list[Verdict] = []
    warm_sizes: set[int] = set()
    for test in tests:
        verdict = run_loadgen(test, generate, args.out / test.scenario, warm_sizes)
        verdicts.append(verdict)
        yield f"{test.scenario}: {'VALID' if verdict.valid else 'INVALID'}"
        yield from (f"    {name}: {value}" for name, value in verdict.figures.items())
        yield from (f"    {reason}" for reason in verdict.reasons)
    invalid = [verdict.scenario for verdict in verdicts if not verdict.valid]
    if invalid:
        raise BenchmarkError(
            f"LoadGen calls {', '.join(invalid)} INVALID; its reasons are above and in {args.out}"
        )


def bench_sweep(args: argparse.Namespace) -> Iterator[str]:
    """Measure time against quality over steps and the refiner's share, on the demo."""
    from ..runtime.pipeline import Pipeline
    from .demo_model.evaluate import grammar_prompts
    from .features import DemoFeatures
    from .live import LiveTable
    from .sweep import sweep, table, write_sweep

    pipe = Pipeline.from_pretrained("demo", "demo", backend=args.backend)
    pipe.set_progress_bar_config(disable=True)

    def generate(prompts: Sequence[str], seeds: Sequence[int], steps: int, frac: float) -> Any:
        return pipe(
            list(prompts), seed=list(seeds), num_inference_steps=steps, high_noise_frac=frac, output_type="np"
        ).images

    machine = describe_machine()
    metadata = {"command": command(), "machine": machine, "seed": args.seed, "backend": pipe.backend}
    write = partial(
        write_sweep, args.out, metadata=metadata, title=f"The demo on {machine['processor']}, {pipe.backend}"
    )
    with LiveTable("sweep", ["demo"]) as live:
        points = sweep(
            generate,
            grammar_prompts(args.pictures, args.seed),
            DemoFeatures(),
            steps=args.steps,
            fracs=args.share,
            batch=args.batch,
            seed=args.seed,
            on_progress=lambda state: live.update("demo", state),
            on_interrupt=write,
        )
    write(points)
    yield from table(points)
    yield f"{args.out / 'sweep.html'} shows it"


def kernels(args: argparse.Namespace) -> Iterator[str]:
    """What kernels compile to, beside their roofline, or their times on this GPU."""
    unknown = set(args.op) - {spec.name for spec in specs()}
    if unknown:
        names = ", ".join(spec.name for spec in specs())
        raise RequestError(f"no operator is called {', '.join(sorted(unknown))}; there are {names}")
    if args.arch is not None and args.arch not in aot.ARCHITECTURES:
        names = ", ".join(f"sm_{arch}" for arch in aot.ARCHITECTURES)
        raise RequestError(f"kernels cannot be compiled for sm_{args.arch}; they can for {names}")
    if args.measure or args.tune:
        yield from _kernels_on_gpu(args)
        return

    gpu = roofline.gpu(args.gpu)
    name = args.dtype or "bfloat16"
    arch, dtype = args.arch or gpu.arch, getattr(torch, name)
    cases = [(spec, case) for spec in specs(args.op) for case in spec.cases]
    requests = [aot.Request(s.name, c.inputs(dtype, torch.device("meta")), arch) for s, c in cases]
    rows: list[dict[str, Any]] = []
    for (spec, case), request, built in zip(cases, requests, aot.reports(requests), strict=True):
        floor = {"floor_us": roofline.floor_us(case, dtype, gpu), "gpu": gpu.name, "ceilings": gpu.source}
        work = {"flops": case.flops, "bytes": case.nbytes(dtype), "calls": case.calls}
        kernels = [asdict(report) for report in built]
        built_of = {"kernels": kernels, "library": aot.by_library(request)}
        rows.append({"op": spec.name, "case": case.name, **work, **floor, **built_of})
    if args.json:
        yield json.dumps({"arch": arch, "dtype": name, "rows": rows}, indent=2)
        return
    yield f"sm_{arch}, {name}; floors of {gpu.name} by {gpu.source} ceilings"
    yield f"{'':44}{'GFLOP':>9}{'MB':>9}{'floor us':>10}{'regs':>6}{'spill':>6}{'smem':>8}  tensor cores"
    for row in rows:
        figures = f"{row['flops'] / 1e9:>9.2f}{row['bytes'] / 1e6:>9.1f}{row['floor_us']:>10.1f}"
        yield f"{row['op'] + ', ' + row['case']:<44}{figures}"
        for k in row["kernels"]:
            cores = ", ".join(f"{count} {instruction}" for instruction, count in k["tensor_core"].items())
            code = f"{k['registers']:>6}{k['spills']:>6}{k['shared'] / 1024:>6.0f} K  {cores}"
            yield f"    {k['kernel']:<68}{code}".rstrip()
        if row["library"]:
            yield "    PyTorch's libraries, by kernels/tuned"


def _kernels_on_gpu(args: argparse.Namespace) -> Iterator[str]:
    from . import kernel_timing, kernel_tuning
    from . import kernels as timings
    from .kernel_candidates import table_uses, tuning_requests

    if args.tune and args.dtype:
        raise RequestError("--tune finds what serves both half types, by bfloat16; leave --dtype out")
    operators = specs(args.op)
    dtypes = timings.DTYPES if args.dtype is None else (getattr(torch, args.dtype),)
    if args.dry_run:
        arch = args.arch or roofline.gpu(args.gpu).arch
        requests = (
            tuning_requests(table_uses(operators, arch), arch)
            if args.tune
            else timings.measured_requests(operators, arch, dtypes)
        )
        yield json.dumps(timings.dry_run(requests, args.seconds), indent=2)
        return
    timing = kernel_timing.Timing(
        kernel_timing.require_gpu(),
        kernel_timing.cuda_microseconds,
        args.seconds,
        args.out,
    )
    with signals_as_ctrl_c():
        result = (
            kernel_tuning.tune(timing, operators) if args.tune else timings.measure(timing, operators, dtypes)
        )
    lines = kernel_tuning.lines(result) if args.tune else timings.lines(result)
    yield json.dumps(result, indent=2) if args.json else "\n".join(lines)
    if args.measure and (wrong := timings.failures(result)):
        raise BenchmarkError(wrong)
