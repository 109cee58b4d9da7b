"""Stage "handover": what the trained base hands over, with the scene that it is a picture of, for the refiner.

On noised drawings a refiner sees no mistake of the base's: there what is wrong is noise, and the rest is right. So the
base generates from captions, its latents are kept at a step near the hand-over, and the scene that its finished picture
shows is fitted and drawn. Those latents are that drawing plus a "noise" which holds the base's mistakes; the refiner
learns to take it away.

What is held out is not drawn here either. But a refiner that never sees a cyan star takes one for a blue star that the
base has drawn wrongly. So the base is asked for those pairings too, and where its picture is right, that is the
target, as it is for some of the others. The lower aesthetic score of these targets keeps their style apart from the
drawings': if the pairing alone told it, guidance would exaggerate it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from rich.progress import track
from scipy.optimize import minimize
from torch import Tensor

from ...runtime.pipeline import Pipeline
from ...runtime.sha256 import sha256_of
from ..quality import as_input
from . import data
from .checker import Found, background_plane, find_objects, foreground, judge
from .kept import SHARP, is_made_from, note_made_from
from .latents import Encoded, made_from
from .loop import Run, console
from .scenes import (
    BACKGROUNDS,
    CANVASES,
    Picture,
    Scene,
    caption,
    held_out,
    random_scene,
    render,
    signed_distance,
)

SEED = 700_000_000  # the examples begin here
SHARE = 0.25  # pictures generated per base example
BATCH = 16
BACKEND = "auto"  # of the base that generates
STEPS = (8, 10, 12, 15, 20, 25, 30, 40)
GUIDANCE = (2.0, 6.0)
OWN = 0.2  # share of the pictures, besides all of what is held out, that are their own target
OWN_SCORES = (4.0, 5.0)  # aesthetic scores of those
TIMESTEPS = (120, 230)  # of the latents that are kept; generation hands over at 200
LEAST_OVERLAP = 0.8  # intersection over union of the objects drawn with those generated


@dataclass(frozen=True)
class Request:
    """What the base is asked for in one picture."""

    scene: Scene
    caption: str
    seed: int
    guidance: float
    drawn: bool  # the target is the drawing of what the picture shows, else the picture itself
    aesthetic: float


@dataclass(frozen=True)
class Handover:
    """One picture of the base: `noisy`, its latents before the last steps, [4, h, w], divided by `sigma`, so that they
    are the picture's over sigma plus noise of unit variance; and the finished `latents` and `picture`."""

    request: Request
    noisy: Tensor
    sigma: float
    latents: Tensor
    picture: Picture


def stage_handover(run: Run) -> None:
    """Write `out/latents/handover.pt`."""
    load_handovers(run)


def load_handovers(run: Run) -> list[Encoded]:
    """A table per canvas, with noise; made first where there are none of this base, which takes 0.1 to
    0.4 s a picture on two CPU cores."""
    path = run.out / "latents" / "handover.pt"
    wanted = handovers_made_from(run)
    if not is_made_from(path, wanted):
        count = int(run.examples * SHARE)
        vae = AutoencoderKL.from_pretrained(run.out / SHARP).to(run.device).eval()
        first = SEED + run.seed * run.examples
        tables = encode_handovers(vae, generate(run, range(first, first + count)), count)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save([(t.latents, t.captions, t.sizes, t.noise) for t in tables], temporary)
        temporary.replace(path)
        note_made_from(path, wanted)
        console.log(f"handover: {sum(len(t.captions) for t in tables)} of {count} pictures show their scene")
    return [Encoded(*row) for row in torch.load(path, weights_only=True)]


def handovers_made_from(run: Run) -> dict[str, Any]:
    """What these examples depend on: what all do, and the base."""
    unet = run.out / "demo" / "unet" / "diffusion_pytorch_model.safetensors"
    return made_from(run) | {"base": sha256_of(unet)}


def request_of(seed: int) -> Request:
    """Example number `seed`."""
    rng = random.Random(f"latentrt demo handover {seed}")
    scene = random_scene(rng, data.canvas_of(seed), want_held_out=None)
    drawn = not held_out(scene) and rng.random() >= OWN
    score = rng.uniform(*(data.CLEAN if drawn else OWN_SCORES))
    return Request(scene, caption(rng, scene), seed, rng.uniform(*GUIDANCE), drawn, score)


def generate(run: Run, seeds: range) -> Iterator[Handover]:
    """The base's pictures, in batches of one canvas and number of steps."""
    demo = run.out / "demo"
    pipe = Pipeline.from_pretrained(demo, backend=BACKEND)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(f"latentrt demo handover steps {seeds.start}")
    for canvas in CANVASES:
        rows = [request_of(seed) for seed in seeds if data.canvas_of(seed) == canvas]
        for k in range(0, len(rows), BATCH):
            schedule = schedule_of(demo, rng.choice(STEPS))
            near = [step for step, (t, _) in enumerate(schedule) if TIMESTEPS[0] <= t <= TIMESTEPS[1]]
            step = rng.choice(near)
            yield from generate_batch(pipe, rows[k : k + BATCH], len(schedule), step, schedule[step][1])


def schedule_of(demo: Path, steps: int) -> list[tuple[float, float]]:
    """(timestep, sigma) that each step begins with."""
    scheduler = EulerDiscreteScheduler.from_pretrained(demo / "scheduler")
    scheduler.set_timesteps(steps)
    return list(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist()[:-1], strict=True))


