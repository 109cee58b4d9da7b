"""Denoising loops bound to UNets and kept, with their captured graphs, for the next request of their kind.

The loops of a call are given everything but their latents before the first of them runs (`all_ready`), so that a base's
last step and a refiner's first follow each other on the device with no work of the host between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from .denoise import DenoiseState, LoopKind, LoopRequest, StepHooks, require_channels, run_steps
from .engines.lazy import LazyEngine
from .graph import Graph

__all__ = ["Denoiser", "Run", "all_ready"]

Run = Callable[[Tensor, StepHooks], Tensor]
"""Takes every step of the request's table. (latents [B, C, h, w] at the noise level of the first step, which are left
as they are, hooks) -> float32 [B, C, h, w], which the device may not have computed yet."""


class _BoundLoop:
    """A UNet bound to a loop's static tensors, and the captured graph of its step if graphs are on."""

    def __init__(self, unet: LazyEngine, kind: LoopKind, constants: Mapping[str, Tensor]) -> None:
        self.engine = unet.load()
        device = unet.device
        self.state = DenoiseState(kind, device)
        # Contiguous, whatever the strides of the caller are: engines are bound to such tensors only.
        self.constants = {
            name: torch.zeros(x.shape, dtype=x.dtype, device=device) for name, x in constants.items()
        }
        self.program = self.state.bind(self.engine, unet.component, self.constants)
        self.nbytes = self.state.nbytes + self.program.nbytes + sum(x.nbytes for x in self.constants.values())
        self.graph: Graph | None = None
        if unet.graphs is not None and self.program.capturable:
            self.program.prepare()
            self.graph = unet.graphs.capture(self._step, f"a denoising step of {unet.component.name}")

    def _step(self) -> None:
        self.state.step(self.program.run)

    def start(self, request: LoopRequest) -> None:
        for name, x in self.constants.items():
            x.copy_(request.constants[name])
        self.state.start(request)
        self.program.prepare()

    def step(self) -> None:
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()


class Denoiser:
    """The denoising loop over one UNet. Loops are kept for the next request of their kind."""

    def __init__(self, unet: LazyEngine, width: int = 1) -> None:
        """`width`: channels of the UNet at full resolution, to compare the memory of several UNets' loops."""
        self._unet = unet
        self._width = width

    def size(self, request: LoopRequest) -> int:
        """How much memory a step takes, in proportion: a UNet's largest tensors are those of its full resolution."""
        B, _, h, w = request.shape
        rows = B if request.guidance_scale is None else 2 * B
        return rows * h * w * self._width * self._unet.component.dtype.itemsize

    @contextmanager
    def ready(self, request: LoopRequest) -> Iterator[Run]:
        """A loop for this request, prepared and exclusively held; its `Run` is to be called once.

        Raises:
            KernelArgumentError: the UNet's output is not what the sampler reads, or `noise` is missing.
        """
        unet = self._unet
        dtype = unet.component.dtype
        require_channels(unet.component.outputs[0].dims[1], request.shape[1], request.table)
        kind = LoopKind.of(request.shape, request.table, request.guidance_scale is not None, dtype)
        key = kind, tuple((name, tuple(x.shape)) for name, x in request.constants.items())

        def make() -> _BoundLoop:
            with unet.exclusive():
                return _BoundLoop(unet, kind, request.constants)

        with unet.loop() as engine, unet.kept(key, engine, make) as loop:
            with unet.exclusive():
                loop.start(request)

            def run(latents: Tensor, hooks: StepHooks) -> Tensor:
                static = loop.state.latents
                with unet.exclusive():
                    static.copy_(latents)
                    run_steps(static, loop.step, request.table, hooks)
                    return static.clone()

            yield run

    def run(self, request: LoopRequest, latents: Tensor, hooks: StepHooks) -> Tensor:
        """Make a loop ready, run it and release it; as `Run`."""
        with self.ready(request) as run:
            return run(latents, hooks)


@contextmanager
def all_ready(
    requests: Sequence[tuple[Denoiser, LoopRequest]], *, together: bool = True
) -> Iterator[list[Run]]:
    """Several loops, all ready before the first runs.

    The largest is made, and so captured, first: the others then fit into its part of the graphs' shared memory.

    Args:
        together: if False, each is made ready when its `Run` is called and released after it: for UNets that are not
            on the device at the same time.
    """
    if not together:
        yield [partial(denoiser.run, request) for denoiser, request in requests]
        return
    order = sorted(range(len(requests)), key=lambda k: -requests[k][0].size(requests[k][1]))
    with ExitStack() as held:
        runs = {k: held.enter_context(requests[k][0].ready(requests[k][1])) for k in order}
        yield [runs[k] for k in range(len(requests))]
