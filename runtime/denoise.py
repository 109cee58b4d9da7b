"""The loop: latents in, denoised latents out.

It knows nothing of prompts, of which UNet it runs, or of the one that runs before or after it. A step reads and
writes static tensors only, and which step it is, is one of them: so a step can be recorded once (`graph.py`) and
replayed for any prompt, seed, scale, sampler table and number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelArgumentError
from ..kernels.sampler_step import COLUMNS, HISTORY, sampler_step, step_row
from .engines.base import Program, Timesteps
from .engines.lazy import LazyEngine
from .graph import Graph
from .sampler import SamplerTable

__all__ = ["DenoiseState", "Denoiser", "LoopKind", "OnStep", "UNetCall", "denoise"]

UNetCall = Callable[[Tensor, Tensor], Tensor]
"""(sample [R, C, h, w], timestep float32 [R]) -> output [R, C or 2C, h, w], with R = B, or 2B with guidance
(the unconditional half first)."""

OnStep = Callable[[int, float, Tensor], Tensor | None]
"""(step from 0, timestep, a copy of the latents after it) -> latents to go on with instead, or None. The device has
been waited for."""

_CAPACITIES = (64, 256, 1024)  # steps that static tensors have room for


@dataclass(frozen=True)
class LoopKind:
    """What the static tensors of a loop, and so a recording of its step, depend on.

    Attributes:
        shape: of the latents, (B, C, h, w).
        capacity: steps there is room for.
        guided: the UNet runs on negative and positive rows.
        rescale: see `sampler_step`.
        history, noise, variance: what the sampler keeps, draws and is told.
        dtype: of the UNet's sample and prediction.
    """

    shape: tuple[int, int, int, int]
    capacity: int
    guided: bool
    rescale: float
    history: bool
    noise: bool
    variance: bool
    dtype: torch.dtype

    @classmethod
    def of(
        cls, latents: Tensor, table: SamplerTable, guided: bool, rescale: float, dtype: torch.dtype
    ) -> LoopKind:
        """The kind of one run."""
        batch, channels, height, width = latents.shape
        return cls(
            shape=(batch, channels, height, width),
            capacity=next((c for c in _CAPACITIES if len(table) <= c), len(table)),
            guided=guided,
            rescale=rescale if guided else 0.0,
            history=table.uses_history,
            noise=any(table.draws_noise),
            variance=table.predicts_variance,
            dtype=dtype,
        )


class DenoiseState:
    """The static tensors of a loop.

    Attributes:
        latents: float32 [B, C, h, w], the sampler's x.
        sample, timestep: what the UNet gets: [R, C, h, w] in the model's dtype, float32 [R].
        prediction: what it gives: [R, C or 2C, h, w].
        timesteps: of all steps, and the index of the next.
    """

    def __init__(self, kind: LoopKind, device: torch.device) -> None:
        B, C, h, w = kind.shape
        rows = 2 * B if kind.guided else B
        steps = kind.capacity

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.kind = kind
        self.latents = zeros(B, C, h, w)
        self.sample = zeros(rows, C, h, w, dtype=kind.dtype)
        self.timestep = zeros(rows)
        self.prediction = zeros(rows, 2 * C if kind.variance else C, h, w, dtype=kind.dtype)
        self._rows = zeros(steps, COLUMNS)
        self._index = zeros(1, dtype=torch.int64)
        self._scale = zeros(B) if kind.guided else None
        self._history = zeros(HISTORY, B, C, h, w) if kind.history else None
        self._noise = zeros(steps, B, C, h, w) if kind.noise else None
        self.timesteps = Timesteps(zeros(steps), self._index)

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(x.nbytes for x in (*vars(self).values(), self.timesteps.values) if isinstance(x, Tensor))

    def start(
        self,
        latents: Tensor,
        table: SamplerTable,
        *,
        guidance_scale: float | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> None:
        """Take up a run of this kind; arguments are those of `denoise`."""
        if self._noise is not None:
            if noise is None:
                raise KernelArgumentError(
                    f"noise is None; this sampler draws it on {sum(table.draws_noise)} of {len(table)} steps: "
                    "pass what NoiseSource.draw_steps gives"
                )
            self._noise[: len(noise)].copy_(noise)
        if self._scale is not None:
            self._scale.copy_(torch.as_tensor(guidance_scale, dtype=torch.float32).expand_as(self._scale))
        if self._history is not None:
            self._history.zero_()
        rows = table.on(self.latents.device)
        self.latents.copy_(latents)
        self._rows.zero_()
        self._rows[: len(table)].copy_(rows)
        self.timesteps.values.copy_(self._rows[:, 0])
        self._index.zero_()

    def step(self, predict: Callable[[], None]) -> None:
        """Scale the latents, have the prediction written, update latents, history and index."""
        row = step_row(self._rows, self._index)
        scaled = self.latents * row.input_scale
        self.sample.copy_(scaled.repeat(len(self.sample) // len(scaled), 1, 1, 1))
        self.timestep.copy_(row.timestep.expand_as(self.timestep))
        predict()
        sampler_step(
            self.latents,
            self.prediction,
            self._history,
            self._noise,
            self._rows,
            self._index,
            self._scale,
            self.kind.rescale,
        )
        self._index += 1


class _Loop:
    """A UNet bound to a loop's static tensors, and its step recorded where that was asked for."""

    def __init__(self, unet: LazyEngine, kind: LoopKind, constants: Mapping[str, Tensor]) -> None:
        self.engine = unet.load()
        device = unet.device
        self.state = DenoiseState(kind, device)
        self.constants = {name: torch.zeros_like(x, device=device) for name, x in constants.items()}
        inputs = {"sample": self.state.sample, "timestep": self.state.timestep, **self.constants}
        outputs = {unet.component.outputs[0].name: self.state.prediction}
        self.program: Program = self.engine.bind(inputs, outputs, timesteps=self.state.timesteps)
        self.nbytes = self.state.nbytes + self.program.nbytes + sum(x.nbytes for x in self.constants.values())
        self.graph: Graph | None = None
        if unet.graphs is not None and self.program.capturable:
            self.program.prepare()
            self.graph = unet.graphs.capture(self._step, f"a denoising step of {unet.component.name}")

    def _step(self) -> None:
        self.state.step(self.program.run)

    def start(
        self,
        latents: Tensor,
        table: SamplerTable,
        constants: Mapping[str, Tensor],
        guidance_scale: float | Tensor | None,
        noise: Tensor | None,
    ) -> None:
        for name, x in self.constants.items():
            x.copy_(constants[name])
        self.state.start(latents, table, guidance_scale=guidance_scale, noise=noise)
        self.program.prepare()

    def step(self) -> None:
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()


