"""The benchmark of packed blocks, at small shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_components
from helpers.tiny_checkpoints import UNETS
from latentrt.bench import packing
from latentrt.bench.packing import Block, main, measure, table
from latentrt.runtime.engines.packing import defer_biases
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

    def wrong(module: Any, pending: Tensor | None) -> tuple[nn.Module, Tensor]:
        other, lacking = packed(module, pending)
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


@pytest.mark.parametrize(("alive", "measured"), [(True, 4), (False, 2)])
def test_a_block_that_fails_leaves_the_others(
    alive: bool,
    measured: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As long as the GPU works: after an illegal memory access all fail."""

    def failing(block: Block, *how: Any) -> dict[str, Any]:
        if block is SMALL[1]:
            raise RuntimeError("GET was unable to find an engine")
        return measure(block, *how)

    monkeypatch.setattr(packing, "BLOCKS", tuple(SMALL))
    monkeypatch.setattr(packing, "measure", failing)
    monkeypatch.setattr(packing, "gpu_is_alive", lambda device: alive)
    assert main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "packing_cpu.json").read_text())["rows"]
    assert [row["block"] for row in rows] == [block.name for block in SMALL[:measured]]
    assert rows[1]["error"] == "RuntimeError: GET was unable to find an engine"
    assert rows[1]["error"] in capsys.readouterr().out


def test_the_blocks_are_those_of_a_decoding() -> None:
    """Two in the middle, three for each of four levels, three doublings."""
    calls = [(block.kind, block.calls) for block in packing.BLOCKS if block.of == "decoding"]
    assert sum(n for kind, n in calls if kind == "residual") == 14
    assert sum(n for kind, n in calls if kind == "doubling") == 3


class Operations(TorchDispatchMode):
    """Lists what is run: operators, and the shapes of what they are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.run.append((func.name(), shapes))
        return func(*args, **(kwargs or {}))


def operations(module: nn.Module, channels: int, side: int) -> list[tuple[str, list[tuple[int, ...]]]]:
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.zeros(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Operations() as operations:
        module(x)
    return operations.run


def test_what_is_timed_is_what_a_packed_decoder_runs() -> None:
    config = {**tiny_components.VAE, "block_out_channels": [32, 64], "norm_num_groups": 32}
    decoder: Any = tiny_components.vae_decoder(config=config).build()
    defer_biases(decoder)
    for level, side, widths, kinds in [
        (0, 3, [64, 64, 64, 64], ["residual", "residual", "doubling"]),
        (1, 6, [64, 32, 32], ["residual", "residual"]),
    ]:
        timed = []
        for k, kind in enumerate(kinds):
            block = Block("decoding", 1, kind, (widths[k], widths[k + 1]), side)
            assert block.adds_pending_bias
            packed, _ = packing._packed(block.build(), torch.ones(widths[k]))
            timed += operations(packed, widths[k], side)
        assert timed == operations(decoder.decoder.up_blocks[level], widths[0], side)


def test_no_bias_is_pending_where_a_step_of_sdxl_upsamples() -> None:
    unet: Any = tiny_components.unet(config=UNETS["sdxl"]).build()
    defer_biases(unet)
    upsamplings = [layer for up in unet.up_blocks for layer in up.upsamplers]
    assert [layer.bias for layer in upsamplings] == [None, None]
    assert not Block("step", 1, "doubling", (32, 32), 6).adds_pending_bias