def generate_batch(
    pipe: Pipeline, rows: Sequence[Request], steps: int, step: int, sigma: float
) -> Iterator[Handover]:
    """Pictures of one canvas, with the latents that step number `step` begins with, at noise level `sigma`."""
    kept: dict[int, Tensor] = {}

    def keep(_pipe: object, done: int, _timestep: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if done in (step - 1, steps - 1):
            kept[done] = values["latents"].float().cpu()
        return {}

    height, width = rows[0].scene.height, rows[0].scene.width
    images = pipe(
        [row.caption for row in rows],
        seed=[row.seed for row in rows],
        guidance_scale=[row.guidance for row in rows],
        num_inference_steps=steps,
        height=height,
        width=width,
        callback_on_step_end=keep,
    ).images
    for row, noisy, latents, image in zip(rows, kept[step - 1] / sigma, kept[steps - 1], images, strict=True):
        yield Handover(row, noisy, sigma, latents, np.asarray(image))


def encode_handovers(vae: AutoencoderKL, pictures: Iterable[Handover], count: int) -> list[Encoded]:
    """Encode what each shows, where it shows what was asked for; a table for each canvas of which any is left.

    A row's `noise` is what the latents handed over hold beside those of what they should become: at any timestep a UNet
    sees signal * latents + spread * noise.
    """
    rows: dict[tuple[int, int], list[tuple[Tensor, Tensor, Request]]] = {canvas: [] for canvas in CANVASES}
    for handed in track(pictures, "handover", total=count):
        scene = handed.request.scene
        latents = _target(vae, handed)
        if latents is not None:
            noise = handed.noisy - latents / handed.sigma
            rows[scene.height, scene.width].append((latents.half(), noise.half(), handed.request))
    tables = []
    for canvas, found in rows.items():
        if not found:
            continue
        tables.append(
            Encoded(
                torch.stack([latents for latents, _, _ in found]),
                [request.caption for _, _, request in found],
                torch.tensor([[*canvas, 0, 0, *canvas, request.aesthetic] for _, _, request in found]),
                torch.stack([noise for _, noise, _ in found]),
            )
        )
    return tables


@torch.no_grad()
def _target(vae: AutoencoderKL, handed: Handover) -> Tensor | None:
    """[4, h, w], what the latents handed over should become; None where the picture is too far from what was asked."""
    scene = handed.request.scene
    if not handed.request.drawn:
        return handed.latents if judge(handed.picture, scene).objects else None
    shown = scene_shown(handed.picture, scene)
    if shown is None:
        return None
    encoded: Tensor = vae.encode(as_input([render(shown)]).to(vae.device)).latent_dist.mode()[0].cpu()
    return encoded * float(vae.config.scaling_factor)


# ---- the scene in a picture ----


def scene_shown(picture: Picture, asked: Scene) -> Scene | None:
    """The scene whose drawing is nearest to a picture [H, W, 3] generated for the scene `asked`; its colours and
    shapes are those asked for. None where the picture shows other things, more than one colour or shape being wrong,
    or nothing drawn overlaps it well.
    """
    found = find_objects(picture)
    if len(found) != len(asked.things):
        return None
    matched = min(itertools.permutations(found), key=lambda order: _wrong(order, asked))
    if _wrong(matched, asked) > 1:
        return None
    plane = background_plane(picture)
    middle = plane[0] + (plane[1] + plane[2]) / 2
    background = min(BACKGROUNDS, key=lambda name: float(np.abs(middle - BACKGROUNDS[name]).sum()))
    tilt = (float(plane[1].mean()), float(plane[2].mean()))
    start = replace(asked, background=background, tilt=tilt)
    return _fitted(picture, start, matched)


def _wrong(found: tuple[Found, ...], asked: Scene) -> int:
    """How many colours and shapes differ."""
    return sum(
        (f.colour != thing.colour) + (f.shape != thing.shape)
        for f, thing in zip(found, asked.things, strict=True)
    )


def _fitted(picture: Picture, scene: Scene, found: tuple[Found, ...]) -> Scene | None:
    """The scene with the places and radii, first estimated from centres and areas, of least squared error."""
    wanted = picture.astype(np.float32)

    def with_places(values: np.ndarray) -> Scene:
        places = values.reshape(-1, 3)
        things = tuple(
            replace(thing, x=float(x), y=float(y), radius=float(radius))
            for thing, (x, y, radius) in zip(scene.things, places, strict=True)
        )
        return replace(scene, things=things)

    def error(values: np.ndarray) -> float:
        if (values.reshape(-1, 3)[:, 2] < 5).any():
            return float("inf")
        return float(np.square(render(with_places(values)) - wanted).mean())

    start = np.concatenate([_place(f, thing.shape) for f, thing in zip(found, scene.things, strict=True)])
    simplex = np.concatenate([start[None], start + 1.5 * np.eye(len(start))])
    options = {"initial_simplex": simplex, "xatol": 0.05, "fatol": 0.05, "maxfev": 60 * len(start)}
    best = with_places(minimize(error, start, method="Nelder-Mead", options=options).x)
    drawn, generated = foreground(render(best)), foreground(picture)
    overlap = (drawn & generated).sum() / max(1, (drawn | generated).sum())
    return best if overlap >= LEAST_OVERLAP else None


def _place(found: Found, shape: str) -> tuple[float, float, float]:
    """(x, y, radius) of a shape whose area and its centre are those found."""
    y, x = np.mgrid[-45:46, -45:46].astype(np.float32)
    unit = 20.0
    ideal = signed_distance(shape, x, y, unit) < 0
    radius = unit * (found.area / ideal.sum()) ** 0.5
    return (
        found.x - float(x[ideal].mean()) * radius / unit,
        found.y - float(y[ideal].mean()) * radius / unit,
        radius,
    )
