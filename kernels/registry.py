"""What is known of each operator: its reference, the error its kernels may have, its work at SDXL's real shapes.

Tests, the ahead-of-time report, the roofline, the measurement and the tuning all read this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from ._dispatch import arch_of
from ._triton import Launch, Library, run

__all__ = ["TIMES_REFERENCE", "ULPS", "Case", "OpSpec", "allowed_error", "register", "specs"]

TIMES_REFERENCE = 2.0
"""A kernel's largest error may be this times that of the operator's reference in the same dtype."""

ULPS = 2.0
"""It may also be so many units in the last place of the largest value: the reference may be exact by luck."""


@dataclass(frozen=True)
class Case:
    """Example inputs of one real shape."""

    name: str
    """Such as `self-attention 4096 x 10`; unique within the operator."""
    inputs: Callable[[torch.dtype, torch.device], tuple[Any, ...]]
    """Arguments of the operator, drawn from the global generator; on the meta device for compiling."""
    flops: float
    """FLOPs of the matmuls, two for a multiply and add; 0 if memory traffic is the whole cost."""
    elements: int
    """Elements read and written at the least, each once."""
    calls: int = 1
    """How often one forward of SDXL's base UNet (or VAE decoder) at 1024x1024 makes this call."""
    float32: int = 0
    """How many of the elements are float32 whatever the dtype."""

    again: int = 0
    """How many elements are read a second time: from memory, as far as they exceed the cache."""

    def nbytes(self, dtype: torch.dtype, cache: float = math.inf) -> int:
        """Bytes of memory traffic, at the least, with a cache of so many bytes."""
        once = self.elements * dtype.itemsize + self.float32 * (4 - dtype.itemsize)
        return once + int(max(0, self.again * dtype.itemsize - cache))


def allowed_error(reference: Tensor, exact: Tensor) -> float:
    """How far from float64 a kernel may be, by its largest error, in the dtype of the operator's reference."""
    largest = float(exact.abs().max())
    ulp = torch.finfo(reference.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0
    usual = float((reference.to(exact.dtype) - exact).abs().max())
    return max(TIMES_REFERENCE * usual, ULPS * ulp)


@dataclass(frozen=True)
class OpSpec:
    """One operator."""

    name: str
    """The name of the public function and of the custom op `latentrt::NAME`."""
    op: Callable[..., Any]
    """The public, checked function."""
    reference: Callable[..., Any]
    plan: Callable[..., tuple[Any, Sequence[Launch | Library]]]
    """`plan(*args, arch=90)`: fresh outputs, and the steps that fill them. Takes meta tensors."""
    cases: Sequence[Case]
    limit: Literal["matmul", "copy"]
    """Which of a GPU's ceilings its time is held against."""
    tensor_cores: bool = False
    """Whether half types must be multiplied by tensor cores."""
    candidates: Mapping[str, Sequence[Mapping[str, int]]] = field(default_factory=dict)
    """Constants, by tuning table, that `latentrt kernels --tune` tries."""
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """PyTorch's own ways to the same result, by name, for `--measure`."""
    baseline_inputs: Mapping[str, Callable[..., tuple[Any, ...]]] = field(default_factory=dict)
    """What makes a baseline's arguments out of the operator's, before it is timed. Others take the operator's."""

    def launch(self, *args: Any) -> Any:
        """Run the plan's steps on the arguments' device; on the CPU, kernels run in Triton's interpreter."""
        device = next(a.device for a in args if isinstance(a, Tensor))
        out, steps = self.plan(*args, arch=arch_of(device))
        return run(steps, out)


_specs: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> None:
    """Add an operator; each kernel file ends with this."""
    if spec.name in _specs:
        raise ValueError(f"the operator {spec.name} is registered twice")
    _specs[spec.name] = spec


def specs(names: Iterable[str] = ()) -> list[OpSpec]:
    """The operators of those names, or all, by name."""
    import_module(__package__)  # whose modules register
    return [_specs[name] for name in sorted(names or _specs)]