class Denoiser:
    """The denoising loop over one UNet. Loops stay ready for the next request of their kind."""

    def __init__(self, unet: LazyEngine) -> None:
        self._unet = unet

    def __call__(
        self,
        latents: Tensor,
        table: SamplerTable,
        constants: Mapping[str, Tensor],
        *,
        guidance_scale: float | Tensor | None = None,
        guidance_rescale: float = 0.0,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
        should_stop: Callable[[], bool] | None = None,
        progress: Callable[[], None] | None = None,
    ) -> Tensor:
        """Take every step of the table.

        Args:
            constants: the UNet's inputs that are the same in every step, by name.
            progress: called after each step, which the device may not have done yet.

        The other arguments, and what is returned, are as for `denoise`.
        """
        unet = self._unet
        dtype = unet.component.dtype
        _require_channels(unet.component.outputs[0].dims[1], latents, table)
        kind = LoopKind.of(latents, table, guidance_scale is not None, guidance_rescale, dtype)
        with unet.graphs.turn() if unet.graphs else nullcontext(), self._loop(kind, constants) as loop:
            loop.start(latents, table, constants, guidance_scale, noise)
            _walk(loop.state, loop.step, table, on_step, should_stop, progress)
            return loop.state.latents.clone()

    @contextmanager
    def _loop(self, kind: LoopKind, constants: Mapping[str, Tensor]) -> Iterator[_Loop]:
        """A loop of this kind that nobody else has."""
        key = (
            kind,
            next(iter(constants.values())).shape[1] if constants else 0,
        )  # tokens vary with the model
        engine = self._unet.load()
        loop: _Loop | None = self._unet.kept.take(self._unet, key)
        if loop is None or loop.engine is not engine:  # loaded anew, or moved to another device
            with torch.inference_mode(False):  # a caller's own would mark the static tensors
                loop = _Loop(self._unet, kind, constants)
        try:
            yield loop
        except BaseException:  # it is dropped, once what it has put on the device is done
            if loop.state.latents.is_cuda:
                torch.cuda.current_stream(loop.state.latents.device).synchronize()
            raise
        self._unet.kept.put(self._unet, key, loop, loop.nbytes)


def denoise(
    unet: UNetCall,
    latents: Tensor,
    table: SamplerTable,
    *,
    guidance_scale: float | Tensor | None = None,
    guidance_rescale: float = 0.0,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Take every step of the table with any function for a UNet.

    Args:
        unet: the model; it is called once for each step, and must not keep its arguments.
        latents: [B, C, h, w] at the noise level of the table's first step; left as they are.
        guidance_scale: a number or float32 [B]; None runs the model without its unconditional half.
        guidance_rescale: see `sampler_step`.
        noise: from `NoiseSource.draw_steps`, on the latents' device.
        dtype: of the sample given to the model. The latents stay float32.
        on_step: called after each step.
        should_stop: asked before each step; true ends the loop with the latents as they are.

    Returns:
        float32 [B, C, h, w].

    Raises:
        KernelArgumentError: shapes that do not belong together.
    """
    kind = LoopKind.of(latents, table, guidance_scale is not None, guidance_rescale, dtype)
    state = DenoiseState(kind, latents.device)
    state.start(latents, table, guidance_scale=guidance_scale, noise=noise)

    def predict() -> None:
        out = unet(state.sample, state.timestep)
        _require_channels(out.shape[1], latents, table)
        state.prediction.copy_(out)

    _walk(state, lambda: state.step(predict), table, on_step, should_stop)
    return state.latents


def _walk(
    state: DenoiseState,
    step: Callable[[], None],
    table: SamplerTable,
    on_step: OnStep | None,
    should_stop: Callable[[], bool] | None,
    progress: Callable[[], None] | None = None,
) -> None:
    """Call `step` for every row of the table, at most two steps ahead of the device."""
    queued: list[torch.cuda.Event] = []
    for index, timestep in enumerate(table.timesteps):
        if len(queued) > 1:
            queued.pop(0).synchronize()
        if should_stop is not None and should_stop():
            break
        step()
        if state.latents.is_cuda:
            queued.append(torch.cuda.current_stream(state.latents.device).record_event())
        if progress is not None:
            progress()
        if on_step is not None:
            copy = state.latents.clone()
            if copy.is_cuda:
                torch.cuda.current_stream(copy.device).synchronize()
            replaced = on_step(index, timestep, copy)
            if replaced is not None:
                state.latents.copy_(replaced)


def _require_channels(channels: int | str, latents: Tensor, table: SamplerTable) -> None:
    needed = latents.shape[1] * (2 if table.predicts_variance else 1)
    if channels != needed:
        raise KernelArgumentError(
            f"the UNet returned {channels} channels where the sampler needs {needed}: "
            "variance_type of the scheduler and out_channels of the UNet do not belong together"
        )
