"""Compiles every kernel that may run for every architecture, without a GPU, and checks the result.

    python -m latentrt.bench.compiled_kernels     writes out/kernels_compiled.json

The registry's cases are SDXL's shapes on the usual path. Added to these are other head sizes, layouts and variants, so
that each block size in `kernels/tuned` is compiled at least once; and the variants with tensor descriptors (TMA) that
are tried on a GPU. `tests/kernels/test_aot.py` checks the same list.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..kernels import aot, roofline, tuning
from ..kernels._attention_triton import tuning_key
from ..kernels._triton import Descriptor
from ..kernels.atomic_file import write_atomic
from ..kernels.registry import specs
from ..runtime.place import dtype_name
from .machine import describe_machine, module_command

__all__ = [
    "CACHE",
    "DTYPES",
    "SPECIALIZED_SIZES",
    "TENSOR_CORES",
    "TMA_SIZES",
    "TMA_WIDE_SIZES",
    "Entry",
    "compiled_matrix",
    "faults",
    "main",
    "matrix",
]

CACHE = Path(sys.prefix) / "latentrt-aot"
"""In the virtual environment's folder, so that it is removed with it when Triton's version changes."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The instructions that an architecture's matmuls should compile to: on sm_90, HMMA is the slower path."""

TMA_SIZES = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "TMA": 1}
SPECIALIZED_SIZES = {**TMA_SIZES, "num_warps": 4, "num_stages": 2, "SPECIALIZE": 1}
TMA_WIDE_SIZES = {**TMA_SIZES, "BLOCK_D": 64, "BLOCK_V": 256, "BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2}
_TMA_LINEAR_SIZES = {
    "BLOCK_M": 128,
    "BLOCK_N": 64,
    "BLOCK_K": 64,
    "GROUP_M": 8,
    "num_warps": 8,
    "num_stages": 4,
    "TMA": 1,
}
_SPECIALIZED_LINEAR_SIZES = {**_TMA_LINEAR_SIZES, "num_warps": 4, "SPECIALIZE": 1}
"""Block sizes of kernels with TMA, as they are tried on a GPU; the tuned data has none yet."""

_META = torch.device("meta")
_Row = tuple[str, str, tuple[Any, ...], aot.Trial | None]
"""Operator, case, arguments, trial."""


@dataclass(frozen=True)
class Entry:
    """One request of the matrix.

    Attributes:
        case: its name, unique within the operator, the dtype and the architecture.
    """

    case: str
    request: aot.Request
    dtype: torch.dtype


def matrix(arch: int, dtype: torch.dtype) -> list[Entry]:
    """Everything that is compiled for one architecture in one dtype. In float32 these are only the registry's cases."""
    rows: list[_Row] = [
        (spec.name, case.name, case.inputs(dtype, _META), None) for spec in specs() for case in spec.cases
    ]
    if dtype != torch.float32:
        rows += _attention(arch, dtype)
        rows += _linear_geglu(arch, dtype)
        for rows_of in (_group_norm, _layer_norm, _sampler_step):
            rows += rows_of(dtype)
        if arch in (90, 100):
            rows += _tma_variants(arch, dtype)
    return [Entry(case, aot.Request(op, args, arch, trial), dtype) for op, case, args, trial in rows]


def _qkv(D: int, Sk: int, dtype: torch.dtype, columns: int | None = None) -> tuple[Tensor, ...]:
    """Queries, keys and values as in a model: slices of one projection, with `columns` columns for each head."""
    H = 1 if D == 512 else 10
    q, k, v = torch.empty(2, 4096, 3, H, columns or D, dtype=dtype, device=_META)[..., :D].unbind(2)
    if Sk != 4096:
        k, v = torch.empty(2, Sk, 2, H, columns or D, dtype=dtype, device=_META)[..., :D].unbind(2)
    return q, k, v


def _plain_trial(table: str, arch: int, dtype: torch.dtype, shape_class: str) -> aot.Trial | None:
    """Where the tuned data choose something else than the plain kernel, what launches that."""
    if tuning.is_plain(tuning.constants(table, arch, dtype, shape_class)):
        return None
    return table, tuning.constants(table, arch, dtype, f"{shape_class}{tuning.PLAIN}")


def _attention(arch: int, dtype: torch.dtype) -> list[_Row]:
    """Attention without TMA. The kernels are compiled even where the tuned data choose something else."""

    def row(case: str, q: Tensor, k: Tensor, v: Tensor) -> _Row:
        return "attention", case, (q, k, v), _plain_trial(*tuning_key(q, k, arch))

    heads = [
        row(f"head of {D}, {Sk} keys", *_qkv(D, Sk, dtype))
        for D in (40, 64, 80, 128, 160, 256, 512)
        for Sk in (77, 4096)
    ]
    # Its plain kernel is in the registry's cases, where that is what is tuned.
    middle = row("head of 64, 1024 keys", *_qkv(64, 1024, dtype))
    # The operator copies these to aligned memory.
    unaligned = [
        row(f"head of {D}, 4096 keys, rows of {columns}", *_qkv(D, 4096, dtype, columns))
        for D, columns in ((64, 65), (160, 161), (512, 513))
    ]
    return [*heads, *([middle] if middle[3] else []), *unaligned]


def _group_norm(dtype: torch.dtype) -> list[_Row]:
    rows: list[_Row] = []

    def add(shape: tuple[int, ...], layout: str) -> None:
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device=_META, memory_format=form)
        one = torch.empty(shape[1], dtype=dtype, device=_META)
        shift = torch.empty(shape[:2], dtype=dtype, device=_META)
        size = f"{' x '.join(str(n) for n in shape[1:])}, {layout}"
        rows.append(("group_norm", size, (x, one, one, 32, 1e-5), None))
        rows.append(("group_norm", f"{size}, shifted", (x, one, one, 32, 1e-5, shift), None))
        rows.append(("group_norm_silu", size, (x, one, one, 32, 1e-5), None))
        rows.append(("group_norm_silu", f"{size}, shifted", (x, one, one, 32, 1e-5, shift), None))

    for shape in ((2, 320, 128, 128), (2, 1920, 32, 32), (1, 128, 1024, 1024)):
        add(shape, "contiguous")
    # Sizes that are no multiple of the blocks.
    for layout in ("contiguous", "channels_last"):
        add((2, 320, 33, 31), layout)
    return rows


