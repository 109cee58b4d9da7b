"""The benchmark of packed blocks, at small shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.bench import packing
from latentrt.bench.packing import Block, main, measure, table

CPU = torch.device("cpu")
SMALL = [
    Block("step", 3, "residual", (32, 32), 6),
    Block("step", 1, "residual", (64, 32), 5),
    Block("decoding", 2, "residual", (32, 32), 6),
    Block("decoding", 1, "doubling", (32, 32), 6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", SMALL, ids=lambda block: block.name)
def test_both_are_timed_when_they_compute_the_same(block: Block, dtype: torch.dtype) -> None:
    row = measure(block, dtype, CPU, 0.0)
    assert row["block"] == block.name
    assert row["speedup"] == row["plain"] / row["packed"] > 0
    assert 0 < row["packed_error"] < (1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("kind", ["residual", "doubling"])
def test_what_computes_something_else_has_no_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packing._packed

    def wrong(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor]:
        other, lacking = packed(module)  # type: ignore[arg-type]
        return other, lacking + 0.1

    monkeypatch.setattr(packing, "_packed", wrong)
    row = measure(Block("decoding", 1, kind, (32, 32), 6), torch.float32, CPU, 0.0)
    assert row["error"] == "it computes something else"
    assert "speedup" not in row
    assert "something else" in "\n".join(table([row]))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "BLOCKS", tuple(SMALL))
    arguments = ["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]
    assert main([*arguments, "--only", "step"]) == 0
    result = json.loads((tmp_path / "packing_cpu.json").read_text())
    assert [row["block"] for row in result["rows"]] == [SMALL[0].name, SMALL[1].name]
    assert result["dtype"] == "float32"
    assert {"commit", "versions", "processor"} <= set(result["machine"])
    first, second = result["rows"]
    saved = sum(row["calls"] * (row["plain"] - row["packed"]) for row in (first, second)) / 1e3
    assert f"a step's blocks above save {saved:.2f} ms" in capsys.readouterr().out
    monkeypatch.setattr(packing, "_MAX_ERROR_RATIO", -1.0)
    monkeypatch.setattr(packing, "_MAX_FLOAT32_ERROR", 0.0)
    assert main([*arguments, "--only", "doubling"]) == 1


def test_a_trial_leaves_the_published_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCKS", tuple(SMALL))
    monkeypatch.chdir(tmp_path)
    assert main(["--device", "cpu", "--seconds", "0", "--only", SMALL[0].name]) == 0
    rows = json.loads(Path("out/packing_cpu.json").read_text())["rows"]
    assert [row["block"] for row in rows] == [SMALL[0].name]


def test_what_was_timed_is_kept_when_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(block: Block, *how: Any) -> dict[str, Any]:
        if block is SMALL[2]:
            raise KeyboardInterrupt
        return measure(block, *how)

    monkeypatch.setattr(packing, "BLOCKS", tuple(SMALL))
    monkeypatch.setattr(packing, "measure", ended)
    with pytest.raises(KeyboardInterrupt):
        main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "packing_cpu.json").read_text())["rows"]
    assert [row["block"] for row in rows] == [block.name for block in SMALL[:2]]


def test_the_blocks_are_those_of_a_decoding() -> None:
    """Two in the middle, three for each of four levels, three doublings."""
    calls = [(block.kind, block.calls) for block in packing.BLOCKS if block.of == "decoding"]
    assert sum(n for kind, n in calls if kind == "residual") == 14
    assert sum(n for kind, n in calls if kind == "doubling") == 3
