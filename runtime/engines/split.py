"""A UNet as three engines: run once for a prompt, once for all timesteps of a loop, and once in every step.

This saves each step many small matmuls: SDXL's 140 projections of the text and 17 of the time are under 1 % of its
arithmetic, but a fifth of its matmuls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.unet import UNet, UNetConfig
from ..models.unet_parts import PARTS
from .base import (
    STEPS_AT_ONCE,
    CallProgram,
    Component,
    Engine,
    Program,
    TensorSpec,
    Timesteps,
    check_inputs,
    sizes_of,
)

__all__ = ["SplitUNet", "in_parts", "unet_parts"]

_ALIGNMENT = 256  # bytes, as CUDA's own allocations have it


def in_parts(component: Component) -> tuple[Component, ...]:
    """The parts of a component in the order they run; the component itself if it has none."""
    return (component,) if component.parts is None else component.parts()


def unet_parts(
    component: Component, config: UNetConfig, build: Callable[[str], nn.Module]
) -> tuple[Component, ...]:
    """A UNet's component as three: `unet.prompt`, `unet.time` and `unet.step`.

    Outputs of one are inputs of the next, by name.

    Args:
        component: the whole UNet.
        build: makes the module of that name in `models.unet_parts.PARTS`, with its weights in the component's dtype.
    """
    given = {spec.name: spec for spec in component.inputs}
    with torch.device("meta"):
        unet = UNet(config)
    text = given["encoder_hidden_states"].dims[:-1]

    def made(name: str, *dims: int | str) -> TensorSpec:
        return TensorSpec(name, dims, component.dtype)

    texts = [
        made(f"{what}_{k}", *text, block.attn2.to_k.out_features)
        for k, block in enumerate(unet.transformers())
        for what in ("keys", "values")
    ]
    shifts = [
        made(f"shift_{k}", "batch", block.time_emb_proj.out_features)
        for k, block in enumerate(unet.resnets())
        if block.time_emb_proj is not None
    ]
    sizes = [made("size_embedding", "batch", config.time_embedding_dim)] if unet.add_embedding else []

    def named(*names: str) -> list[TensorSpec]:
        return [given[name] for name in names if name in given]

    interfaces = {
        "prompt": (named("encoder_hidden_states", "text_embeds", "time_ids"), sizes + texts),
        "time": (named("timestep", "timestep_cond") + sizes, shifts),
        "step": (named("sample") + shifts + texts, list(component.outputs)),
    }
    return tuple(_part(component, name, *interfaces[name], build) for name in PARTS)


def _part(
    component: Component,
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    build: Callable[[str], nn.Module],
) -> Component:
    dims = {d for spec in inputs for d in spec.dims}
    return replace(
        component,
        name=f"{component.name}.{name}",
        build=lambda: build(name),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        fingerprint=hashlib.sha256(f"{component.fingerprint}\n{name}".encode()).hexdigest(),
        example_sizes={d: size for d, size in component.example_sizes.items() if d in dims},
        parts=None,
        outline=None,
    )


class SplitUNet:
    """A UNet's engine that runs the engines of its parts, which may be of any back end."""

    def __init__(self, component: Component, engines: Sequence[Engine]) -> None:
        """`engines`: of `in_parts(component)`, in that order."""
        self.parts = tuple(zip(in_parts(component), engines, strict=True))
        self.entry: Path | None = engines[-1].entry
        self._component = component

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_inputs(self._component, inputs)
        values = dict(inputs)
        for part, engine in self.parts:
            values |= engine({spec.name: values[spec.name] for spec in part.inputs})
        return {spec.name: values[spec.name] for spec in self._component.outputs}

    def bind(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        *,
        timesteps: Timesteps | None = None,
    ) -> Program:
        check_inputs(self._component, inputs)
        if timesteps is None:
            return CallProgram(self, inputs, outputs, capturable=False)
        return _SplitProgram(self.parts, inputs, outputs, timesteps)

    def close(self) -> None:
        for _, engine in self.parts:
            engine.close()


class _SplitProgram:
    """The engines of the parts over static tensors, through which they pass their results on."""

    def __init__(
        self,
        parts: Sequence[tuple[Component, Engine]],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        timesteps: Timesteps,
    ) -> None:
        (prompt, prompt_engine), (time, time_engine), (step, step_engine) = parts
        sample = inputs["sample"]
        rows, steps = len(sample), min(len(timesteps.values), STEPS_AT_ONCE)
        self._timesteps, self._steps, self._rows = timesteps, steps, rows
        self._values = dict(inputs)
        made = _zeros(prompt.outputs, sizes_of(prompt, inputs), sample)
        self._values |= made
        self._prompt = prompt_engine.bind({spec.name: inputs[spec.name] for spec in prompt.inputs}, made)

        several = {"batch": steps * rows}
        self._of_time = _zeros(time.inputs, several, sample)
        self._shifts = _zeros(time.outputs, several, sample)
        self._time = time_engine.bind(self._of_time, self._shifts)

        # The shifts of one step are one row of a table; each is an aligned slice of it.
        unit = _ALIGNMENT // sample.element_size()
        self._places: dict[str, slice] = {}
        end = 0
        for spec in time.outputs:
            begin, end = end, end + self._shifts[spec.name].numel() // steps
            self._places[spec.name] = slice(begin, end)
            end = -(-end // unit) * unit
        runs = -(-len(timesteps.values) // steps)
        self._table = sample.new_zeros(runs * steps, end)
        self._row = sample.new_zeros(1, end)
        now = {name: self._row[0, place].view(rows, -1) for name, place in self._places.items()}
        self._step = step_engine.bind({s.name: (self._values | now)[s.name] for s in step.inputs}, outputs)
        self.capturable = self._step.capturable
        own = (*made.values(), *self._of_time.values(), *self._shifts.values(), self._table, self._row)
        self.nbytes = sum(x.nbytes for x in own)

    @torch.inference_mode()
    def prepare(self) -> None:
        self._prompt.run()
        for name, x in self._of_time.items():
            if name != "timestep":  # the same for every step
                x.view(self._steps, *self._values[name].shape).copy_(self._values[name])
        asked = self._of_time["timestep"].view(self._steps, self._rows)
        for begin in range(0, len(self._table), self._steps):
            values = self._timesteps.values[begin : begin + self._steps]
            asked[: len(values)].copy_(values[:, None])
            self._time.run()
            for name, place in self._places.items():
                shift = self._shifts[name].view(self._steps, -1)
                self._table[begin : begin + self._steps, place].copy_(shift)

    @torch.inference_mode()
    def run(self) -> None:
        torch.index_select(self._table, 0, self._timesteps.index, out=self._row)
        self._step.run()


def _zeros(specs: Sequence[TensorSpec], sizes: Mapping[str, int], like: Tensor) -> dict[str, Tensor]:
    return {spec.name: torch.zeros(spec.shape(sizes), dtype=spec.dtype, device=like.device) for spec in specs}
