"""The demo's world: scenes of one or two shaded shapes on a neutral background, and captions for them.

Everything follows from a `random.Random`: the same seed gives the same scene, picture and caption on any
machine. Shapes are drawn from signed distances, so edges are antialiased at any size and a scene can be drawn
at any scale (small originals) and offset (crops).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Picture = NDArray[np.uint8]  # [H, W, 3]
Relation = Literal["above", "below", "left of", "right of"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 25),
    "yellow": (245, 220, 50),
    "green": (45, 160, 65),
    "cyan": (60, 205, 220),
    "blue": (45, 85, 220),
    "purple": (130, 55, 180),
    "pink": (245, 130, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (236, 236, 234),
    "gray": (140, 141, 143),
    "black": (30, 30, 33),
    "brown": (104, 76, 54),
}
RELATIONS: tuple[Relation, ...] = ("above", "below", "left of", "right of")
INVERSE: dict[Relation, Relation] = {
    "above": "below",
    "below": "above",
    "left of": "right of",
    "right of": "left of",
}
SIZES = {"small": 20.0, "large": 26.0}  # radius in pixels
CANVASES = ((128, 128), (160, 96), (96, 160))  # (height, width)

# Never drawn in training: single objects by (colour, shape), pairs by (first shape, relation, second shape).
HELD_OUT_OBJECTS = frozenset(
    {
        ("red", "star"),
        ("blue", "ring"),
        ("green", "triangle"),
        ("yellow", "cross"),
        ("purple", "circle"),
        ("orange", "square"),
        ("cyan", "star"),
        ("pink", "triangle"),
    }
)
HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "above", "star"),
        ("triangle", "left of", "ring"),
        ("cross", "above", "square"),
        ("star", "left of", "square"),
        ("ring", "above", "circle"),
        ("cross", "left of", "triangle"),
    }
)

OUTLINE = 2.0  # pixels


@dataclass(frozen=True)
class Thing:
    """One object: `radius` and the centre (`x`, `y`) are in pixels of the scene's canvas."""

    shape: str
    colour: str
    size: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `relation` is that of the first thing to the second."""

    height: int
    width: int
    background: str
    tilt: tuple[float, float]  # change of the background's brightness across the canvas, (down, right)
    things: tuple[Thing, ...]
    relation: Relation | None


def held_out(scene: Scene) -> bool:
    """Whether the scene shows a pairing that training never sees."""
    if any((thing.colour, thing.shape) in HELD_OUT_OBJECTS for thing in scene.things):
        return True
    if scene.relation is None:
        return False
    first, second = scene.things[0].shape, scene.things[1].shape
    return (first, scene.relation, second) in HELD_OUT_PAIRS or (
        second,
        INVERSE[scene.relation],
        first,
    ) in HELD_OUT_PAIRS


def random_scene(
    rng: random.Random,
    canvas: tuple[int, int] = (128, 128),
    *,
    count: int | None = None,
    want_held_out: bool | None = False,
) -> Scene:
    """Draw a scene with `count` things (None: one or two); `want_held_out` None takes either kind."""
    if count is None:
        count = 1 if rng.random() < 0.35 else 2
    while True:
        scene = _one_thing(rng, canvas) if count == 1 else _two_things(rng, canvas)
        if scene is not None and (want_held_out is None or held_out(scene) == want_held_out):
            return scene


def _random_thing(rng: random.Random) -> tuple[str, str, str, float]:
    size = rng.choice(tuple(SIZES))
    return rng.choice(SHAPES), rng.choice(tuple(COLOURS)), size, SIZES[size] * rng.uniform(0.94, 1.06)


def _finish(
    rng: random.Random, canvas: tuple[int, int], things: tuple[Thing, ...], relation: Relation | None
) -> Scene:
    tilt = (rng.uniform(-16.0, 16.0), rng.uniform(-16.0, 16.0))
    return Scene(*canvas, rng.choice(tuple(BACKGROUNDS)), tilt, things, relation)


def _one_thing(rng: random.Random, canvas: tuple[int, int]) -> Scene | None:
    height, width = canvas
    x, y = width * rng.uniform(0.36, 0.64), height * rng.uniform(0.36, 0.64)
    return _finish(rng, canvas, (Thing(*_random_thing(rng), x, y),), None)


def _two_things(rng: random.Random, canvas: tuple[int, int]) -> Scene | None:
    height, width = canvas
    relation = rng.choice(RELATIONS)
    first, second = _random_thing(rng), _random_thing(rng)
    if first[:2] == second[:2]:
        return None
    along, across = (height, width) if relation in ("above", "below") else (width, height)
    gap = first[3] + second[3] + rng.uniform(4.0, 16.0)  # between the centres, along the relation
    middle = along / 2 + rng.uniform(-6.0, 6.0)
    low, high = middle - gap / 2, middle + gap / 2
    if relation in ("below", "right of"):
        low, high = high, low
    lanes = (across / 2 + rng.uniform(-12.0, 12.0), across / 2 + rng.uniform(-12.0, 12.0))
    places = ((low, lanes[0]), (high, lanes[1]))
    if any(
        not (part[3] + 1 <= a <= along - part[3] - 1)
        for part, (a, _) in zip((first, second), places, strict=True)
    ):
        return None
    things = tuple(
        Thing(*part, *((c, a) if along_is_y else (a, c)))
        for part, (a, c) in zip((first, second), places, strict=True)
        for along_is_y in (relation in ("above", "below"),)
    )
    return _finish(rng, canvas, things, relation)


# ---- drawing ----


def signed_distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Distance in pixels to the shape's edge, negative inside; (x, y) are relative to its centre, y down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        half = 0.88 * radius
        return np.maximum(np.abs(x), np.abs(y)) - half
    if shape == "triangle":  # equilateral, a corner up
        outer = 1.2 * radius
        y = y - 0.12 * radius
        return np.maximum(y, math.sqrt(0.75) * np.abs(x) - 0.5 * y) - outer / 2
    if shape == "cross":
        arm, half = radius, 0.34 * radius
        x, y = np.abs(x), np.abs(y)
        crossed: Array = np.minimum(np.maximum(x - arm, y - half), np.maximum(x - half, y - arm))
        return crossed
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.73 * radius) - 0.27 * radius
    if shape == "star":
        return _star_distance(x, y - 0.04 * radius, 1.08 * radius)
    raise ValueError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")


def _star_distance(x: Array, y: Array, outer: float) -> Array:
    inner = 0.45 * outer
    corners = [
        (
            (outer, inner)[k % 2] * math.sin(k * math.pi / 5),
            -(outer, inner)[k % 2] * math.cos(k * math.pi / 5),
        )
        for k in range(10)
    ]
    squared = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - np.float32(ax), y - np.float32(ay)
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        squared = np.minimum(squared, (px - ex * along) ** 2 + (py - ey * along) ** 2)
        crossing = (ay > y) != (by > y)
        if ey != 0.0:
            inside ^= crossing & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -1.0, 1.0).astype(np.float32) * np.sqrt(squared)


def render(
    scene: Scene,
    *,
    height: int | None = None,
    width: int | None = None,
    top: float = 0.0,
    left: float = 0.0,
    scale: float = 1.0,
) -> Picture:
    """Draw the window of `height` x `width` pixels whose corner is at (`top`, `left`) of the scene.

    `scale` is output pixels per scene pixel; `top` and `left` are in scene pixels. Returns [H, W, 3].
    """
    height = scene.height if height is None else height
    width = scene.width if width is None else width
    ys = ((np.arange(height, dtype=np.float32) + 0.5) / scale + top)[:, None]
    xs = ((np.arange(width, dtype=np.float32) + 0.5) / scale + left)[None, :]
    light = (ys / scene.height - 0.5) * scene.tilt[0] + (xs / scene.width - 0.5) * scene.tilt[1]
    image = np.asarray(BACKGROUNDS[scene.background], np.float32) + light[..., None]
    for thing in scene.things:
        reach = 1.3 * thing.radius + 2
        rows = np.flatnonzero(np.abs(ys[:, 0] - thing.y) < reach)
        columns = np.flatnonzero(np.abs(xs[0] - thing.x) < reach)
        if rows.size == 0 or columns.size == 0:
            continue
        window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        y = np.broadcast_to(ys[window[0]] - np.float32(thing.y), (rows.size, columns.size))
        x = np.broadcast_to(xs[:, window[1]] - np.float32(thing.x), (rows.size, columns.size))
        distance = signed_distance(thing.shape, x, y, thing.radius)
        cover = np.clip(0.5 - distance * scale, 0.0, 1.0)[..., None]
        rim = np.clip(0.5 + (distance + OUTLINE) * scale, 0.0, 1.0)[..., None]
        shade = 1.0 - 0.16 * (x + y)[..., None] / (1.4 * thing.radius)  # lit from the upper left
        body = np.asarray(COLOURS[thing.colour], np.float32) * shade
        body = body * (1 - rim) + 0.5 * body * rim
        image[window] = image[window] * (1 - cover) + body * cover
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ---- captions ----

OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ")
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def thing_phrase(rng: random.Random, thing: Thing) -> str:
    """Such as "a red circle" or "a large red circle"."""
    say_size = rng.random() < 0.4
    return _article(
        f"{thing.size} {thing.colour} {thing.shape}" if say_size else f"{thing.colour} {thing.shape}"
    )


def caption(rng: random.Random, scene: Scene, *, say_relation: bool | None = None) -> str:
    """One wording of the scene; which facts it leaves unsaid is drawn too."""
    opening = rng.choice(OPENINGS)
    background = ""
    if rng.random() < 0.6:
        name = scene.background
        background = rng.choice((f" on a {name} background", f" on {name}", f", {name} background"))
    if scene.relation is None:
        return opening + thing_phrase(rng, scene.things[0]) + background
    first, second, relation = *scene.things, scene.relation
    if rng.random() < 0.5:
        first, second, relation = second, first, INVERSE[relation]
    a, b = thing_phrase(rng, first), thing_phrase(rng, second)
    if say_relation is None:
        say_relation = rng.random() < 0.9
    if not say_relation:
        return f"{opening}{a} and {b}{background}"
    words = rng.choice(RELATION_WORDS[relation])
    if rng.random() < 0.15:
        return f"{opening}{b} with {a} {words} it{background}"
    return f"{opening}{a} {words} {b}{background}"
