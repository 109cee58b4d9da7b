"""SDXL's blocks: their work is what is counted elsewhere, and a forward is made up of them."""

from __future__ import annotations

import pytest
import torch
from latentrt.bench.proportions import (
    BLOCKS,
    FORWARD_TFLOP,
    Block,
    Measured,
    estimate,
    measure,
    residual,
    table,
    transformer,
)
from torch.utils.flop_counter import FlopCounterMode


def test_a_forward_is_made_up_by_its_work() -> None:
    work = FORWARD_TFLOP * 1e12
    counted = Measured("a", 10, 0.04 * work, [2.0, 2.2], [1.0, 1.1], 0.0)
    rest = Measured("b", None, 0.2 * work, [8.0, 8.0], [4.0, 2.0], 0.0)
    found = estimate([counted, rest])
    assert found["counted_share"] == pytest.approx(0.4)
    # 10 calls, and 0.6 of the work as three calls of 0.2
    assert found["seconds"] == pytest.approx({"eager": (44 + 46) / 2, "onnxruntime": (22 + 17) / 2})
    assert found["speedup"]["value"] == pytest.approx((2 + 46 / 17) / 2)
    assert "40% of its work" in table([counted, rest], found)[-1]


def test_the_blocks_are_sdxls() -> None:
    """Linear layers, convolutions and self-attention of a forward, as counted in the whole UNet."""
    flops = []
    for block in BLOCKS:
        with torch.device("meta"):
            module, inputs = block.make()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
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
def test_both_sides_compute_the_same(block: Block) -> None:
    found = measure(block, rounds=2)
    assert found.difference < 1e-4
    assert len(found.eager) == len(found.onnxruntime) == 2
    assert found.flops > 0
