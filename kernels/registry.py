"""What is known of each operator: its reference, its Triton kernels, its work at SDXL's real shapes.

Tests, the ahead-of-time report, the roofline, the measurement and the tuning all read this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch

from ._triton import Launch, arch_of, run

__all__ = ["Case", "OpSpec", "register", "specs"]


@dataclass(frozen=True)
class Case:
    """Example inputs of one real shape."""

    name: str
    """Such as `self-attention 4096 x 10`; unique within the operator."""
    inputs: Callable[[torch.dtype, torch.device], tuple[Any, ...]]
    """Arguments of the operator, drawn from the global generator; on the meta device for compiling."""
    flops: float
    """Of the matrix products, two for a multiply and add; 0 where memory traffic is the whole cost."""
    elements: int
    """Elements read and written at the least, each once; times the dtype's size they are the bytes."""
    calls: int = 1
    """How often one forward of SDXL's base UNet (or VAE decoder) at 1024x1024 makes this call."""


@dataclass(frozen=True)
class OpSpec:
    """One operator."""

    name: str
    """Of the public function and of the custom op `latentrt::NAME`."""
    op: Callable[..., Any]
    """The public, checked function."""
    reference: Callable[..., Any]
    plan: Callable[..., tuple[Any, list[Launch]]]
    """`plan(*args, arch=90)`: fresh outputs, and the launches that fill them. Takes meta tensors."""
    cases: Sequence[Case]
    limit: Literal["matmul", "copy"]
    """Which of a GPU's ceilings its time is held against."""
    tensor_cores: bool = False
    """Whether half types must be multiplied by tensor cores."""
    candidates: Mapping[str, Sequence[Mapping[str, int]]] = field(default_factory=dict)
    """By tuning table: constants that `latentrt kernels --tune` tries."""
    rivals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """PyTorch's own ways to the same result, by name, for `--measure`."""

    def launch(self, *args: Any) -> Any:
        """Run the Triton kernels on the arguments' device; on the CPU, in Triton's interpreter."""
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        out, launches = self.plan(*args, arch=arch_of(device))
        run(launches)
        return out


_specs: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Add an operator; each kernel file ends with this."""
    if spec.name in _specs:
        raise ValueError(f"the operator {spec.name} is registered twice")
    _specs[spec.name] = spec
    return spec


def specs(names: Iterable[str] = ()) -> list[OpSpec]:
    """The operators of those names, or all, by name."""
    import_module(__package__)  # whose modules register
    return [_specs[name] for name in sorted(names or _specs)]
