"""What every back end agrees on: a component goes in, an engine that runs it comes out.

A `Component` is one neural network of a checkpoint with everything a back end needs to lower it. A `Backend`
turns components into `Engine`s. An engine takes named tensors and returns named tensors; it knows nothing of
prompts, samplers or of the engine that runs before or after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Availability", "Backend", "Component", "Engine", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and dimensions of one input or output; a dimension that varies is a string."""

    name: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape once every named dimension is known."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: `text_encoder`, `text_encoder_2`, `unet`, `vae_decoder`, `vae_encoder`.

    Attributes:
        name: which of them.
        build: makes the module in eval mode with its weights in `dtype`; its forward takes the inputs
            positionally, in the order of `inputs`, and returns a tensor or a tuple in the order of `outputs`.
        dtype: of the weights and of the activations.
        inputs, outputs: the interface every engine of this component has.
        fingerprint: hex digest over the weights, the configuration and the dtype: equal fingerprints compute
            the same function.
        example_sizes: sizes of the named dimensions good for tracing and for checking an export.
        vocab_size: bound of the token ids for text encoders, else 0: examples are drawn below it.
    """

    name: str
    build: Callable[[], nn.Module]
    dtype: torch.dtype
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fingerprint: str
    example_sizes: Mapping[str, int]
    vocab_size: int = 0


class Engine(Protocol):
    """A component ready to run."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once. Tensors are named as in the component's specs; safe to call from several threads."""
        ...

    def close(self) -> None:
        """Free what the engine holds; calling it afterwards is an error."""
        ...


@dataclass(frozen=True)
class Availability:
    """Whether a back end can run here; when not, why, and what would change that."""

    ok: bool
    reason: str = ""
    remedy: str = ""


class Backend(Protocol):
    """A way to run components. Chosen once, when a pipeline is loaded."""

    name: str

    def availability(self) -> Availability:
        """Asked before loading; imports as little as it can."""
        ...

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        """Make the component runnable, exporting or compiling it first where that was not done yet.

        Raises:
            BackendError, ExportError, CacheError
        """
        ...
