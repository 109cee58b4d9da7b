"""The sizes an engine is built for: a short text becomes optimisation profiles, a call finds its own.

    1024x1024                 one size, width by height in pixels
    768..1024x1152            a range of widths, one height
    512..1280 step 64         both sides, in steps of 64 pixels
    1..4                      images in a batch

Policies are in pixels and images, as users think; profiles are in what a component's inputs have: latents and
rows, of which guidance makes two for an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ...errors import BackendError, EngineSizeError, RequestError
from .base import STEPS_AT_ONCE, Component, TensorSpec

__all__ = ["Axis", "Profile", "SizePolicy", "profile_index", "profiles_for"]

_AXIS = r"(\d+)(?:\.\.(\d+))?"
_SIZE = re.compile(rf"{_AXIS}(?:x{_AXIS})?(?:\s+step\s+(\d+))?")
_BATCH = re.compile(_AXIS)
_DIGITS = 5  # of a side or a batch; what is beyond has no engine, and may not fit into TensorRT's own numbers

# Which side of an image a named dimension is, and whether it counts latents.
_SIDES = {
    "height": ("height", True),
    "width": ("width", True),
    "image_height": ("height", False),
    "image_width": ("width", False),
}


@dataclass(frozen=True)
class Axis:
    """The values one dimension may have: `low`, `low + step` ... `high`; tuned for `best`."""

    low: int
    best: int
    high: int
    step: int = 1

    def __contains__(self, value: int) -> bool:
        return self.low <= value <= self.high and (value - self.low) % self.step == 0

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        return f"{self.low}..{self.high}" + (f" step {self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: what every named dimension of a component's inputs may be."""

    axes: Mapping[str, Axis]

    def takes(self, sizes: Mapping[str, int]) -> bool:
        return all(sizes[name] in axis for name, axis in self.axes.items())

    def shapes(self, spec: TensorSpec) -> list[list[int]]:
        """Smallest, best and largest shape of an input."""
        return [
            list(spec.shape({name: getattr(axis, which) for name, axis in self.axes.items()}))
            for which in ("low", "best", "high")
        ]

    def __str__(self) -> str:
        return ", ".join(f"{name} {axis}" for name, axis in self.axes.items())

    def to_json(self) -> dict[str, list[int]]:
        return {name: [axis.low, axis.best, axis.high, axis.step] for name, axis in self.axes.items()}

    @staticmethod
    def from_json(axes: Mapping[str, Sequence[int]]) -> Profile:
        return Profile({name: Axis(*values) for name, values in axes.items()})


