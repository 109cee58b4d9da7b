"""Previews: small RGB images of latents, one pixel per latent, to show while an image is made.

The VAE is nearly local, and colour nearly linear in its latents, so a matrix [C + 1, 3] approximates it. It is fitted
by least squares to the VAE itself, on blocks of random colour; no table of any one model's factors is needed.

Nothing waits for a preview: the loop leaves a copy of its latents, from which a side stream makes the preview and
copies it to the host, where it is found a step or two later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .streams import CurrentStream, Event
from .vae import VAE

__all__ = ["Previewer", "StepReports"]

_BLOCK = 8
_COLOURS = 32
_SLOTS = 4  # the device is up to two steps behind, one more is being submitted, and one may be late


@dataclass(frozen=True)
class Previewer:
    """Latents to previews.

    Attributes:
        weights: [C + 1, 3] on the device, the last row a constant.
    """

    weights: Tensor

    @classmethod
    @torch.no_grad()
    def fit(
        cls, vae: VAE, height: int, width: int, device: torch.device, *, tile: int | None = None
    ) -> Previewer:
        """Decode random images of `height` x `width` pixels, a single one if that is large, and fit to them.

        Args:
            tile: as for `VAE.decode`.
        """
        h, w = height // vae.scale, width // vae.scale
        down, across = -(-h // _BLOCK), -(-w // _BLOCK)
        shape = (-(-_COLOURS // (down * across)), vae.channels, down, across)
        generator = torch.Generator().manual_seed(0)
        blocks = 0.7 * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        latents = F.interpolate(blocks, scale_factor=_BLOCK)[..., :h, :w]
        pixels = F.avg_pool2d(vae.decode(latents.to(device), tile=tile).cpu(), vae.scale)
        rows = latents.movedim(1, 3).flatten(0, 2).double()
        wanted = pixels.movedim(1, 3).flatten(0, 2).double()
        weights = torch.linalg.lstsq(_with_one(rows), wanted).solution
        return cls(weights.to(device, torch.float32))

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] of any noise level -> RGB, uint8 [B, h, w, 3] on the same device.

        The sampler's x grows with its noise; brought to unit variance it looks the same with every sampler.
        """
        deviation = latents.float().flatten(1).std(dim=1).clamp(min=1.0)
        rows = (latents.float() / deviation.view(-1, 1, 1, 1)).movedim(1, 3)
        # Not a matmul: cuBLAS would keep 32 MiB for the stream beside the loop's.
        rgb = (_with_one(rows)[..., None] * self.weights).sum(dim=-2)
        return (rgb.clamp(0, 1).nan_to_num() * 255).round().to(torch.uint8)


class _Slot:
    """Buffers for one step's latents, and for their preview on the host."""

    def __init__(self, latents: Tensor) -> None:
        B, _, h, w = latents.shape
        self.latents = torch.empty_like(latents)
        self.pixels = torch.empty(B, h, w, 3, dtype=torch.uint8, device="cpu", pin_memory=latents.is_cuda)


class StepReports:
    """Reports each step once the device has done it, with a preview if there is a previewer.

    If every slot is still under way, a step is reported without a preview, rather than waited for.
    """

    def __init__(
        self,
        stream: CurrentStream,
        previewer: Previewer | None,
        report: Callable[[int, Tensor | None], object],
    ) -> None:
        """`report`: called with the number of steps done, and a preview of the last, uint8 [B, h, w, 3] on the CPU."""
        self._stream = stream
        self._previewer = previewer
        self._report = report
        self._steps = 0
        self._free: list[_Slot] = []
        self._made = 0
        self._under_way: deque[tuple[int, Event, _Slot | None]] = deque()

    def take(self, latents: Tensor) -> None:
        """A step has been submitted, which leaves these latents."""
        self._steps += 1
        if self._previewer is None or (slot := self._acquire(latents)) is None:
            self._under_way.append((self._steps, self._stream.record_event(), None))
            return
        slot.latents.copy_(latents)  # the loop's own are overwritten by the next step
        drawn = self._stream.on_side_stream(partial(_draw, self._previewer, slot))
        self._under_way.append((self._steps, drawn, slot))

    def deliver(self) -> None:
        """Report the steps that are done by now, in order."""
        while self._under_way and self._under_way[0][1].query():
            steps, _, slot = self._under_way.popleft()
            preview = None
            if slot is not None:
                preview = slot.pixels.clone()
                self._free.append(slot)
            self._report(steps, preview)

    def begin_again(self) -> None:
        """Forget the steps so far."""
        for _, event, slot in self._under_way:
            event.synchronize()
            if slot is not None:
                self._free.append(slot)
        self._under_way.clear()
        self._steps = 0

    def finish(self) -> None:
        """Wait for the remaining steps, and report them."""
        while self._under_way:
            self._under_way[0][1].synchronize()
            self.deliver()

    def _acquire(self, latents: Tensor) -> _Slot | None:
        if self._free:
            return self._free.pop()
        if self._made == _SLOTS:
            return None
        self._made += 1
        return _Slot(latents)


def _draw(previewer: Previewer, slot: _Slot) -> None:
    slot.pixels.copy_(previewer(slot.latents), non_blocking=True)


def _with_one(x: Tensor) -> Tensor:
    """[..., C] -> [..., C + 1]"""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
