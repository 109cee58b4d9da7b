"""What `latentrt.bench.compiled_kernels` writes and what it calls a fault; nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.bench import compiled_kernels
from latentrt.bench.compiled_kernels import TENSOR_CORES, Entry, faults, matrix
from latentrt.kernels import aot, tuning
from latentrt.kernels.registry import specs

HALF = torch.float16


def good(r: aot.Request) -> aot.Report:
    """What compiling the first kernel of a request should give; nothing is launched where libraries do all of it."""
    (spec,), launches = specs([r.op]), aot.launches(r)
    half = r.args[0].dtype != torch.float32 and spec.tensor_cores
    kernel = launches[0].kernel.name if launches else ""
    cores = {TENSOR_CORES[r.arch]: 24} if half and not aot.by_library(r) else {}
    specialized = any(launch.constants.get("SPECIALIZE", False) for launch in launches[:1])
    copies = 4 if "_tma" in kernel else 0
    scratch = 256 if specialized else 0
    return aot.Report(
        r.op, kernel, r.arch, 128, 0, 0, 49152, scratch, cores, copies, specialized, 900, 8, 3, {}
    )


def entry(op: str, case: str, arch: int = 90) -> Entry:
    (found,) = (e for e in matrix(arch, HALF) if (e.request.op, e.case) == (op, case))
    return found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"spills": 2, "stack": 8}, ["2 spills, 8 bytes of stack"]),
        ({"shared": 240_000}, ["240000 bytes of shared memory, of 227 KiB"]),
        ({"tensor_core": {"HMMA": 3}}, ["tensor cores by ['HMMA'], not ['HGMMA']"]),
        ({"tensor_core": {"HGMMA": 3, "HMMA": 3}}, ["tensor cores by ['HGMMA', 'HMMA'], not ['HGMMA']"]),
        ({"scratch": 16}, ["16 bytes of scratch"]),
        ({"specialized": True, "scratch": 16}, ["warps have roles", "16 bytes of scratch"]),
        ({"block_copies": 1}, ["1 copies of whole blocks"]),
    ],
)
def test_faults(changes: dict[str, Any], told: list[str]) -> None:
    plain = entry("attention", "head of 64, 4096 keys")
    assert list(faults(plain, replace(good(plain.request), **changes))) == told


@pytest.mark.usefixtures("untuned")
def test_faults_of_what_has_no_products_and_of_variants() -> None:
    norm = entry("layer_norm", "4096 x 640")
    assert list(faults(norm, replace(good(norm.request), tensor_core={"HMMA": 1})))
    between = entry("attention", "VAE 16384, head of 512")
    assert list(faults(between, replace(good(between.request), tensor_core={"HGMMA": 1})))
    special = entry("attention", "head of 64, 4096 keys, specialized")
    assert not list(faults(special, good(special.request)))
    assert list(
        faults(special, replace(good(special.request), specialized=False, scratch=0, block_copies=0))
    ) == [
        "no warps have roles",
        "0 bytes of scratch",
        "0 copies of whole blocks",
    ]


@pytest.mark.usefixtures("untuned")
def test_what_tuning_chose_is_no_fault() -> None:
    """On a GPU a variant with descriptors may be the fastest; then the registry's own cases have its copies."""
    key = "attention", "self 4096 x 10 heads"
    with tuning.trying("attention", {**compiled_kernels.SPECIALIZED_SIZES}):
        chosen = entry(*key)
        report = good(chosen.request)
        assert (report.kernel, report.specialized) == ("_attention_tma", True)
        assert not list(faults(chosen, report))
        assert list(faults(chosen, replace(report, block_copies=0))) == ["0 copies of whole blocks"]
    plain = entry(*key)
    assert list(faults(plain, replace(good(plain.request), block_copies=4))) == ["4 copies of whole blocks"]


def test_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every request of the tests' matrix, with the rooflines and what it was made with; a line for each kernel."""
    spoilt = {"spills": 0}

    def attempts(requests: Sequence[aot.Request], *_: Any) -> list[list[aot.Report] | str]:
        return [[replace(good(r), **spoilt)] for r in requests]

    monkeypatch.setattr(aot, "attempts", attempts)
    path = tmp_path / "results" / "compiled.json"
    assert compiled_kernels.main(["--out", str(path)]) == 0
    assert "0 with faults" in capsys.readouterr().out
    data = json.loads(path.read_text())
    assert data["command"] == f"python -m latentrt.bench.compiled_kernels --out {path}"
    wanted = [
        (arch, str(dtype).removeprefix("torch."), e.request.op, e.case)
        for arch in aot.ARCHITECTURES
        for dtype in compiled_kernels.DTYPES
        for e in matrix(arch, dtype)
    ]
    assert [(r["arch"], r["dtype"], r["op"], r["case"]) for r in data["kernels"]] == wanted
    fields = {
        "registers",
        "spills",
        "shared",
        "scratch",
        "tensor_core",
        "constants",
        "num_warps",
        "num_stages",
    }
    assert all(fields <= row.keys() and not row["faults"] for row in data["kernels"])
    assert {"commit", "versions"} <= data["machine"].keys()
    assert len(data["floors"]) == sum(len(spec.cases) for spec in specs())
    assert data["floors"][0]["floor_us"].keys() == {gpu["name"] for gpu in data["gpus"]}
    assert len(path.read_text().splitlines()) < len(wanted) + 100

    monkeypatch.chdir(tmp_path)
    assert compiled_kernels.main([]) == 0
    assert len(json.loads(Path("out/kernels_compiled.json").read_text())["kernels"]) == len(wanted)

    spoilt["spills"] = 3
    assert compiled_kernels.main(["--out", str(path)]) == 1
    assert "sm_80, float16: 3 spills" in capsys.readouterr().out


def test_what_does_not_compile_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "attempts", lambda requests, *_: ["ptxas died"] * len(requests))
    assert compiled_kernels.main(["--out", str(tmp_path / "compiled.json")]) == 1
    assert "geglu, 4096 x 2560, sm_80, float16: ptxas died" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