def _layer_norm(dtype: torch.dtype) -> list[_Row]:
    # Longer than the longest block.
    D = 10000
    x, one = (torch.empty(*size, D, dtype=dtype, device=_META) for size in ((2, 77), ()))
    return [
        ("layer_norm", f"77 x {D}", (x, one, one, 1e-5), None),
        ("add_layer_norm", f"77 x {D}", (x, x, one, one, 1e-5), None),
    ]


def _linear(M: int, K: int, dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    sizes = ((2, M, K), (8 * K, K), (8 * K,))
    x, weight, b = (torch.empty(size, dtype=dtype, device=_META) for size in sizes)
    return x, weight, b if bias else None


def _linear_geglu(arch: int, dtype: torch.dtype) -> list[_Row]:
    calls = {
        "77 x 640": _linear(77, 640, dtype),
        "77 x 640, no bias": _linear(77, 640, dtype, bias=False),
        "4096 x 640, no bias": _linear(4096, 640, dtype, bias=False),
        "4096 x 656, no whole blocks": _linear(4096, 656, dtype),
        "4096 x 651, nothing aligned": _linear(4096, 651, dtype),
        "77 x 651, nothing aligned": _linear(77, 651, dtype),
    }
    rows: list[_Row] = [("linear_geglu", case, args, None) for case, args in calls.items()]
    for M, shape_class in ((77, "few"), (4096, "many")):
        if trial := _plain_trial("linear_geglu", arch, dtype, shape_class):
            rows.append(("linear_geglu", f"{M} x 640, plain", _linear(M, 640, dtype), trial))
    return rows


def _sampler_step(dtype: torch.dtype) -> list[_Row]:
    """The sampler's step with the model's output in `dtype`; everything else is float32."""
    (spec,) = specs(["sampler_step"])
    x, out, history, noise, table, step, *guidance = spec.cases[0].inputs(dtype, _META)
    variance = torch.cat([out, out], 1)
    last = {"memory_format": torch.channels_last}
    calls: dict[str, tuple[Any, ...]] = {
        "unguided": (x, out[:1], history, noise, table, step),
        "unguided, without history and noise": (x, out[:1], None, None, table, step),
        "without history and noise": (x, out, None, None, table, step, *guidance),
        "channels_last": (x, out.contiguous(**last), history, noise, table, step, *guidance),
        "variance": (x, variance, history, noise, table, step, *guidance),
        "variance, channels_last": (x, variance.contiguous(**last), history, noise, table, step, *guidance),
    }
    return [("sampler_step", case, args, None) for case, args in calls.items()]


def _tma_variants(arch: int, dtype: torch.dtype) -> list[_Row]:
    rows: list[_Row] = []
    trials = {"specialized": SPECIALIZED_SIZES, **({"copied": TMA_SIZES} if arch == 90 else {})}
    for Sk in (4096, 4000):
        for name, sizes in trials.items():
            rows.append(
                ("attention", f"head of 64, {Sk} keys, {name}", _qkv(64, Sk, dtype), ("attention", sizes))
            )
        if arch == 90:
            trial = ("attention_wide", TMA_WIDE_SIZES)
            rows.append(("attention", f"head of 512, {Sk} keys, copied", _qkv(512, Sk, dtype), trial))
    for name, sizes in {"copied": _TMA_LINEAR_SIZES, "specialized": _SPECIALIZED_LINEAR_SIZES}.items():
        rows.append(
            ("linear_geglu", f"4096 x 640, {name}", _linear(4096, 640, dtype), ("linear_geglu", sizes))
        )
    return rows


def faults(entry: Entry, report: aot.Report) -> Iterator[str]:
    """What is wrong with one compiled kernel of an entry, if anything."""
    if report.spills or report.stack:
        yield f"{report.spills} spills, {report.stack} bytes of stack"
    if report.shared > aot.SHARED_LIMIT[report.arch] * 1024:
        yield f"{report.shared} bytes of shared memory, of {aot.SHARED_LIMIT[report.arch]} KiB"
    (spec,) = specs([report.op])
    # Tensor cores have no float32 matmuls, and where libraries do the matmuls the kernel has none.
    no_matmuls = entry.dtype == torch.float32 or aot.by_library(entry.request)
    expected = {TENSOR_CORES[report.arch]} if spec.tensor_cores and not no_matmuls else set()
    if set(report.tensor_core) != expected:
        yield f"tensor cores by {sorted(report.tensor_core)}, not {sorted(expected)}"
    launches = [launch for launch in aot.launches(entry.request) if launch.kernel.name == report.kernel]
    specialized = any(launch.constants.get("SPECIALIZE") for launch in launches)
    if report.specialized != specialized:
        yield "warps have roles" if report.specialized else "no warps have roles"
    # Only specialised kernels may need scratch memory, which TensorRT plugins do not provide.
    if (report.scratch > 0) != specialized:
        yield f"{report.scratch} bytes of scratch"
    described = any(isinstance(value, Descriptor) for launch in launches for value in launch.args.values())
    if (report.block_copies > 0) != described:
        yield f"{report.block_copies} copies of whole blocks"


def compiled_matrix(
    entries: Sequence[Entry], cache: Path = CACHE, seconds: float = 600.0
) -> list[dict[str, Any]]:
    """Compile what is not in the cache yet; returns a row for each kernel of each entry.

    Raises:
        BackendUnavailableError: Triton is not installed.
        BackendError: entries do not compile, or not within the time.
    """
    processes = os.cpu_count() or 1
    rows, failed = [], []
    attempts = aot.attempts([e.request for e in entries], cache, processes, seconds)
    for entry, attempt in zip(entries, attempts, strict=True):
        if isinstance(attempt, str):
            failed.append(f"{_title(entry)}: {attempt}")
            continue
        for report in attempt:
            names = {
                "op": entry.request.op,
                "case": entry.case,
                "arch": entry.request.arch,
                "dtype": dtype_name(entry.dtype),
                "tuned": entry.request.trial is None,
            }
            rows.append({**names, **asdict(report), "faults": list(faults(entry, report))})
    if failed:
        raise BackendError("\n".join(failed))
    return rows


def floors() -> list[dict[str, Any]]:
    """The roofline's least microseconds of each of the registry's cases, on each GPU with known ceilings."""
    return [
        {
            "op": spec.name,
            "case": case.name,
            "calls": case.calls,
            "flops": case.flops,
            "bytes": case.nbytes(torch.float16),
            "floor_us": {g.name: round(roofline.floor_us(case, torch.float16, g), 2) for g in roofline.GPUS},
        }
        for spec in specs()
        for case in spec.cases
    ]


def _write(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON with one line for each element of a list."""
    parts = []
    for name, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    write_atomic(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _title(entry: Entry) -> str:
    return f"{entry.request.op}, {entry.case}, sm_{entry.request.arch}, {dtype_name(entry.dtype)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is not compiled yet, and write the file; 1 if a kernel has faults."""
    parser = argparse.ArgumentParser(prog="python -m latentrt.bench.compiled_kernels", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/kernels_compiled.json"), metavar="FILE")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help=f"default {CACHE}")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="to compile what is missing (default 600)"
    )
    args = parser.parse_args(arguments)
    entries = [e for arch in aot.ARCHITECTURES for dtype in DTYPES for e in matrix(arch, dtype)]
    try:
        rows = compiled_matrix(entries, args.cache, args.seconds)
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    faulty = [row for row in rows if row["faults"]]
    gpus = [asdict(g) for g in roofline.GPUS]
    result = {
        "command": module_command("latentrt.bench.compiled_kernels", arguments),
        "machine": describe_machine(torch.device("cpu")),
        "gpus": gpus,
        "floors": floors(),
        "kernels": rows,
    }
    _write(args.out, result)
    print(f"{len(rows)} kernels of {len(entries)} requests, {len(faulty)} with faults: {args.out}")
    for row in faulty:
        print(f"{row['op']}, {row['case']}, sm_{row['arch']}, {row['dtype']}: {'; '.join(row['faults'])}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
