"""Kernels compiled for GPUs that are not here. Slow when cold; the reports are kept beside the interpreter."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import has_ended, written
from latentrt.bench.compiled_kernels import CACHE, DTYPES, Entry, faults, matrix
from latentrt.errors import BackendError
from latentrt.kernels import aot, tuning
from latentrt.kernels.registry import specs

HALVES = (torch.float16, torch.bfloat16)
by_arch = pytest.mark.parametrize("arch", aot.ARCHITECTURES)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def check(entries: Sequence[Entry], at_once: int = 6) -> None:
    """No spills, shared memory within the limit, and exactly the wanted tensor cores: see `faults`."""
    for i in range(0, len(entries), at_once):  # each with its own time limit
        some = entries[i : i + at_once]
        for entry, reports in zip(some, aot.reports([e.request for e in some], CACHE), strict=True):
            for report in reports:
                assert not list(faults(entry, report)), (entry.case, report)


SHORT = [
    (80, torch.float16, "geglu", "4096 x 2560"),
    (86, torch.float16, "linear_geglu", "1024 x 1280 to 5120"),
    (89, torch.bfloat16, "layer_norm", "4096 x 640"),
    (90, torch.bfloat16, "attention", "head of 64, 4096 keys"),
    (90, torch.float16, "attention", "head of 64, 4096 keys, specialized"),
    (90, torch.float16, "linear_geglu", "1024 x 1280 to 5120"),
    (100, torch.float16, "attention", "head of 64, 77 keys"),
    (120, torch.bfloat16, "geglu", "4096 x 2560"),
]
"""A little for `make test`: every architecture, both half types."""


def test_a_few_of_the_matrix() -> None:
    """All at once: that is one process, and half of what each takes is its start."""
    assert {arch for arch, *_ in SHORT} == set(aot.ARCHITECTURES)
    assert {dtype for _, dtype, *_ in SHORT} == set(HALVES)
    named = {key: {(e.request.op, e.case): e for e in matrix(*key)} for key in {row[:2] for row in SHORT}}
    check([named[arch, dtype][op, case] for arch, dtype, op, case in SHORT], at_once=len(SHORT))


@pytest.mark.parametrize("variant", [{}, {"TMA": 1}], ids=["plain", "copied"])
def test_a_projections_values_and_gates_are_one_matmul(variant: dict[str, int]) -> None:
    """And two blocks fit an SM, so that one multiplies while the other computes gates."""
    (spec,) = specs(["linear_geglu"])
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
    args = spec.cases[0].inputs(torch.float16, torch.device("meta"))
    request = aot.Request("linear_geglu", args, 90, ("linear_geglu", {**sizes, **variant}))
    ((report,),) = aot.reports([request], CACHE)
    assert report.tensor_core == {"HGMMA": 64 // 16}  # of a warp group, which has 64 rows
    assert 2 * report.registers * 32 * report.num_warps <= 65536
    assert 2 * (report.shared + 1024) <= (aot.SHARED_LIMIT[90] + 1) * 1024


@pytest.mark.parametrize("D", [40, 64])
def test_two_programs_of_a_texts_attention_fit_an_sm(D: int) -> None:
    """With Triton 3.6 only if their loads are staged."""
    staged = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    request = attention(D, 90, 77, trial=("attention", staged))
    ((report,),) = aot.reports([request], CACHE)
    assert 2 * report.registers * 32 * report.num_warps <= 65536


def test_silu_of_half_types_has_no_division() -> None:
    """Which costs eleven instructions an element; by an inverse root it is six."""
    apply = []
    for op in ("group_norm", "group_norm_silu"):
        x = torch.empty(2, 640, 64, 64, dtype=torch.bfloat16, device="meta")
        x, w = x.contiguous(memory_format=torch.channels_last), x.new_empty(640)
        ((_, report),) = aot.reports([aot.Request(op, (x, w, w, 32, 1e-5), 90)], CACHE)
        apply.append(report)
    plain, silu = apply
    elements = silu.constants["BLOCK_C"] * silu.constants["BLOCK_S"] / (32 * silu.num_warps)
    assert silu.kernel == "_apply_kernel"
    assert (silu.instructions - plain.instructions) / elements < 8


def test_the_gate_of_half_types_is_short() -> None:
    """Without erf, which alone takes 25 instructions: 22 for an element with its loads and its store, not 40."""
    x = torch.empty(2, 1024, 10240, dtype=torch.bfloat16, device="meta")
    ((report,),) = aot.reports([aot.Request("geglu", (x,), 90)], CACHE)
    elements = report.constants["BLOCK_M"] * report.constants["BLOCK_N"] / (32 * report.num_warps)
    assert report.instructions / elements < 26


@pytest.mark.full
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("op", [spec.name for spec in specs()])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@by_arch
def test_the_matrix(arch: int, dtype: torch.dtype, op: str) -> None:
    check([entry for entry in matrix(arch, dtype) if entry.request.op == op])


@by_half
@by_arch
def test_the_matrix_asks_for_every_tuned_key(
    arch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of half types, and what the sampler step has in float32: a new one needs a request. Nothing is compiled."""
    check_that_every_key_is_asked_for(arch, dtype, monkeypatch)


