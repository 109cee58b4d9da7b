"""Training examples: a scene as a camera and an archive would deliver it, with the true micro-conditioning.

As SDXL was trained (Podell et al. 2023, section 2.2): some pictures are small originals that were enlarged,
some are windows cut out of a larger picture; the sizes and offsets are given to the model. The refiner also
sees damaged pictures with a low aesthetic score.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .scenes import CANVASES, Scene, caption, random_scene, render

SMALL_ORIGINAL = 0.22  # share of enlarged small originals
SMALL_SCALE = (0.2, 0.55)  # their size, of the canvas
CROPPED = 0.18  # share of windows
CLEAN = (5.5, 7.0)  # aesthetic scores of pictures that are not damaged
DAMAGED = 0.3  # share of damaged pictures among the refiner's
LARGEST_OFFSET = 40  # pixels
FEW_CORES = 4


@dataclass(frozen=True)
class Example:
    """A picture [H, W, 3] with its caption and conditioning; sizes and offsets in pixels, (height, width)."""

    pixels: NDArray[np.uint8]
    caption: str
    original: tuple[int, int]
    crop: tuple[int, int]
    aesthetic: float
    scene: Scene


def canvas_of(seed: int) -> tuple[int, int]:
    """The (height, width) of example `seed`: three in five are square."""
    return CANVASES[(0, 0, 0, 1, 2)[seed % 5]]


def example(seed: int, *, damaged: float = 0.0) -> Example:
    """Draw example number `seed`; `damaged` is the probability of a damaged picture."""
    rng = random.Random(f"latentrt demo {seed}")
    height, width = canvas = canvas_of(seed)
    scene = random_scene(rng, canvas)
    words = caption(rng, scene)
    original, crop = canvas, (0, 0)
    kind = rng.random()
    if kind < SMALL_ORIGINAL:
        scale = rng.uniform(*SMALL_SCALE)
        original = (max(16, round(height * scale)), max(16, round(width * scale)))
        pixels = enlarge(scene, original)
    elif kind < SMALL_ORIGINAL + CROPPED:
        crop = _offset(rng, scene)
        pixels = render(scene, top=crop[0], left=crop[1])
        if rng.random() < 0.5:
            original = (height + crop[0], width + crop[1])
    else:
        pixels = render(scene)
    aesthetic = rng.uniform(*CLEAN)
    if rng.random() < damaged:
        severity = rng.uniform(0.15, 1.0)
        pixels, aesthetic = damage(rng, pixels, severity), 5.0 - 4.0 * severity
    return Example(pixels, words, original, crop, aesthetic, scene)


def examples(seeds: range, *, damaged: float = 0.0) -> Iterator[Example]:
    """Draw examples in order, in several processes where there are more than a few cores."""
    draw = functools.partial(example, damaged=damaged)
    cores = len(os.sched_getaffinity(0))
    if cores < FEW_CORES:
        yield from map(draw, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(min(cores, 16)) as pool:
        yield from pool.imap(draw, seeds, chunksize=64)


def enlarge(scene: Scene, original: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw the scene with `original` (height, width) pixels and enlarge the picture to the canvas."""
    small = render(scene, height=original[0], width=original[1], scale=original[0] / scene.height)
    picture = Image.fromarray(small).resize((scene.width, scene.height), Image.Resampling.BICUBIC)
    pixels: NDArray[np.uint8] = np.asarray(picture)
    return pixels


def _offset(rng: random.Random, scene: Scene) -> tuple[int, int]:
    """A window's (top, left) that keeps every thing's centre in the picture."""
    most_down = min(LARGEST_OFFSET, int(min(thing.y for thing in scene.things)) - 4)
    most_right = min(LARGEST_OFFSET, int(min(thing.x for thing in scene.things)) - 4)
    axis = rng.randrange(3)  # down, right, both
    down = rng.randint(0, max(0, most_down)) if axis != 1 else 0
    right = rng.randint(0, max(0, most_right)) if axis != 0 else 0
    return down, right


def damage(rng: random.Random, pixels: NDArray[np.uint8], severity: float) -> NDArray[np.uint8]:
    """Noise, JPEG blocks, blur or flat colours, of a severity from 0 to 1."""
    kind = rng.randrange(4)
    if kind == 0:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0.0, 40.0 * severity, pixels.shape)
        return np.clip(pixels + noise, 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    if kind == 1:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=round(30 - 26 * severity))
        return np.asarray(Image.open(buffer).convert("RGB"))
    if kind == 2:
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(0.5 + 2.5 * severity)))
    flat = np.asarray(picture.convert("L"), np.float32)[..., None].mean(axis=(0, 1), keepdims=True)
    flattened: NDArray[np.uint8] = np.clip(pixels + 0.6 * severity * (flat - pixels), 0, 255).astype(np.uint8)
    return flattened


def without_pixels(example: Example) -> Example:
    """The example's words and numbers alone."""
    return replace(example, pixels=np.empty((0, 0, 3), np.uint8))
