"""SDXL's blocks: their work is what is counted elsewhere, and a forward is made up of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.bench import proportions
from latentrt.bench.proportions import FORWARD_TFLOP, BlockTimes, estimate, measure, table
from latentrt.bench.sdxl_blocks import BLOCKS, Block, residual, transformer
from latentrt.errors import BenchmarkError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def test_a_forward_is_made_up_by_its_work() -> None:
    work = FORWARD_TFLOP * 1e12
    counted = BlockTimes("a", 10, 0.04 * work, "contiguous", [2.0, 2.2], [1.0, 1.1], [0.5, 0.5], 0.0)
    rest = BlockTimes("b", None, 0.2 * work, "channels_last", [8.0, 8.0], [4.0, 2.0], [2.0, 2.0], 0.0)
    found = estimate([counted, rest])
    assert found["counted_share"] == pytest.approx(0.4)
    # 10 calls, and 0.6 of the work as three calls of 0.2
    seconds = {"eager": (44 + 46) / 2, "onnxruntime": (22 + 17) / 2, "latentrt": 11}
    assert found["seconds"] == pytest.approx(seconds)
    assert found["speedups"]["onnxruntime"]["value"] == pytest.approx((2 + 46 / 17) / 2)
    assert found["speedups"]["latentrt"]["value"] == pytest.approx((4 + 46 / 11) / 2)
    told = table([asdict(counted), asdict(rest)], found)
    assert "40% of its work" in told[-1]
    assert "11 s by latentrt (4.09 x, 4.00 to 4.18)" in told[-1]
    assert told[3].startswith("| b | 1352.2 | channels_last | 169 | ")


def test_the_blocks_are_sdxls() -> None:
    """Linear layers, convolutions and self-attention of a forward, as counted in the whole UNet."""
    flops = []
    for block in BLOCKS:
        with torch.device("meta"):
            pair = block.build()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pair.diffusers(*pair.inputs.values())
        flops.append(counter.get_total_flops())
    wide, deep, conv = flops
    assert 10 * wide + 60 * deep == pytest.approx((4.30 + 0.75) * 1e12, rel=0.02)
    assert conv == pytest.approx(2 * 2 * 9 * 320**2 * 128**2, rel=0.01)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            Block("transformer", 1, lambda: transformer(16, 64, 2, text=32)), marks=pytest.mark.full
        ),
        Block("residual", None, lambda: residual(8, 32, embedding=16)),
    ],
    ids=lambda block: block.name,
)
def test_all_sides_compute_the_same(block: Block) -> None:
    found = measure(block, rounds=2)
    assert found.difference < 1e-4
    assert len(found.eager) == len(found.onnxruntime) == len(found.latentrt) == 2
    assert found.layout in ("contiguous", "channels_last")
    assert found.flops > 0


@pytest.mark.parametrize("faster", ["contiguous", "channels_last"])
def test_each_side_is_timed_as_itself_and_in_turns(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"contiguous": 4.0, "channels_last": 4.0, faster: 3.0, "onnxruntime": 2.0, "latentrt": 1.0}
    turns = []

    class Planted:
        """An engine that says whose it is."""

        def __init__(self, side: str, module: nn.Module) -> None:
            self.side, self.module = side, module

        def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"out": self.module(*inputs.values())}

    def seconds_of(call: Any) -> float:
        turns.append(call.func.side if isinstance(call.func, Planted) else layout(call.func, *call.args))
        return seconds[turns[-1]]

    def layout(module: nn.Module, x: Tensor, embedding: Tensor) -> str:
        (last,) = {t.is_contiguous(memory_format=torch.channels_last) for t in (x, module.block.conv1.weight)}
        return "channels_last" if last else "contiguous"

    monkeypatch.setattr(proportions, "_seconds", seconds_of)
    monkeypatch.setattr(
        proportions, "_onnxruntime_engine", lambda pair, _: Planted("onnxruntime", pair.diffusers)
    )
    monkeypatch.setattr(
        proportions.OnnxRuntimeBackend,
        "load",
        lambda _, component, **__: Planted("latentrt", component.build()),
    )
    found = measure(Block("residual", None, lambda: residual(8, 32, embedding=16)), rounds=3)
    assert found.layout == faster
    assert (found.eager, found.onnxruntime, found.latentrt) == ([3.0] * 3, [2.0] * 3, [1.0] * 3)
    assert turns[-9:-6] == [faster, "onnxruntime", "latentrt"]
    assert turns[-6:-3] == ["onnxruntime", "latentrt", faster]
    assert turns[-3:] == ["latentrt", faster, "onnxruntime"]


@pytest.mark.parametrize(
    ("plain", "differs"),
    [
        (lambda out: out + float("nan"), "nan"),
        (lambda out: out + float("inf"), "inf"),
        (lambda out: out + 0.01, r"0\.0\d+"),
        (lambda out: out[0], "inf"),  # broadcast, it would be the same
    ],
    ids=["nan", "inf", "wrong", "shape"],
)
def test_a_side_that_computes_something_else_has_no_speed(
    plain: Callable[[Tensor], Tensor], differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        proportions,
        "_onnxruntime_engine",
        lambda pair, file: lambda inputs: {"out": plain(pair.diffusers(*inputs.values()))},
    )
    block = Block("residual", None, lambda: residual(8, 32, embedding=16))
    told = rf"residual, ONNX Runtime differs from eager by {differs} of its largest value, at most 0\.0"
    with pytest.raises(BenchmarkError, match=told):
        measure(block, rounds=1)


def test_the_result_is_written_with_what_it_was_made_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quick(block: Block, rounds: int) -> BlockTimes:
        seconds = [[1.0 + k] * rounds for k in range(3)]
        return BlockTimes(block.name, block.calls, 6e10, "contiguous", *seconds, difference=0.0)

    monkeypatch.setattr(proportions, "measure", quick)
    out = tmp_path / "new" / "blocks.json"
    assert proportions.main(["--rounds", "2", "--out", str(out)]) == 0
    content = proportions.read_blocks(out)
    assert content["command"] == f"python -m latentrt.bench.proportions --rounds 2 --out {out}"
    assert {"processor", "versions", "commit"} <= content["machine"].keys()
    assert [b["name"] for b in content["blocks"]] == [b.name for b in BLOCKS]
    assert "by latentrt (0.33 x" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        proportions.main(["--rounds", "0"])
    for text, message in (("{", "is not JSON"), ("[]", "holds no blocks"), ('{"schema": 1}', "in schema 2")):
        out.write_text(text)
        with pytest.raises(BenchmarkError, match=message):
            proportions.read_blocks(out)
