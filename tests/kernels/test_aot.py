"""Kernels compiled for GPUs that are not here. Slow when cold; the reports are kept beside the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from latentrt.errors import BackendError
from latentrt.kernels import aot
from latentrt.kernels.registry import specs

CACHE = Path(sys.prefix) / "latentrt-aot"
"""The virtual environment's own folder: gone with it, and with it Triton's version."""

TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The instructions that an architecture's matrix products should be: on sm_90, HMMA is the slower path."""


def check(requests: list[aot.Request]) -> None:
    tensor_cores = {spec.name: spec.tensor_cores for spec in specs()}
    for reports in aot.reports(requests, CACHE):
        for report in reports:
            assert report.spills == 0, report
            assert report.stack == 0, report
            assert report.shared <= aot.SHARED_LIMIT[report.arch] * 1024, report
            assert report.scratch == 0, report  # TensorRT plugins have none to give
            if tensor_cores[report.op]:
                assert report.tensor_core.get(TENSOR_CORES[report.arch], 0) > 0, report


def attention(D: int, arch: int, Sk: int = 4096, dtype: torch.dtype = torch.float16) -> aot.Request:
    H = 1 if D == 512 else 10
    q, k, v = torch.empty(2, 4096, 3, H, D, dtype=dtype, device="meta").unbind(2)
    if Sk != 4096:
        k, v = torch.empty(2, Sk, 2, H, D, dtype=dtype, device="meta").unbind(2)
    return aot.Request("attention", (q, k, v), arch)


def test_attention_on_hopper_uses_its_own_tensor_core_instructions() -> None:
    check([attention(64, 90), attention(512, 90)])


def test_attention_before_and_after_hopper() -> None:
    check([attention(64, 86), attention(64, 100)])


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_attention_everywhere(arch: int, dtype: torch.dtype) -> None:
    check([attention(D, arch, Sk, dtype) for D in (40, 64, 80, 128, 160, 512) for Sk in (77, 4096)])


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_case_of_every_operator(arch: int) -> None:
    check([aot.request(s.name, c.name, torch.float16, arch) for s in specs() for c in s.cases])


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
    row = (
        '[{"op": "attention", "kernel": "k", "arch": 90, "registers": 1, "spills": 0, "stack": 0, "shared": 0, '
        '"scratch": 0, "tensor_core": {}, "instructions": 9, "num_warps": 4, "num_stages": 1, "constants": {}}]'
    )
    (tmp_path / f"{aot._digest(wanted[0])}.json").write_text(row)
    ((report,),) = aot.reports(wanted[:1], tmp_path)
    assert report.instructions == 9


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    """The compiler's own words come through, from a process of its own."""
    shapeless = aot.Request("attention", (1, 2, 3), 90)
    with pytest.raises(
        BackendError, match=r"compiling kernels failed \(status 1\):(?s:.)*'int' object has no"
    ):
        aot._compile_in_child({tmp_path / "report.json": shapeless}, tmp_path)
