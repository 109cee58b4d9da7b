"""The interface of back ends: a component goes in, an engine that runs it comes out.

A `Component` is one neural network of a checkpoint with everything a back end needs to lower it. A `Backend`
turns components into `Engine`s. An engine takes named tensors and returns named tensors; it knows nothing of
prompts, samplers or the engines that run before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ...errors import BackendError

__all__ = [
    "STEPS_AT_ONCE",
    "Availability",
    "Backend",
    "CallProgram",
    "Component",
    "Engine",
    "Movable",
    "Program",
    "TensorSpec",
    "Timesteps",
    "Values",
    "check_bound",
    "check_inputs",
    "example_inputs",
    "ordered_inputs",
    "output_shapes",
    "sizes_of",
    "still_open",
]

Held = TypeVar("Held")

STEPS_AT_ONCE = 64
"""Timesteps embedded per call, each with the rows of a step: enough for a usual loop in one. All 1,000 at once would
double the memory that their shifts take."""


@dataclass(frozen=True)
class Values:
    """The range of an input's values; examples are drawn from it uniformly.

    Attributes:
        low, high: the bounds; `high` itself is never drawn. For integers both must be integers.
        last: written at the end of the last dimension, e.g. the end-of-text token of a prompt.
    """

    low: float
    high: float
    last: int | None = None


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and dimensions of one input or output; a dimension that varies is a string.

    Inputs without `values` are floating-point, and their examples are standard normal.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype
    values: Values | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the named dimensions."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: `text_encoder`, `text_encoder_2`, `unet`, `vae_decoder`, `vae_encoder`.

    Attributes:
        name: which of them.
        build: makes the module in eval mode with its weights in `dtype`; its forward takes the inputs
            positionally, in the order of `inputs`, and returns a tensor or a tuple in the order of `outputs`.
        dtype: of the weights and of the activations.
        inputs, outputs: the interface every engine of this component has. The first dimension of an input is
            `"batch"` wherever there is one; the named dimensions of outputs are their own.
        fingerprint: hex digest over the weights, the configuration and the dtype: equal fingerprints compute
            the same function.
        example_sizes: sizes, at least 2, of the named dimensions of the inputs, good for tracing and for
            checking an export.
        native_size: side, in pixels, of the images the model was trained for.
        latent_scale: pixels along a side that one latent stands for. Dimensions called `height` and `width` count
            latents, `image_height` and `image_width` pixels.
        parts: makes the components that together are this one; see `split.in_parts`. None if it cannot be split.
        config: of the network, as the checkpoint has it; written into exported models.
        outline: makes the module on the meta device without reading a weight; if None, `build` is used and moved there.
        check_weights: raises CheckpointError once the weights' files hold others than the fingerprint says. `build`
            calls it; call it again before keeping what was made from a module, whose parameters may be views of files.
        tf32: on a GPU an engine may round its float32 to TF32: it is a float16 model's, in float32 for the range alone.
    """

    name: str
    build: Callable[[], nn.Module]
    dtype: torch.dtype
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fingerprint: str
    example_sizes: Mapping[str, int]
    native_size: int = 512
    latent_scale: int = 8
    parts: Callable[[], tuple[Component, ...]] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    outline: Callable[[], nn.Module] | None = None
    check_weights: Callable[[], None] | None = None
    tf32: bool = False

    def on_meta(self) -> nn.Module:
        """The module on the meta device: shapes and dtypes, no data."""
        return self.build().to("meta") if self.outline is None else self.outline()

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of its parameters."""
        with torch.inference_mode(False):
            return sum(p.nbytes for p in self.on_meta().parameters())


@dataclass(frozen=True)
class Timesteps:
    """The timesteps of a loop over a UNet, known before it begins. Both tensors are static: their values change.

    Attributes:
        values: float32 [N]; those after the last step are 0.
        index: int64 [1], the position in `values` of the next run.
    """

    values: Tensor
    index: Tensor


class Program(Protocol):
    """An engine bound to static tensors. Not thread-safe.

    Attributes:
        capturable: whether `run` can be captured in a CUDA graph.
        nbytes: device memory that it holds besides the engine and the tensors it is bound to.
    """

    capturable: bool
    nbytes: int

    def prepare(self) -> None:
        """Compute what is the same in all runs, from the inputs as they are now; call it whenever those change."""
        ...

    def run(self) -> None:
        """Read the inputs and write the outputs, on the device's current stream."""
        ...


