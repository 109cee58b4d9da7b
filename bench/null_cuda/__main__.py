"""Compares the memory that PyTorch's allocator takes for SDXL at full size with the plan, without a GPU.

    python -m latentrt.bench.null_cuda [--out FILE.json] [--only TEXT] [--trace FILE]

It runs on a CUDA device that computes nothing, and needs PyTorch's CUDA build and gcc: see CONTRIBUTING.md. Each row
generates two pictures, with random weights, in a process of its own. First with memory to spare, to measure the peak.
Then on a device with as many bytes as the plan says and 16 MiB more (since a network's weights take a multiple of
2 MiB), where it has to succeed.

These are no figures of a real GPU: they include neither cuDNN's workspaces nor the CUDA context, and no times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels.atomic_file import write_json
from ...runtime.pipeline import Pipeline
from ...runtime.planner import Planner
from ..cases import case_named
from ..machine import ROOT, describe_machine, module_command
from ..models import resolve_models
from .build import build, environment

_ROUNDING = 16 << 20
"""Bytes by which rounding may exceed the plan."""


@dataclass(frozen=True)
class Row:
    """One request: the benchmark's case, a memory policy, (height, width) in pixels, and the batch size."""

    case: str
    memory: str
    size: tuple[int, int] = (1024, 1024)
    batch: int = 1

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.case}, {self.memory}, {width}x{height}, batch {self.batch}"


ROWS = (
    *(Row(case, memory) for case in ("sdxl", "sdxl-refiner") for memory in ("resident", "balanced", "low")),
    Row("sdxl", "resident", (512, 512)),
    Row("sdxl", "resident", (1344, 768), 2),
    *(Row("sdxl", memory, batch=8) for memory in ("resident", "low")),
    *(Row("sdxl", memory, (2048, 2048)) for memory in ("resident", "low")),
)


def generate(row: Row, work: Path) -> dict[str, int]:
    """Generate two pictures in this process; returns the peak bytes that were live and reserved."""
    device = torch.device("cuda")
    # cuDNN's attention needs functions that the stand-in for CUDA does not have.
    torch.backends.cuda.enable_cudnn_sdp(False)
    case = resolve_models(case_named(row.case), work, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipe = Pipeline.from_pretrained(
        case.model,
        case.refiner,
        backend="triton",
        dtype="float16",
        device=device,
        memory=row.memory,
        cache_dir=work / "cache",
    )
    pipe.set_progress_bar_config(disable=True)
    height, width = row.size
    for seed in range(2):
        pipe(
            "a picture",
            seed=seed,
            height=height,
            width=width,
            num_images_per_prompt=row.batch,
            num_inference_steps=20,
            high_noise_frac=0.8,
            output_type="pt",
        )
    return {"live": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def measure(row: Row, library: Path, work: Path, trace: Path | None) -> dict[str, Any]:
    """A row of the result: the planned bytes, the bytes taken, and whether the planned ones are enough."""
    case = case_named(row.case)
    height, width = row.size
    refiner = None if case.refiner is None else "sdxl-refiner"
    plan = Planner.of("sdxl", refiner).plan(height=height, width=width, batch=row.batch).peak(row.memory)
    traced = {} if trace is None else {"trace": trace}
    taken = _run_child(row, work, environment(library, **traced))
    in_plan = _run_child(row, work, environment(library, bytes=plan + _ROUNDING))
    return {**asdict(row), "plan": plan, **(taken or {}), "made_in_plan": in_plan is not None}


def _run_child(row: Row, work: Path, device: Mapping[str, str]) -> dict[str, int] | None:
    """Run `generate` in a process; None if it failed, in which case the process has printed why."""
    command = [
        sys.executable,
        "-m",
        "latentrt.bench.null_cuda",
        "--work",
        str(work),
        "--row",
        json.dumps(asdict(row)),
    ]
    done = subprocess.run(
        command, env={**os.environ, **device}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        print(f"{row}: exit status {done.returncode}", file=sys.stderr)
        return None
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if a request failed with the memory that was planned for it."""
    parser = argparse.ArgumentParser(description="SDXL's memory on a CUDA device that computes nothing.")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows with this in their name")
    parser.add_argument(
        "--trace", type=Path, help="write every kernel and allocation to this file; `.PID` is added"
    )
    parser.add_argument("--work", type=Path, help="keep the random weights here, 13 GB")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.row is not None:
        fields = json.loads(args.row)
        print(json.dumps(generate(Row(**{**fields, "size": tuple(fields["size"])}), args.work)))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="latentrt-") as scratch:
        library = build(ROOT / "build" / "null_cuda")
        work = args.work or Path(scratch)
        print(f"{'':<44}{'plan':>9}{'live':>9}{'reserved':>10}   made in the plan's bytes")
        for row in ROWS:
            if args.only not in str(row):
                continue
            found = measure(row, library, work, args.trace)
            rows.append(found)
            gigabytes = [
                f"{found[key] / 1e9:.2f}" if key in found else "failed"
                for key in ("plan", "live", "reserved")
            ]
            verdict = "yes" if found["made_in_plan"] else "NO"
            print(f"{row!s:<44}{gigabytes[0]:>9}{gigabytes[1]:>9}{gigabytes[2]:>10}   {verdict}", flush=True)
    if args.out is not None:
        result = {
            "schema": 1,
            "benchmark": "memory on a CUDA device that computes nothing",
            "command": module_command("latentrt.bench.null_cuda", argv),
            "machine": describe_machine(),
            "rows": rows,
        }
        write_json(args.out, result, indent=2)
    return int(not all(row["made_in_plan"] and "reserved" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