@pytest.mark.usefixtures("untuned")
def test_the_matrix_asks_for_plain_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tuning chose TMA or libraries, as it may for every shape that it times."""
    rows = tuning.load(90)["tables"]
    for table, key in (("attention", "16/d64"), ("attention", "16/d64-long"), ("linear_geglu", "16/many")):
        tuning.save(90, table, {key: {**rows[table][key], "TMA": 1}})
    tuning.save(90, "attention", {"16/d64-short": tuning.LIBRARY})
    check_that_every_key_is_asked_for(90, HALVES[0], monkeypatch)


def check_that_every_key_is_asked_for(arch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()
    plain = tuning.constants

    def constants(table: str, arch: int, dtype: torch.dtype, shape_class: str) -> Mapping[str, int]:
        asked.add((table, f"{tuning.width(dtype)}/{shape_class}"))
        return plain(table, arch, dtype, shape_class)

    monkeypatch.setattr(tuning, "constants", constants)
    for entry in matrix(arch, dtype):
        if entry.request.trial is None:
            aot.launches(entry.request)
    tables = tuning.load(arch)["tables"]
    keys = {(table, key) for table, rows in tables.items() for key in rows if key.startswith("16/")}
    steps = ("sampler_step", "sampler_step_ratio")
    assert asked == keys | {(table, key) for table in steps for key in tables[table]}


@by_half
@by_arch
def test_the_matrix_has_every_variant(arch: int, dtype: torch.dtype) -> None:
    """Of the constants and of the arguments that may be None, either way."""
    seen: dict[str, set[Any]] = {}
    for entry in matrix(arch, dtype):
        for launch in aot.launches(entry.request):
            for name, value in {**launch.args, **launch.constants}.items():
                kind = value if isinstance(value, bool) else value is None
                seen.setdefault(f"{launch.kernel.name}.{name}", set()).add(kind)
    either = (
        *(
            f"_step_kernel.{name}"
            for name in ("VARIANCE", "CHANNELS_LAST", "history_ptr", "noise_ptr", "scale_ptr")
        ),
        *("_stats_kernel.EVEN", "_stats_kernel.CHANNELS_LAST", "_stats_kernel.shift_ptr"),
        *("_apply_kernel.SILU", "_apply_kernel.CHANNELS_LAST", "_apply_kernel.shift_ptr"),
        *("_linear_geglu_kernel.EVEN_K", "_linear_geglu_kernel.bias_ptr"),
        "_layer_norm_kernel.residual_ptr",
    )
    assert {name for name in either if seen[name] != {True, False}} == set()


def test_the_entries_have_names_of_their_own() -> None:
    for arch in aot.ARCHITECTURES:
        entries = matrix(arch, torch.float16)
        assert len({(e.request.op, e.case) for e in entries}) == len(entries)


def attention(
    D: int, arch: int, Sk: int = 4096, dtype: torch.dtype = torch.float16, trial: aot.Trial | None = None
) -> aot.Request:
    q, k, v = torch.empty(2, 4096, 3, 10, D, dtype=dtype, device="meta").unbind(2)
    return aot.Request("attention", (q, k[:, :Sk], v[:, :Sk]), arch, trial)


@pytest.mark.usefixtures("untuned")
def test_the_cache_is_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request is not compiled again; another architecture, dtype or size is another entry."""
    wanted = [
        attention(64, 90),
        attention(64, 80),
        attention(64, 90, 77),
        attention(64, 90, dtype=torch.float32),
    ]
    digests = {aot._digest(r) for r in wanted}
    assert len(digests) == 4
    monkeypatch.setattr(aot, "version", lambda _: "3.5.0")
    assert aot._digest(wanted[0]) not in digests
    row = dataclasses.asdict(aot.Report("attention", "k", 90, 1, 0, 0, 0, 0, {}, 0, False, 9, 4, 1, {}))
    (tmp_path / f"{aot._digest(wanted[0])}.json").write_text(json.dumps([row]))
    ((report,),) = aot.reports(wanted[:1], tmp_path)
    assert report.instructions == 9


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    """The compiler's own words come through, from a process of its own, and nothing of it is kept."""
    trial = {"BLOCK_M": 48, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}  # no power of two
    wrong = attention(64, 90, trial=("attention", trial))
    with pytest.raises(BackendError, match=r"compiling attention for sm_90 failed: (?s:.)*power of 2"):
        aot.reports([wrong], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_dies_takes_one_request_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each child reports its first request and dies at the second: that one is told of, the rest get another."""
    children: list[list[Path]] = []

    def child(jobs: Sequence[tuple[Path, aot.Job]], until: float, stop: threading.Event) -> str:
        paths = [path for path, _ in jobs]
        children.append(paths)
        paths[0].write_text("[]")
        return "status -6:\nUNREACHABLE executed"

    monkeypatch.setattr(aot, "_compile_in_child", child)
    errors = aot.compile_jobs({tmp_path / f"{i}.json": bytes for i in range(5)})
    assert [len(paths) for paths in children] == [5, 3, 1]
    assert {path.stem: text for path, text in errors.items()} == dict.fromkeys(
        ("1", "3"), "status -6:\nUNREACHABLE executed"
    )


def assembling(folder: Path) -> Any:
    """A job that runs a program for long, as a compiler does, which writes its number into a file first."""
    script = f"echo $$ > {folder / 'written'} && mv {folder / 'written'} {folder / 'pid'} && exec sleep 20"
    return partial(subprocess.run, ["sh", "-c", script])


def test_a_child_that_dies_says_how(tmp_path: Path) -> None:
    (told,) = aot.compile_jobs({tmp_path / "0": os.abort}).values()
    assert told.startswith("status -6:")


def test_ctrl_c_ends_what_compiles(tmp_path: Path) -> None:
    """The compiler does not get the terminal's: it is no answer of the compiler's, to be followed by another try."""

    def interrupt() -> None:
        seen.append(os.getsid(int(written(tmp_path / "pid"))))
        signal.pthread_kill(main, signal.SIGINT)

    seen: list[int] = []
    main, thread = threading.get_ident(), threading.Thread(target=interrupt)
    # In the background of a shell it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            aot.compile_jobs({tmp_path / name: assembling(tmp_path) for name in "ab"})
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert has_ended(int(written(tmp_path / "pid")))
    assert seen != [os.getsid(0)]
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def test_what_compiles_ends_with_its_parent(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", aot.__name__], stdin=subprocess.PIPE, start_new_session=True
    )
    assert child.stdin is not None
    child.stdin.write(pickle.dumps([(tmp_path / "0", assembling(tmp_path))]))
    child.stdin.flush()
    pid = int(written(tmp_path / "pid"))
    child.stdin.close()  # as a parent's death does
    assert child.wait(10) == -signal.SIGKILL
    assert has_ended(pid)


def test_no_time_to_compile(tmp_path: Path) -> None:
    (told,) = aot.attempts([attention(64, 90)], tmp_path, seconds=0.0)
    assert told == "there was no time left to compile it"


@pytest.mark.gpu
def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    """Of every operator, and of attention's and `linear_geglu`'s kernels with tensor descriptors; in a new process,
    whose kernels are in Triton's cache or nowhere."""
    program = """
import os
from contextlib import nullcontext
from pathlib import Path
import torch
from latentrt.kernels import aot, tuning
from latentrt.kernels._triton import Launch
from latentrt.kernels.registry import specs

major, minor = torch.cuda.get_device_capability()
arch, cache = major * 10 + minor, Path(os.environ["TRITON_CACHE_DIR"])
for spec in specs():
    case = spec.cases[0]
    by_tma = [(table, row) for table, rows in spec.candidates.items() for row in rows if row.get("TMA")]
    for trial in [None, *by_tma[: 2 if arch in (90, 100) else 0]]:
        with nullcontext() if trial is None else tuning.trying(*trial):
            for step in spec.plan(*case.inputs(torch.bfloat16, torch.device("meta")), arch=arch)[1]:
                if isinstance(step, Launch):
                    aot.compiled(step, arch)
            before = set(cache.glob("*/*.cubin"))
            spec.op(*case.inputs(torch.bfloat16, torch.device("cuda")))
            new = set(cache.glob("*/*.cubin")) - before
            print(spec.name, trial, *(f"{path.name} was compiled again" for path in new), "" if new else "found")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) >= len(specs())
    assert [line for line in lines if not line.endswith(" found")] == []
