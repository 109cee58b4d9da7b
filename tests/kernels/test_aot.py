"""Kernels compiled for GPUs that are not here. Slow when cold; the reports are kept beside the interpreter."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.errors import BackendError
from latentrt.kernels import aot
from latentrt.kernels.registry import specs

CACHE = Path(sys.prefix) / "latentrt-aot"
"""The virtual environment's own folder: gone with it, and with it Triton's version."""

TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The instructions that an architecture's matrix products should be: on sm_90, HMMA is the slower path."""


def check(requests: list[aot.Request], *, exact: bool = False) -> None:
    """No spills, shared memory within the limit, and tensor cores where products are not `exact` float32."""
    tensor_cores = {spec.name: spec.tensor_cores and not exact for spec in specs()}
    for reports in aot.reports(requests, CACHE):
        for report in reports:
            assert report.spills == 0, report
            assert report.stack == 0, report
            assert report.shared <= aot.SHARED_LIMIT[report.arch] * 1024, report
            assert report.scratch == 0 or report.specialized, report  # TensorRT plugins have none to give
            if tensor_cores[report.op]:
                assert report.tensor_core.get(TENSOR_CORES[report.arch], 0) > 0, report


def attention(
    D: int, arch: int, Sk: int = 4096, dtype: torch.dtype = torch.float16, trial: aot.Trial | None = None
) -> aot.Request:
    H = 1 if D == 512 else 10
    q, k, v = torch.empty(2, 4096, 3, H, D, dtype=dtype, device="meta").unbind(2)
    if Sk != 4096:
        k, v = torch.empty(2, Sk, 2, H, D, dtype=dtype, device="meta").unbind(2)
    return aot.Request("attention", (q, k, v), arch, trial)


def test_attention_on_hopper_uses_its_own_tensor_core_instructions() -> None:
    check([attention(64, 90), attention(512, 90)])


def test_attention_before_and_after_hopper() -> None:
    check([attention(64, 86), attention(64, 100)])


COPIED = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "TMA": 1}
SPECIALIZED = {**COPIED, "num_warps": 4, "num_stages": 2, "SPECIALIZE": 1}
COPIED_WIDE = {**COPIED, "BLOCK_D": 64, "BLOCK_V": 256, "BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2}


def check_variant(r: aot.Request, specialized: bool) -> None:
    check([r])
    for report in aot.reports([r], CACHE)[0]:
        assert report.block_copies > 0, report
        assert report.specialized == specialized, report
        assert (report.scratch > 0) == specialized, report


def test_specialized_attention_on_hopper() -> None:
    check_variant(attention(64, 90, trial=("attention", SPECIALIZED)), True)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("Sk", [4096, 4000], ids=["even", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [90, 100])
def test_attention_by_descriptors(arch: int, dtype: torch.dtype, Sk: int) -> None:
    """As they are tried on a GPU: nothing of it is in the tuned data yet."""
    check_variant(attention(64, arch, Sk, dtype, ("attention", SPECIALIZED)), True)
    if arch == 90:
        check_variant(attention(64, arch, Sk, dtype, ("attention", COPIED)), False)
        check_variant(attention(512, arch, Sk, dtype, ("attention_wide", COPIED_WIDE)), False)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [90, 100])
def test_linear_geglu_by_descriptors(arch: int, dtype: torch.dtype) -> None:
    (spec,) = specs(["linear_geglu"])
    args = spec.cases[0].inputs(dtype, torch.device("meta"))
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_stages": 4, "TMA": 1}
    for variant in ({"num_warps": 8}, {"num_warps": 4, "SPECIALIZE": 1}):
        r = aot.Request("linear_geglu", args, arch, ("linear_geglu", {**sizes, **variant}))
        check_variant(r, "SPECIALIZE" in variant)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_attention_everywhere(arch: int, dtype: torch.dtype) -> None:
    check([attention(D, arch, Sk, dtype) for D in (40, 64, 80, 128, 160, 512) for Sk in (77, 4096)])


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_case_of_every_operator(arch: int, dtype: torch.dtype) -> None:
    exact = dtype == torch.float32
    cases = [(s.name, c.name) for s in specs() for c in s.cases]
    if exact:  # its heads of 512 spill on sm_86: 10 instructions
        cases.remove(("attention", "VAE 16384, head of 512"))
    check([aot.request(*case, dtype, arch) for case in cases], exact=exact)


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

    def child(*_: Any, input: bytes, **__: Any) -> subprocess.CompletedProcess[bytes]:
        paths = [path for path, _ in pickle.loads(input)]
        children.append(paths)
        paths[0].write_text("[]")
        return subprocess.CompletedProcess([], -6, b"", b"UNREACHABLE executed")

    monkeypatch.setattr(aot.subprocess, "run", child)
    jobs = [(tmp_path / f"{i}.json", attention(64, 90)) for i in range(5)]
    errors = aot._compile_in_child(jobs, time.monotonic() + 9)
    assert [len(paths) for paths in children] == [5, 3, 1]
    assert {path.stem: text for path, text in errors.items()} == dict.fromkeys(
        ("1", "3"), "status -6:\nUNREACHABLE executed"
    )


def test_no_time_to_compile(tmp_path: Path) -> None:
    (told,) = aot.attempts([attention(64, 90)], tmp_path, seconds=0.0)
    assert told == "there was no time left to compile it"
