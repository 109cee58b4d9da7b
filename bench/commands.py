"""The body of `latentrt kernels`: parsed arguments in, lines to print out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

import torch

from ..errors import RequestError
from ..kernels import aot, roofline
from ..kernels.registry import specs

__all__ = ["kernels"]


def kernels(args: argparse.Namespace) -> Iterator[str]:
    """What kernels compile to beside their roofline, or their times on this GPU."""
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
    arch, dtype = args.arch or gpu.arch, getattr(torch, args.dtype)
    cases = [(spec, case) for spec in specs(args.op) for case in spec.cases]
    requests = [aot.Request(s.name, c.inputs(dtype, torch.device("meta")), arch) for s, c in cases]
    rows = []
    for (spec, case), built in zip(cases, aot.reports(requests), strict=True):
        floor = {"floor_us": roofline.floor_us(case, dtype, gpu), "gpu": gpu.name, "ceilings": gpu.source}
        work = {"flops": case.flops, "bytes": case.elements * dtype.itemsize, "calls": case.calls}
        kernels = [asdict(report) for report in built]
        rows.append({"op": spec.name, "case": case.name, **work, **floor, "kernels": kernels})
    if args.json:
        yield json.dumps({"arch": arch, "dtype": args.dtype, "rows": rows}, indent=2)
        return
    yield f"sm_{arch}, {args.dtype}; floors of {gpu.name} by {gpu.source} ceilings"
    yield f"{'':44}{'GFLOP':>9}{'MB':>9}{'floor us':>10}{'regs':>6}{'spill':>6}{'smem':>8}  tensor cores"
    for row in rows:
        figures = f"{row['flops'] / 1e9:>9.2f}{row['bytes'] / 1e6:>9.1f}{row['floor_us']:>10.1f}"
        yield f"{row['op'] + ', ' + row['case']:<44}{figures}"
        for k in row["kernels"]:
            cores = ", ".join(f"{count} {name}" for name, count in k["tensor_core"].items())
            code = f"{k['registers']:>6}{k['spills']:>6}{k['shared'] / 1024:>6.0f} K  {cores}"
            yield f"    {k['kernel']:<68}{code}".rstrip()


def _kernels_on_gpu(args: argparse.Namespace) -> Iterator[str]:
    from . import kernel_timing as timing
    from . import kernel_tuning
    from . import kernels as bench

    if args.dry_run:
        work = kernel_tuning.tuned_requests if args.tune else bench.measured_requests
        found = bench.dry_run(work(specs(args.op), args.arch or roofline.gpu(args.gpu).arch), args.seconds)
        yield json.dumps(found, indent=2)
        return
    here = timing.Bench(
        timing.require_gpu(), timing.cuda_microseconds, args.seconds, args.out or timing.RESULTS
    )
    result = (kernel_tuning.tune if args.tune else bench.measure)(here, specs(args.op))
    lines = (kernel_tuning.lines if args.tune else bench.lines)(result)
    yield json.dumps(result, indent=2) if args.json else "\n".join(lines)
