"""What a picture shows, found from its pixels alone: it knows the world's palette and shapes, and no model.

The background is a plane fitted to the border; what differs from it is foreground. Connected foreground is an
object (or two, where it has two colours), its colour the palette's nearest to the median of its core, its shape
the ideal outline that overlaps it best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .scenes import COLOURS, SHAPES, Picture, Relation, Scene, signed_distance

Mask = NDArray[np.bool_]

CONTRAST = 42.0  # largest channel difference from the background that is still background
SMALLEST = 110  # pixels; the smallest shape drawn has 350
COLOUR_REACH = 95.0  # RGB distance beyond which a colour is none of the palette's
LEAST_OVERLAP = 0.72  # intersection over union below which a shape is none of those known
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Found:
    """An object: the centre (`x`, `y`) of its area and its size in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    area: int
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows a scene: every object and no other; all their colours; of two things, which differ in
    colour or shape, both and no other, rightly placed (None where there is one)."""

    objects: bool
    colours: bool
    relation: bool | None


def background_plane(picture: Picture) -> NDArray[np.float64]:
    """[3, 3], the plane through the border's colours of a picture [H, W, 3]: row 0 is the colour at the upper left
    corner, rows 1 and 2 are its change down and right across the whole picture."""
    flat, design = _by_place(picture)
    edge = np.zeros(picture.shape[:2], bool)
    edge[:3], edge[-3:], edge[:, :3], edge[:, -3:] = True, True, True, True
    rows = np.flatnonzero(edge.ravel())
    rows = rows[np.abs(flat[rows] - np.median(flat[rows], axis=0)).max(axis=1) < CONTRAST]
    plane: NDArray[np.float64] = np.linalg.lstsq(design[rows], flat[rows], rcond=None)[0]
    return plane


def _by_place(picture: Picture) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[H * W, 3] colours, and as many rows (1, y / H, x / W)."""
    height, width = picture.shape[:2]
    ys, xs = np.mgrid[0:height, 0:width]
    design = np.stack([np.ones(height * width), ys.ravel() / height, xs.ravel() / width], axis=1)
    return picture.reshape(-1, 3).astype(np.float64), design


def foreground(picture: Picture) -> Mask:
    """Pixels of [H, W, 3] that differ from the background's plane."""
    flat, design = _by_place(picture)
    far: Mask = np.abs(flat - design @ background_plane(picture)).max(axis=1) > CONTRAST
    return far.reshape(picture.shape[:2])


def find_objects(picture: Picture) -> list[Found]:
    """The objects in a picture [H, W, 3], largest first."""
    labels, count = ndimage.label(foreground(picture))
    found = []
    for index in range(1, count + 1):
        mask = labels == index
        if mask.sum() >= SMALLEST:
            found += [_describe(picture, part) for part in _split_by_colour(picture, mask)]
    return sorted(found, key=lambda f: -f.area)


def _core(mask: Mask) -> Mask:
    """The inside of a mask, away from outline and blended edge."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    core: Mask = depth > min(3.0, 0.6 * float(depth.max()))
    return core


def _split_by_colour(picture: Picture, mask: Mask) -> list[Mask]:
    core = _core(mask)
    palette = np.array(list(COLOURS.values()), np.float64)
    nearest = np.linalg.norm(picture[core][:, None].astype(np.float64) - palette, axis=2).argmin(axis=1)
    present = [k for k in range(len(palette)) if (nearest == k).sum() > max(30, 0.25 * len(nearest))]
    if len(present) < 2:
        return [mask]
    distances = []
    for k in present:
        seeds = np.zeros(mask.shape, bool)
        seeds[core] = nearest == k
        distances.append(ndimage.distance_transform_edt(~seeds))
    owner = np.argmin(distances, axis=0)
    parts = [mask & (owner == k) for k in range(len(present))]
    return [part for part in parts if part.sum() >= SMALLEST]


def _describe(picture: Picture, mask: Mask) -> Found:
    colour = np.median(picture[_core(mask)].astype(np.float64), axis=0)
    distance, name = min((math.dist(colour, value), name) for name, value in COLOURS.items())
    y, x = ndimage.center_of_mass(mask)
    overlap, shape = max((_overlap(mask, shape), shape) for shape in SHAPES)
    return Found(
        shape if overlap >= LEAST_OVERLAP else UNKNOWN,
        name if distance <= COLOUR_REACH else UNKNOWN,
        float(x),
        float(y),
        int(mask.sum()),
        overlap,
    )


def _overlap(mask: Mask, shape: str) -> float:
    """Best intersection over union of the mask with the ideal shape of about its area, at its centre."""
    reach = 45
    grid = np.arange(-reach, reach + 1, dtype=np.float32)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    unit = 20.0
    ideal = signed_distance(shape, x, y, unit) < 0
    centre = ndimage.center_of_mass(ideal)
    offset = (centre[0] - reach, centre[1] - reach)  # from the drawing's origin to the centre of its area
    mid = ndimage.center_of_mass(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    window = np.pad(window, 4)
    ys = np.arange(window.shape[0], dtype=np.float32)[:, None] + (rows[0] - 4 - mid[0])
    xs = np.arange(window.shape[1], dtype=np.float32)[None, :] + (columns[0] - 4 - mid[1])
    best = 0.0
    for factor in (0.94, 1.0, 1.06):
        radius = unit * math.sqrt(mask.sum() / ideal.sum()) * factor
        shift = (offset[0] * radius / unit, offset[1] * radius / unit)
        py = np.broadcast_to(ys + np.float32(shift[0]), window.shape)
        px = np.broadcast_to(xs + np.float32(shift[1]), window.shape)
        drawn = signed_distance(shape, px, py, radius) < 0
        best = max(best, float((drawn & window).sum() / (drawn | window).sum()))
    return best


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> Relation:
    """How a first centre (x, y) lies to a second, along the axis on which they differ most."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def judge(picture: Picture, scene: Scene) -> Verdict:
    """Compare a picture with the scene its prompt describes."""
    found = find_objects(picture)
    wanted = sorted((thing.colour, thing.shape) for thing in scene.things)
    objects = sorted((f.colour, f.shape) for f in found) == wanted
    colours = sorted(f.colour for f in found) == sorted(colour for colour, _ in wanted)
    if scene.relation is None:
        return Verdict(objects, colours, None)
    if not objects:
        return Verdict(objects, colours, False)
    places = {(f.colour, f.shape): (f.x, f.y) for f in found}
    first, second = (places[thing.colour, thing.shape] for thing in scene.things)
    return Verdict(objects, colours, relation_of(first, second) == scene.relation)