@dataclass(frozen=True)
class SizePolicy:
    """What is asked for: ranges of widths and heights in pixels, and of images in a batch.

    Attributes:
        sizes: (widths, heights), a profile each. An axis' `best` is not used here.
        batch: images at once.
    """

    sizes: tuple[tuple[Axis, Axis], ...]
    batch: Axis

    @staticmethod
    def parse(sizes: Iterable[str], batch: str = "1") -> SizePolicy:
        """Read sizes as this module's docstring shows them.

        Raises:
            RequestError: one of them cannot be read, is empty or upside down.
        """
        texts = [text.strip() for text in sizes]
        if not texts:
            raise RequestError("no sizes are given; write such as 1024x1024 or '512..1280 step 64'")
        rows = _BATCH.fullmatch(batch.strip())
        if rows is None:
            raise RequestError(f"the batch {batch!r} cannot be read; write such as 1 or 1..4")
        return SizePolicy(tuple(_size(text) for text in texts), _axis(batch, rows[1], rows[2], "1"))

    @staticmethod
    def around(component: Component) -> SizePolicy:
        """From half to five quarters of the model's own size, up to four images: what is built unasked.

        In steps of whole latents from that size, so that it is one of them.
        """
        size, scale = component.native_size, component.latent_scale
        step = max(size // 16 // scale, 1) * scale
        side = Axis(size - size // 2 // step * step, size, size + size // 4 // step * step, step)
        return SizePolicy(((side, side),), Axis(1, 1, 4))


def profiles_for(component: Component, policy: SizePolicy) -> tuple[Profile, ...]:
    """The policy in the component's own dimensions, without repetitions.

    A side is tuned for the model's own size where it is in the range, and for the nearest end where not; a batch
    for its smallest number of images, with guidance.

    Raises:
        RequestError: a side is not a multiple of the pixels of a latent.
        BackendError: the component has a dimension that sizes say nothing of.
    """
    names = dict.fromkeys(d for spec in component.inputs for d in spec.dims if isinstance(d, str))
    found: list[Profile] = []
    for width, height in policy.sizes:
        axes = {}
        for name in names:
            if name == "batch":
                axes[name] = _rows(component, policy.batch)
            elif name in _SIDES:
                side, latent = _SIDES[name]
                pixels = height if side == "height" else width
                axes[name] = _units(component, pixels, component.latent_scale if latent else 1)
            else:
                raise BackendError(f"{component.name} has a dimension {name!r}, which no size speaks of")
        profile = Profile(axes)
        if profile not in found:  # text encoders have one whatever the sizes
            found.append(profile)
    return tuple(found)


def profile_index(component: Component, profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Which profile runs inputs of these sizes: the narrowest of those that take them.

    Raises:
        EngineSizeError: none does; they are listed.
    """
    fitting = [k for k, profile in enumerate(profiles) if profile.takes(sizes)]
    if not fitting:
        asked = ", ".join(f"{name} {sizes[name]}" for name in profiles[0].axes)
        known = "; ".join(str(profile) for profile in profiles)
        unit = f" (a latent is {component.latent_scale} pixels)" if "height" in sizes else ""
        raise EngineSizeError(
            f"the engine of {component.name} was built for other sizes than {asked}: it takes {known}{unit}; ask for "
            "one of these, or build another with `latentrt build --sizes --batch`"
        )
    return min(fitting, key=lambda k: prod(a.high - a.low + 1 for a in profiles[k].axes.values()))


def _size(text: str) -> tuple[Axis, Axis]:
    found = _SIZE.fullmatch(text)
    if found is None:
        raise RequestError(
            f"the size {text!r} cannot be read; write such as 1024x1024, 1024 or '512..1280 step 64'"
        )
    low, high, low2, high2, step = found.groups()
    width = _axis(text, low, high, step)
    return width, (width if low2 is None else _axis(text, low2, high2, step))


def _axis(text: str, low: str, high: str | None, of: str | None) -> Axis:
    """`of`: the step, if one is given."""
    if max(len(number) for number in (low, high or "", of or "")) > _DIGITS:
        raise RequestError(f"{text[:80]!r} has a number of more than {_DIGITS} digits; write smaller ones")
    first, last, step = int(low), int(high or low), int(of or 0)
    if of is not None and step < 1:
        raise RequestError(f"{text!r} has a step of {step}; leave it out, or write at least 1")
    if not 1 <= first <= last:
        raise RequestError(f"{text!r} goes from {first} to {last}; write the smaller first, and at least 1")
    if step and (last - first) % step:
        raise RequestError(f"{text!r} does not reach {last} from {first} in steps of {step}")
    return Axis(first, first, last, step)


def _units(component: Component, pixels: Axis, scale: int) -> Axis:
    step = pixels.step or component.latent_scale
    for value in (pixels.low, pixels.high, step):
        if value % component.latent_scale:
            raise RequestError(
                f"{value} pixels are no whole number of latents; {component.name} takes multiples of "
                f"{component.latent_scale} pixels"
            )
    best = min(max(component.native_size, pixels.low), pixels.high)
    best = pixels.low + (best - pixels.low) // step * step
    return Axis(pixels.low // scale, best // scale, pixels.high // scale, step // scale)


def _rows(component: Component, images: Axis) -> Axis:
    if component.name.startswith("vae"):  # images pass one at a time
        return Axis(1, 1, images.high)
    # Guidance doubles the rows of a UNet and of the prompts, and can be off.
    if component.name == "unet.time":  # all steps of a loop, which fill it up
        return Axis(1, 2 * images.low * STEPS_AT_ONCE, 2 * images.high * STEPS_AT_ONCE)
    low = images.low if component.name in ("unet", "unet.step") else 1
    return Axis(low, 2 * images.low, 2 * images.high)
