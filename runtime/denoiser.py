"""Denoising loops over UNets that stay ready, recorded where that was asked for, for the next request of their kind.

The loops of a call take up everything but their latents before the first of them begins (`ready`): so a base's last
step and a refiner's first follow each other on the device, with nothing between that the host has to bring or wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .denoise import DenoiseState, LoopKind, StepHooks, require_channels, run_steps
from .engines.base import Program
from .engines.lazy import LazyEngine
from .graph import Graph
from .sampler import SamplerTable
from .streams import queue_of

__all__ = ["Denoiser", "LoopRequest", "Run", "ready"]


@dataclass(frozen=True)
class LoopRequest:
    """What a loop is asked for, all but the latents it begins with.

    Attributes:
        shape: of the latents, (B, C, h, w).
        table: of whose steps it takes every one.
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


class _Loop:
    """A UNet bound to a loop's static tensors, and its step recorded where that was asked for."""

    def __init__(self, unet: LazyEngine, kind: LoopKind, constants: Mapping[str, Tensor]) -> None:
        self.engine = unet.load()
        device = unet.device
        self.state = DenoiseState(kind, device)
        # In the order that engines can be bound to, whatever the caller's.
        self.constants = {
            name: torch.zeros(x.shape, dtype=x.dtype, device=device) for name, x in constants.items()
        }
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

    def start(self, asked: LoopRequest) -> None:
        for name, x in self.constants.items():
            x.copy_(asked.constants[name])
        self.state.start(
            asked.table,
            guidance_scale=asked.guidance_scale,
            guidance_rescale=asked.guidance_rescale,
            noise=asked.noise,
        )
        self.program.prepare()

    def step(self) -> None:
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()


class Run:
    """A loop that has taken up a request, to be run once."""

    def __init__(
        self, loop: _Loop, table: SamplerTable, exclusive: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._loop, self._table, self._exclusive = loop, table, exclusive

    def __call__(self, latents: Tensor, hooks: StepHooks) -> Tensor:
        """Take every step of the table.

        Args:
            latents: [B, C, h, w] at the noise level of the first step; left as they are.

        Returns:
            float32 [B, C, h, w], which the device may not have computed yet.
        """
        static = self._loop.state.latents
        with self._exclusive():
            static.copy_(latents)
            run_steps(static, self._loop.step, self._table, hooks)
            return static.clone()


class Denoiser:
    """The denoising loop over one UNet. Loops stay ready for the next request of their kind."""

    def __init__(self, unet: LazyEngine, width: int = 1) -> None:
        """`width`: channels of the UNet at its full resolution, by which loops of several are compared in size."""
        self._unet = unet
        self._width = width

    def size(self, asked: LoopRequest) -> int:
        """How much memory a step takes, in proportion: a UNet's largest tensors are those of its full resolution."""
        B, _, h, w = asked.shape
        rows = B if asked.guidance_scale is None else 2 * B
        return rows * h * w * self._width * self._unet.component.dtype.itemsize

    @contextmanager
    def ready(self, asked: LoopRequest) -> Iterator[Run]:
        """A loop of the kind, which nobody else has meanwhile, with the request taken up."""
        unet = self._unet
        dtype = unet.component.dtype
        require_channels(unet.component.outputs[0].dims[1], asked.shape[1], asked.table)
        kind = LoopKind.of(asked.shape, asked.table, asked.guidance_scale is not None, dtype)
        # The only size of the constants that a kind does not have: the text's length, which varies with the model.
        first = next(iter(asked.constants.values()), None)
        key = kind, 0 if first is None else first.shape[1]
        with unet.loop() as engine:
            # Not if it was loaded anew, or moved to another device.
            loop: _Loop | None = unet.graph_cache.take(unet.token, key, lambda loop: loop.engine is engine)
            try:
                with unet.exclusive():
                    if loop is None:
                        with torch.inference_mode(False):  # a caller's own would mark the static tensors
                            loop = _Loop(unet, kind, asked.constants)
                    loop.start(asked)
                yield Run(loop, asked.table, unet.exclusive)
            except BaseException:  # it is dropped, once what it has put on the device is done
                queue_of(unet.device).record().synchronize()
                raise
            unet.graph_cache.put(unet.token, key, loop, loop.nbytes, queue_of(unet.device).record())


@contextmanager
def ready(
    asked: Sequence[tuple[Denoiser, LoopRequest]], *, together: bool = True
) -> Iterator[list[Callable[[Tensor, StepHooks], Tensor]]]:
    """Runs of several loops, all made ready before the first begins; called as a `Run`.

    The largest is made, and so recorded, first: the others then find room in its part of the graphs' shared memory.

    Args:
        together: else each is made ready when it is called, and its loop set free when it has run: for UNets that are
            not on the device at the same time.
    """
    if not together:
        yield [partial(_run_alone, loop, request) for loop, request in asked]
        return
    order = sorted(range(len(asked)), key=lambda k: -asked[k][0].size(asked[k][1]))
    with ExitStack() as held:
        runs = {k: held.enter_context(asked[k][0].ready(asked[k][1])) for k in order}
        yield [runs[k] for k in range(len(asked))]


def _run_alone(loop: Denoiser, asked: LoopRequest, latents: Tensor, hooks: StepHooks) -> Tensor:
    with loop.ready(asked) as run:
        return run(latents, hooks)
