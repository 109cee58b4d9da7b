"""What a service is asked for, an image at a time, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import PIL.Image

__all__ = ["CheckedRequest", "Finished", "Group", "ImageRequest", "ImageResult", "Progress"]


@dataclass(frozen=True)
class ImageRequest:
    """One image. Names and meanings are those of `Pipeline.__call__`; None is its default.

    Attributes:
        width, height: in pixels.
        steps: of the whole schedule, base and refiner together.
        seed: None for a random one, which the result has.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int = 30
    guidance_scale: float | None = None
    seed: int | None = None
    sampler: str | None = None
    high_noise_frac: float = 0.8


class Group(NamedTuple):
    """What requests have in common that are made in one call."""

    height: int
    width: int
    steps: int
    guided: bool
    sampler: str | None
    high_noise_frac: float
    negative: bool
    """Whether there is a negative prompt: without any, SDXL's base gets zeros in its place."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.height, self.width

    @property
    def cost(self) -> float:
        """Work of one image, in pixels of a UNet call; to compare with other groups'."""
        return float(self.height * self.width * self.steps * (2 if self.guided else 1))


@dataclass(frozen=True)
class CheckedRequest:
    """A request that can be made: `steps` are those its sampler takes, its seed is drawn, and `previews` are wanted."""

    prompt: str
    negative_prompt: str | None
    guidance_scale: float
    seed: int
    steps: int
    group: Group
    previews: bool = False


@dataclass(frozen=True)
class ImageResult:
    """An image.

    Attributes:
        parameters: what made it, as for `image.save_png`.
        timings: seconds of each stage of the batch it was made in, their `total`, and `queue`, the wait before it.
        batch: images made in that call.
        peak_memory: bytes: PyTorch's largest reservation on a GPU, the process's largest resident set elsewhere,
            0 where it is unknown (not Linux).
    """

    image: PIL.Image.Image
    parameters: Mapping[str, Any]
    timings: Mapping[str, float]
    batch: int
    peak_memory: int


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` is done. `preview` is a small picture of the latents, where previews were asked for."""

    step: int
    steps: int
    preview: PIL.Image.Image | None = None


@dataclass(frozen=True)
class Finished:
    """The last event."""

    result: ImageResult
