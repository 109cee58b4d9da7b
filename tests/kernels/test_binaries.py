"""Kernels compiled for plugins: what is in them, and that what a launch passes is what the machine code takes."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.errors import BackendError
from latentrt.kernels import aot, binaries, tuning
from latentrt.kernels.binaries import AheadAttentionKernels, AttentionKernels, GroupNormKernels, Kernels

HALF = torch.float16
PTX = {"*": "u64", "i32": "u32", "fp32": "f32"}


def entry_parameters(ptx: str) -> list[str]:
    """Types of the parameters of PTX's only entry."""
    (entry,) = re.findall(r"\.entry [^(]*\(([^)]*)\)", ptx)
    return re.findall(r"\.param \.(\w+)", entry)


def assemble(ptx: str, arch: int, folder: Path) -> None:
    """As TensorRT would have the driver do it."""
    import triton

    (folder / "kernel.ptx").write_text(ptx)
    # Triton has two assemblers; its PTX for sm_90 and newer is of a version that the older one does not know.
    tools, suffix = triton.knobs.nvidia, "a" if arch >= 90 else ""
    assembler = tools.ptxas_blackwell if arch >= 90 else tools.ptxas
    target = [f"--gpu-name=sm_{arch}{suffix}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    subprocess.run([assembler.path, *target], check=True, capture_output=True)


def content(kernels: Kernels) -> dict[str, Any]:
    (path,) = binaries.binaries([kernels])
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


@pytest.mark.timeout(900)  # seconds on a core to itself
@pytest.mark.parametrize(
    ("kernels", "roles"),
    [
        (
            GroupNormKernels(HALF, 64, 32, True, True, 89),
            ["stats/even", "stats/any", "apply/even", "apply/any"],
        ),
        (AheadAttentionKernels(HALF, 64, True, 0.125, 90), ["attention"]),
    ],
    ids=["group norm", "attention, ahead"],
)
def test_what_is_compiled(kernels: Kernels, roles: list[str], tmp_path: Path) -> None:
    images = content(kernels)["images"]
    assert list(images) == roles
    for role, image in images.items():
        assert base64.b64decode(image["cubin"])[:4] == b"\x7fELF"
        # Triton's own parameter list, without the two pointers to scratch that it puts at the end.
        told = [PTX["*" if kind.startswith("*") else kind] for _, kind in image["parameters"]]
        assert entry_parameters(image["ptx"]) == told
        assemble(image["ptx"], kernels.arch, tmp_path)  # so nothing refers to what was taken off
        assert image["entry"] in image["ptx"]
        assert image["warps"] in (4, 8)
        if role.endswith("even"):  # rows of 16 bytes at once
            assert image["ptx"].count("ld.global.v4") + image["ptx"].count(".v4.b32") > 0
    if "stats/any" in images:
        assert len(images["stats/any"]["ptx"]) > len(images["stats/even"]["ptx"])


def test_every_size_has_the_same_kernels() -> None:
    """Nothing that is compiled in depends on batches, positions, queries or keys, but for what the role says."""
    for kernels in (
        GroupNormKernels(HALF, 320, 32, False, False, 89),
        AttentionKernels(HALF, 64, False, False, 89),
    ):
        for launch in kernels.launches()[0].values():
            _, values, aligned = aot.signature(launch)
            sizes = {"S", "splits", "partials", "H", "Sq", "Sk", "stride_qb", "stride_kb", "stride_vb"}
            assert not sizes & set(values)
            names = list(aot.signature(launch)[0])
            multiples = {names[i] for (i,) in aligned}
            assert not {"splits", "partials", "H", "Sq", "Sk"} & multiples


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("chosen", [{"num_warps": 4, "num_stages": 2, "TMA": 1}, tuning.LIBRARY], ids=str)
def test_plugins_are_launched_as_the_plain_kernel_is_tuned(
    chosen: Mapping[str, int], arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never with what was found for descriptors, which they cannot have."""
    plain = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 2, "num_stages": 1}
    wide = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_V": 128, "num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.save(arch, "attention", {"16/d64": plain})
    tuning.save(arch, "attention_wide", {"16/any": wide})
    for table, key in (("attention", "16/d64"), ("attention_wide", "16/any")):
        row = {"BLOCK_M": 128, "BLOCK_N": 128, **chosen} if "TMA" in chosen else chosen
        tuning.save(arch, table, {key: row})
    for columns, row in ((64, plain), (512, wide)):
        (launch,) = AttentionKernels(HALF, columns, False, False, arch).launches()[0].values()
        assert launch.kernel.name in ("_attention", "_attention_wide")
        assert (launch.num_warps, launch.num_stages) == (row["num_warps"], row["num_stages"])
        assert launch.constants["BLOCK_M"] == row["BLOCK_M"]
        assert launch.constants["BLOCK_N"] == row["BLOCK_N"]


def test_files_are_by_content(tmp_path: Path) -> None:
    wanted = [
        GroupNormKernels(HALF, 320, 32, False, False, 89),
        GroupNormKernels(HALF, 320, 32, True, False, 89),
        GroupNormKernels(HALF, 320, 32, True, True, 89),
        GroupNormKernels(HALF, 640, 32, False, False, 89),
        GroupNormKernels(torch.float32, 320, 32, False, False, 89),
        GroupNormKernels(HALF, 320, 32, False, False, 86),
        AttentionKernels(HALF, 64, False, False, 89),
        AttentionKernels(HALF, 64, False, True, 89),
        AttentionKernels(HALF, 64, True, False, 89),
        AttentionKernels(torch.bfloat16, 64, False, False, 89),
    ]
    for kernels in wanted:
        (tmp_path / f"{binaries._digest(kernels)}.kernels").write_bytes(b"{}")
    assert len(list(tmp_path.iterdir())) == len(wanted)
    assert len(set(binaries.binaries(wanted, tmp_path))) == len(wanted)  # found, not compiled


def test_what_does_not_compile_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = AttentionKernels(HALF, 64, False, False, 89)
    monkeypatch.setattr(
        binaries, "compile_jobs", lambda wanted, processes: dict.fromkeys(wanted, "no such thing")
    )
    with pytest.raises(
        BackendError, match=r"compiling AttentionKernels\(.*columns=64.*arch=89\) failed: no such thing"
    ):
        binaries.binaries([kernels], tmp_path)


def test_what_a_plugin_cannot_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    (launch,) = AttentionKernels(HALF, 64, False, False, 89).launches()[0].values()
    meta = {"name": "k", "num_warps": 4, "num_ctas": 1, "launch_cooperative_grid": False, "shared": 0}
    for change, why in (
        ({"global_scratch_size": 128}, "wants 128 bytes of scratch"),
        ({"shared": 120_000}, r"120000 bytes of shared memory \(there are 99 KiB\)"),
        ({"num_ctas": 2}, "clusters of 2"),
    ):
        built = SimpleNamespace(metadata=SimpleNamespace(**{**meta, **change}), asm={"cubin": b"", "ptx": ""})
        monkeypatch.setattr(binaries, "compiled", lambda launch, arch, built=built: built)
        with pytest.raises(
            BackendError, match=rf"_attention for sm_89 .*{why}.*, which a plugin cannot give"
        ):
            binaries._image(launch, 89)
