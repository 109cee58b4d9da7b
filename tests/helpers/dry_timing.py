"""A small operator, and a timer that needs no GPU, for tests of measuring and tuning kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from latentrt.kernels import tuning
from latentrt.kernels.registry import Case, OpSpec, specs

__all__ = [
    "ATTENTION",
    "BF16",
    "FALLEN",
    "FIRST",
    "SECOND",
    "SMALL",
    "SMALL_WIDE",
    "fake_timer",
    "small_attention",
]

BF16 = [torch.bfloat16]
ATTENTION = specs(["attention"])[0]
SMALL = [
    {"BLOCK_M": 16, "BLOCK_N": n, "num_warps": 4, "num_stages": 1} for n in (48, 16, 32)
]  # 48 cannot be compiled
SMALL_WIDE = [{**small, "BLOCK_D": 64, "BLOCK_V": 64} for small in SMALL]
FIRST, SECOND = "attention, one", "attention, two"
FALLEN = "neither a kernel of ours ran nor the libraries in its place"


def small_attention(**changes: Any) -> OpSpec:
    """Attention with two cases of 20 rows; `changes` of its fields."""

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        return torch.randn(1, 20, 3, 1, 64, dtype=dtype, device=device).unbind(2)

    def fails(*_: object) -> None:
        raise RuntimeError("no such back end")

    # The second is called so often that it is the greater part of a forward.
    fields = {
        **vars(ATTENTION),
        "cases": [Case(name, inputs, 1e6, 5120, calls) for name, calls in (("one", 1), ("two", 3))],
        "candidates": {"attention_wide": SMALL_WIDE, "attention": SMALL},
        "baselines": {"itself": ATTENTION.reference, "broken": fails},
        **changes,
    }
    return OpSpec(**fields)


def fake_timer(
    calls: Mapping[str, Callable[..., Any]], inputs: Sequence[tuple[Any, ...]], seconds: float
) -> dict[str, float | str]:
    """Runs each once; blocks of 32 are the quickest. Of several candidates each is named by its constants."""
    tried = next((c for name, c, _ in tuning._trials if name == "attention"), {})
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        trial = json.loads(name) if name.startswith("{") else tried
        try:
            for args in inputs:
                call(*args)
            found[name] = 10.0 if trial.get("BLOCK_N") == 32 else 19.0
        except RuntimeError as error:
            found[name] = f"RuntimeError: {error}"
    return found
