"""The loop: latents in, denoised latents out.

It knows nothing of prompts, of which UNet it runs, or of the loop before or after it. A step reads and writes static
tensors only, its own index among them, so it can be captured once (`graph.py`) and replayed for any prompt, seed,
scale, sampler table and number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import KernelArgumentError
from ..kernels.sampler_step import COLUMNS, HISTORY, sampler_step, step_row
from .engines.base import Component, Engine, Program, Timesteps
from .sampler import SamplerTable

__all__ = [
    "DenoiseState",
    "LoopKind",
    "LoopRequest",
    "StepHooks",
    "require_channels",
    "run_steps",
]

_CAPACITIES = (64, 256, 1024)  # steps that static tensors have room for


class StepHooks(Protocol):
    """What the host does before and after each step."""

    def before_step(self) -> bool:
        """Wait while the device is too far behind. False ends the loop with the latents as they are."""
        ...

    def after_step(self, timestep: float, latents: Tensor) -> None:
        """A step at this timestep has been submitted.

        Args:
            latents: float32 [B, C, h, w], as the step leaves them; the next step goes on from what is written to them.
        """
        ...


@dataclass(frozen=True)
class LoopKind:
    """What the static tensors of a loop, and so the captured graph of its step, depend on.

    Attributes:
        shape: of the latents, (B, C, h, w).
        capacity: steps there is room for.
        cfg: the UNet runs on negative and positive rows (classifier-free guidance).
        history, noise, variance: whether the sampler keeps earlier outputs, draws noise, reads a predicted variance.
        dtype: of the UNet's sample and prediction.
    """

    shape: tuple[int, int, int, int]
    capacity: int
    cfg: bool
    history: bool
    noise: bool
    variance: bool
    dtype: torch.dtype

    @classmethod
    def of(
        cls, shape: tuple[int, int, int, int], table: SamplerTable, cfg: bool, dtype: torch.dtype
    ) -> LoopKind:
        """The kind of one run over latents of this shape."""
        return cls(
            shape=shape,
            capacity=next((c for c in _CAPACITIES if len(table) <= c), len(table)),
            cfg=cfg,
            history=table.uses_history,
            noise=any(table.draws_noise),
            variance=table.predicts_variance,
            dtype=dtype,
        )


@dataclass(frozen=True)
class LoopRequest:
    """What a loop is to run, except for the latents it starts from.

    Attributes:
        shape: of the latents, (B, C, h, w).
        table: every step of it is taken.
        constants: the UNet's inputs that are the same in every step, by name.
        guidance_scale: a number or float32 [B]; None runs the UNet without its unconditional half.
        guidance_rescale: see `sampler_step`.
        noise: from `NoiseSource.draw_steps`, on any device; None where the sampler draws none.
    """

    shape: tuple[int, int, int, int]
    table: SamplerTable
    constants: Mapping[str, Tensor]
    guidance_scale: float | Tensor | None = None
    guidance_rescale: float = 0.0
    noise: Tensor | None = None


class DenoiseState:
    """The static tensors of a loop.

    Attributes:
        latents: float32 [B, C, h, w], the sampler's x.
        sample, timestep: inputs of the UNet, [R, C, h, w] in the model's dtype, float32 [R].
        prediction: its output, [R, C or 2C, h, w].
        timesteps: those of all steps, and the index of the next step.
    """

    def __init__(self, kind: LoopKind, device: torch.device) -> None:
        B, C, h, w = kind.shape
        R = 2 * B if kind.cfg else B
        steps = kind.capacity

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.kind = kind
        self.latents = zeros(B, C, h, w)
        self.sample = zeros(R, C, h, w, dtype=kind.dtype)
        self.timestep = zeros(R)
        self.prediction = zeros(R, 2 * C if kind.variance else C, h, w, dtype=kind.dtype)
        self._table = zeros(steps, COLUMNS)
        self._index = zeros(1, dtype=torch.int64)
        self._scale = zeros(B) if kind.cfg else None
        self._rescale = zeros(B) if kind.cfg else None
        self._history = zeros(HISTORY, B, C, h, w) if kind.history else None
        self._noise = zeros(steps, B, C, h, w) if kind.noise else None
        self.timesteps = Timesteps(zeros(steps), self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of all static tensors."""
        return sum(x.nbytes for x in (*vars(self).values(), self.timesteps.values) if isinstance(x, Tensor))

    def bind(self, engine: Engine, component: Component, constants: Mapping[str, Tensor]) -> Program:
        """A UNet's engine over these tensors and the inputs that are the same in every step."""
        inputs = {"sample": self.sample, "timestep": self.timestep, **constants}
        return engine.bind(inputs, {component.outputs[0].name: self.prediction}, timesteps=self.timesteps)

    def start(self, request: LoopRequest) -> None:
        """Take up a run of this kind but for its latents and the UNet's constants.

        Raises:
            KernelArgumentError: the sampler draws noise, and there is none.
        """
        table, noise = request.table, request.noise
        if self._noise is not None:
            if noise is None:
                raise KernelArgumentError(
                    f"noise is None; this sampler draws it on {sum(table.draws_noise)} of {len(table)} steps: "
                    "pass what NoiseSource.draw_steps gives"
                )
            self._noise[: len(noise)].copy_(noise)
        if self._scale is not None:
            scale = torch.as_tensor(request.guidance_scale, dtype=torch.float32, device=self._scale.device)
            self._scale.copy_(scale.expand_as(self._scale))
        if self._rescale is not None:
            self._rescale.fill_(request.guidance_rescale)
        if self._history is not None:
            self._history.zero_()
        self._table.zero_()
        self._table[: len(table)].copy_(table.on(self.latents.device))
        self.timesteps.values.copy_(self._table[:, 0])
        self._index.zero_()

    def step(self, predict: Callable[[], None]) -> None:
        """Scale the latents, have the prediction written, update latents, history and index."""
        row = step_row(self._table, self._index)
        scaled = self.latents * row.input_scale
        self.sample.copy_(scaled.repeat(len(self.sample) // len(scaled), 1, 1, 1))
        self.timestep.copy_(row.timestep.expand_as(self.timestep))
        predict()
        sampler_step(
            self.latents,
            self.prediction,
            self._history,
            self._noise,
            self._table,
            self._index,
            self._scale,
            self._rescale,
        )
        self._index += 1


def run_steps(latents: Tensor, step: Callable[[], None], table: SamplerTable, hooks: StepHooks) -> None:
    """Call `step`, which updates the latents, for every row of the table."""
    for timestep in table.timesteps:
        if not hooks.before_step():
            break
        step()
        hooks.after_step(timestep, latents)


def require_channels(channels: int | str, latent_channels: int, table: SamplerTable) -> None:
    """Refuse a UNet whose output is not what the sampler reads.

    Raises:
        KernelArgumentError: it has other channels.
    """
    needed = latent_channels * (2 if table.predicts_variance else 1)
    if channels != needed:
        raise KernelArgumentError(
            f"the UNet returned {channels} channels where the sampler needs {needed}: the scheduler's variance_type "
            "does not match the UNet's out_channels"
        )