class Engine(Protocol):
    """A component ready to run.

    Attributes:
        entry: the cache folder it was loaded from; None for an engine that is made anew each time.
    """

    entry: Path | None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once. Tensors are named as in the component's specs; safe to call from several threads.

        Raises:
            BackendError: a tensor is missing, unknown or of a shape the component does not have.
        """
        ...

    def bind(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        timesteps: Timesteps | None = None,
    ) -> Program:
        """The engine over static tensors on its device, named and shaped as in the component's specs.

        Args:
            timesteps: of a UNet in a loop: only `sample`, `timestep` and their index change between one
                `prepare` and the next.

        Raises:
            BackendError: as in a call.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds. Running it afterwards is an error, closing it again is not."""
        ...


@runtime_checkable
class Movable(Engine, Protocol):
    """An engine whose weights can be moved to the host and back, while it is not running.

    If a move is interrupted, either can be called next.
    """

    @property
    def offloaded(self) -> bool:
        """Whether the weights no longer take memory of the device."""
        ...

    def offload(self) -> None:
        """Move the weights to the host. CUDA graphs captured over them must not be replayed any more."""
        ...

    def onload(self) -> None:
        """Move the weights back to the device, to new addresses."""
        ...


class CallProgram:
    """A program that calls its engine and copies the results to the bound outputs."""

    nbytes = 0

    def __init__(
        self,
        engine: Engine,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        capturable: bool,
    ) -> None:
        self.capturable = capturable
        self._engine, self._inputs, self._outputs = engine, inputs, outputs

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        with torch.inference_mode():
            for name, value in self._engine(self._inputs).items():
                self._outputs[name].copy_(value)


@dataclass(frozen=True)
class Availability:
    """Whether a back end can run here; if not, why, and what would change that."""

    ok: bool
    reason: str = ""
    remedy: str = ""


class Backend(Protocol):
    """A way to run components. Chosen once, when a pipeline is loaded.

    Attributes:
        upcast: the dtype for a network that overflows in float16: float32, which may be rounded to TF32 there
            (`Component.tf32`), or bfloat16 where that is much faster.
    """

    name: str
    upcast: torch.dtype

    def availability(self, device: torch.device, dtype: torch.dtype) -> Availability:
        """Whether components of `dtype` can run on `device`; imports as little as it can."""
        ...

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
        """Make the component runnable; export or compile it first if the cache has no copy.

        Raises:
            BackendError, ExportError, CacheError
        """
        ...


def check_inputs(component: Component, inputs: Mapping[str, Tensor]) -> None:
    """Check names and shapes of inputs, not their dtypes.

    Raises:
        BackendError: naming the tensor, what it is and what it should be.
    """
    names = [spec.name for spec in component.inputs]
    if set(names) != set(inputs):
        raise BackendError(f"{component.name} takes {', '.join(names)}; got {', '.join(sorted(inputs))}")
    sizes: dict[str, int] = {}
    for spec in component.inputs:
        tensor = inputs[spec.name]
        fits = tensor.dim() == len(spec.dims)
        for dim, size in zip(spec.dims, tensor.shape, strict=False):
            fits = fits and size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
        if not fits:
            wanted = ", ".join(f"{d}={sizes[d]}" if d in sizes else str(d) for d in spec.dims)
            raise BackendError(
                f"{component.name}: {spec.name} has shape {list(tensor.shape)}, should be [{wanted}]"
            )


def ordered_inputs(component: Component, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs in the component's order, cast to its dtypes.

    Raises:
        BackendError: as `check_inputs`.
    """
    check_inputs(component, inputs)
    return [inputs[spec.name].to(spec.dtype) for spec in component.inputs]


def check_bound(component: Component, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Check tensors that are to be bound: an engine gets their addresses once, and nothing casts or copies them.

    Raises:
        BackendError: naming a tensor that is missing, misshapen, of another dtype or not contiguous.
    """
    check_inputs(component, inputs)
    if missing := [spec.name for spec in component.outputs if spec.name not in outputs]:
        raise BackendError(
            f"{component.name} also has the outputs {', '.join(missing)}; bind() needs a tensor for each"
        )
    for tensors, specs in ((inputs, component.inputs), (outputs, component.outputs)):
        for spec in specs:
            x = tensors[spec.name]
            if x.dtype != spec.dtype or not x.is_contiguous():
                is_ = f"{x.dtype}{'' if x.is_contiguous() else ', not contiguous'}"
                raise BackendError(
                    f"{component.name}: {spec.name} is {is_}; bind() needs it as {spec.dtype} and contiguous"
                )


def still_open(component: Component, held: Held | None) -> Held:
    """`held`, which is None once an engine is closed. Keep the result: another thread may close the engine meanwhile.

    Raises:
        BackendError: it was closed.
    """
    if held is None:
        raise BackendError(f"{component.name} was closed; load it again")
    return held


def sizes_of(component: Component, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of the named dimensions, from inputs that fit the component."""
    return {
        name: size
        for spec in component.inputs
        for name, size in zip(spec.dims, inputs[spec.name].shape, strict=True)
        if isinstance(name, str)
    }


def output_shapes(component: Component, inputs: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs by name, for inputs that fit the component."""
    sizes = sizes_of(component, inputs)
    for side in ("height", "width"):
        if side in sizes:
            sizes[f"image_{side}"] = sizes[side] * component.latent_scale
        elif f"image_{side}" in sizes:
            sizes[side] = sizes[f"image_{side}"] // component.latent_scale
    return {spec.name: spec.shape(sizes) for spec in component.outputs}


def example_inputs(component: Component, sizes: Mapping[str, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs for tracing and checking, in the component's order, on the CPU; the same for the same seed.

    Raises:
        BackendError: an integer input has no `values` to draw from.
    """
    drawing: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
    drawn: list[Tensor] = []
    for spec in component.inputs:
        shape = spec.shape(sizes)
        if spec.values is None:
            if not spec.dtype.is_floating_point:
                raise BackendError(f"{component.name}: {spec.name} is {spec.dtype} and states no values")
            drawn.append(torch.randn(shape, dtype=torch.float32, **drawing).to(spec.dtype))
            continue
        low, high = spec.values.low, spec.values.high
        if spec.dtype.is_floating_point:
            tensor = (low + (high - low) * torch.rand(shape, dtype=torch.float32, **drawing)).to(spec.dtype)
        else:
            tensor = torch.randint(int(low), int(high), shape, dtype=spec.dtype, **drawing)
        if spec.values.last is not None:
            tensor[..., -1] = spec.values.last
        drawn.append(tensor)
    return tuple(drawn)
