"""The least time an operator can take on a named GPU: its work over what the GPU can do.

    floor = max(FLOPs / matrix rate, bytes / memory bandwidth)

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import RequestError
from .registry import Case

__all__ = ["GPUS", "Gpu", "Limit", "floor_ms", "floor_us", "gpu"]

Limit = Literal["matmul", "copy"]
"""Which ceiling a floor stands on: the matrix rate or the memory bandwidth."""


@dataclass(frozen=True)
class Gpu:
    """Ceilings of one GPU."""

    name: str
    arch: int
    tflops: float
    """Dense fp16 or bf16 matmuls summed in fp32, in TFLOP/s."""
    bandwidth: float
    """Bandwidth of its memory, in TB/s."""
    source: str
    """`datasheet`, or `reported`: measured on such a GPU, but not by this project."""


GPUS = (
    Gpu("H200", 90, 790.0, 4.3, "reported"),
    Gpu("H100", 90, 989.0, 3.35, "datasheet"),  # SXM
    Gpu("B200", 100, 2250.0, 8.0, "datasheet"),
    Gpu("A100", 80, 312.0, 2.039, "datasheet"),  # SXM, 80 GB
    Gpu("L40S", 89, 362.0, 0.864, "datasheet"),
    Gpu("L4", 89, 121.0, 0.300, "datasheet"),
    Gpu("A10", 86, 125.0, 0.600, "datasheet"),
    Gpu("RTX 3090", 86, 71.0, 0.936, "datasheet"),
    Gpu("RTX 4090", 89, 165.2, 1.008, "datasheet"),
    Gpu("RTX 5090", 120, 209.5, 1.792, "datasheet"),
)


def gpu(name: str) -> Gpu:
    """The GPU of this name, in any case.

    Raises:
        RequestError: there is none of that name.
    """
    for found in GPUS:
        if found.name.lower() == name.lower():
            return found
    raise RequestError(
        f"no ceilings are known for the GPU {name!r}; there are {', '.join(g.name for g in GPUS)}"
    )


def floor_ms(flops: float, nbytes: float, on: Gpu) -> tuple[float, Limit]:
    """Milliseconds, and what limits them. For float32 too: its matmuls are no quicker than those of half types."""
    compute, traffic = flops / (on.tflops * 1e9), nbytes / (on.bandwidth * 1e9)
    return (compute, "matmul") if compute >= traffic else (traffic, "copy")


def floor_us(case: Case, dtype: torch.dtype, on: Gpu) -> float:
    """Microseconds. Half types only: other types' matrix rates are not in the table.

    Raises:
        RequestError: the dtype is not a half type.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise RequestError(f"the roofline is for float16 and bfloat16, not {dtype}")
    return 1e3 * floor_ms(case.flops, case.nbytes(dtype), on)[0]
