"""Measure the demo checkpoint: `python -m latentrt.bench.demo_model.evaluate [--short] [--json FILE]`.

Four measurements, each repeatable from the seeds printed with it:
vae        what is left of drawn scenes after the VAE: no UNet can do better
accuracy   objects and relations by the pixel checker, half of the prompts from held-out pairings
fid        base alone against base + refiner at the same total steps, paired seeds, bootstrap interval
sizes      a small original size blurs; a crop offset moves the object
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy import ndimage

from ...kernels.atomic_file import write_json
from ...runtime.vae import VAE
from ..machine import describe_machine, module_command
from ..quality import ImageTower, as_input, fid_difference, fid_features, frechet_distance
from .checker import find_objects, judge
from .data import enlarge
from .generate import Generator, PipelineGenerator
from .scenes import Picture, Scene, caption, random_scene, render
from .tokenizer import DEMO

console = Console()


@dataclass(frozen=True)
class Accuracy:
    """Shares of prompts right, as `Verdict` has them, `relations` of those with two things; `failures` lists (seed,
    prompt) of those that are not. `seed` is the first picture's."""

    seed: int
    prompts: int
    steps: int
    objects: float
    objects_held_out: float
    colours: float
    relations: float
    failures: list[tuple[int, str]]


@dataclass(frozen=True)
class Fid:
    """FID of base alone and of base + refiner, and base minus base + refiner with its 95 % interval.

    `seed` is the first pair's.
    """

    seed: int
    pairs: int
    steps: int
    base: float
    refined: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Sizes:
    """Mean high-frequency energy at the full and at a small original size; mean shifts in pixels.

    `seed` is the first of so many `seeds`. A picture says little: another crop is another picture, in which the thing
    moves by some 15 pixels more or less.
    """

    seed: int
    seeds: int
    energy_full: float
    energy_small: float
    shift_right: float  # the object's movement in x, asked for a crop `offset` pixels to the right
    shift_right_error: float  # the mean's standard error
    shift_down: float
    shift_down_error: float
    offset: int


@dataclass(frozen=True)
class Kept:
    """What is right in drawn scenes that the VAE has encoded and decoded.

    Attributes:
        seed: of the prompts whose scenes these are.
        objects: share with every object right, in all and by background.
        psnr: mean, in dB.
        energy_small: high-frequency energy of small originals of 32 pixels, over that of the full ones; `drawn_small`
            is the same before the VAE.
    """

    seed: int
    scenes: int
    objects: dict[str, float]
    psnr: float
    energy_small: float
    drawn_small: float


def grammar_prompts(count: int, seed: int) -> list[tuple[str, Scene]]:
    """(prompt, scene it describes), alternately from trained and held-out pairings."""
    rng = random.Random(f"latentrt demo prompts {seed}")
    rows = []
    for k in range(count):
        scene = random_scene(rng, want_held_out=k % 2 == 1)
        rows.append((caption(rng, scene, say_relation=True), scene))
    return rows


def measure_vae(vae: VAE, *, count: int = 200, seed: int = 0) -> Kept:
    """Encode and decode the scenes that `measure_accuracy` asks for."""
    right: dict[str, list[bool]] = {"all": []}
    psnr, energies = [], []
    for _, scene in grammar_prompts(count, seed):
        drawn, small = render(scene), enlarge(scene, (32, 32))
        kept, kept_small = (_through(vae, picture) for picture in (drawn, small))
        for name in ("all", scene.background):
            right.setdefault(name, []).append(judge(kept, scene).objects)
        psnr.append(10 * np.log10(255**2 / np.mean((drawn.astype(np.float64) - kept) ** 2)))
        energies.append([high_frequency_energy(p) for p in (drawn, small, kept, kept_small)])
    full, small_, kept_full, kept_small_ = np.mean(energies, axis=0)
    return Kept(
        seed=seed,
        scenes=count,
        objects={name: float(np.mean(rows)) for name, rows in right.items()},
        psnr=float(np.mean(psnr)),
        energy_small=float(kept_small_ / kept_full),
        drawn_small=float(small_ / full),
    )


def _through(vae: VAE, picture: Picture) -> Picture:
    x = as_input([picture])
    image = vae.decode(vae.encode(x, lambda shape: torch.zeros(1, *shape)))[0]
    return np.asarray((image * 255).round().permute(1, 2, 0).cpu().numpy(), np.uint8)


def measure_accuracy(generate: Generator, *, count: int = 200, steps: int = 30, seed: int = 0) -> Accuracy:
    """Judge `count` pictures; picture k has the seed `seed + k`."""
    rows = grammar_prompts(count, seed)
    pictures = generate([words for words, _ in rows], range(seed, seed + count), steps=steps)
    verdicts = [judge(picture, scene) for picture, (_, scene) in zip(pictures, rows, strict=True)]
    relations = [v.relation for v in verdicts if v.relation is not None]
    return Accuracy(
        seed=seed,
        prompts=count,
        steps=steps,
        objects=float(np.mean([v.objects for v in verdicts])),
        objects_held_out=float(np.mean([v.objects for v in verdicts[1::2]])),
        colours=float(np.mean([v.colours for v in verdicts])),
        relations=float(np.mean(relations)),
        failures=[
            (seed + k, words)
            for k, (v, (words, _)) in enumerate(zip(verdicts, rows, strict=True))
            if not v.objects or v.relation is False
        ],
    )


def measure_fid(
    base: Generator,
    refined: Generator,
    tower: ImageTower,
    *,
    count: int = 2000,
    steps: int = 20,
    seed: int = 0,
    rounds: int = 200,
) -> Fid:
    """Compare both with twice as many drawn scenes; row k of both has the prompt k and the seed `seed + k`.

    Args:
        rounds: of the bootstrap.
    """
    rng = random.Random(f"latentrt demo fid {seed}")
    scenes = [random_scene(rng) for _ in range(count)]
    prompts = [caption(rng, scene) for scene in scenes]
    seeds = range(seed, seed + count)
    a = fid_features(tower, base(prompts, seeds, steps=steps))
    b = fid_features(tower, refined(prompts, seeds, steps=steps))
    drawn = [render(scene) for scene in scenes] + [render(random_scene(rng)) for _ in range(count)]
    truth = fid_features(tower, drawn)
    difference, low, high = fid_difference(truth, a, b, seed=seed, rounds=rounds)
    base_fid, refined_fid = (frechet_distance(truth, x) for x in (a, b))
    return Fid(seed, count, steps, base_fid, refined_fid, difference, low, high)


def measure_sizes(
    generate: Generator, *, count: int = 64, steps: int = 20, seed: int = 0, offset: int = 24
) -> Sizes:
    """Make the same pictures of single things with other original sizes and crops."""
    rng = random.Random(f"latentrt demo sizes {seed}")
    scenes = [random_scene(rng, count=1) for _ in range(count)]
    prompts = [
        f"a {thing.colour} {thing.shape} on a {s.background} background" for s in scenes for thing in s.things
    ]
    seeds = range(seed, seed + count)
    plain = generate(prompts, seeds, steps=steps)
    small = generate(prompts, seeds, steps=steps, original=(32, 32))
    right = generate(prompts, seeds, steps=steps, crop=(0, offset))
    down = generate(prompts, seeds, steps=steps, crop=(offset, 0))
    right_mean, right_error = _mean_shift(plain, right, 0)
    down_mean, down_error = _mean_shift(plain, down, 1)
    return Sizes(
        seed=seed,
        seeds=count,
        energy_full=float(np.mean([high_frequency_energy(p) for p in plain])),
        energy_small=float(np.mean([high_frequency_energy(p) for p in small])),
        shift_right=right_mean,
        shift_right_error=right_error,
        shift_down=down_mean,
        shift_down_error=down_error,
        offset=offset,
    )


def high_frequency_energy(picture: Picture) -> float:
    """Mean square of what a Gaussian blur of 1.5 pixels takes away, of the picture in [0, 1]."""
    image = picture.astype(np.float64) / 255
    return float(np.mean((image - ndimage.gaussian_filter(image, (1.5, 1.5, 0))) ** 2))


def _mean_shift(before: list[Picture], after: list[Picture], axis: int) -> tuple[float, float]:
    """The mean and its standard error, over the pictures with something found in them."""
    shifts = []
    for a, b in zip(before, after, strict=True):
        first, second = find_objects(a), find_objects(b)
        if first and second:
            places = [(f[0].x, f[0].y)[axis] for f in (first, second)]
            shifts.append(places[1] - places[0])
    if len(shifts) < 2:
        return float("nan"), float("nan")
    return float(np.mean(shifts)), float(np.std(shifts, ddof=1) / len(shifts) ** 0.5)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, help="a pipeline folder; the shipped demo by default")
    parser.add_argument("--only", choices=("vae", "accuracy", "fid", "sizes"))
    parser.add_argument("--short", action="store_true", help="16 prompts, 40 pairs, 4 seeds")
    parser.add_argument("--pairs", type=int, default=2000, help="paired seeds of the FID")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    settings = {} if options.guidance is None else {"guidance": options.guidance}
    refined = PipelineGenerator(options.demo, refine=True, **settings)
    results: dict[str, Any] = {
        "benchmark": "quality of the demo",
        "command": module_command("latentrt.bench.demo_model.evaluate", arguments),
        "machine": describe_machine(),
        "seed": options.seed,
        "guidance": refined.guidance,
    }

    def note(name: str, result: Accuracy | Fid | Kept | Sizes, since: float) -> None:
        results[name] = asdict(result)
        console.print(name, results[name], f"{time.monotonic() - since:.0f} s, seeds from {options.seed}")

    started = time.monotonic()
    if options.only in (None, "vae"):
        count = 16 if options.short else 200
        note("vae", measure_vae(refined.base.vae, count=count, seed=options.seed), started)
    started = time.monotonic()
    if options.only in (None, "accuracy"):
        count = 16 if options.short else 200
        note("accuracy", measure_accuracy(refined, count=count, seed=options.seed), started)
    started = time.monotonic()
    if options.only in (None, "sizes"):
        note("sizes", measure_sizes(refined, count=4 if options.short else 64, seed=options.seed), started)
    started = time.monotonic()
    if options.only in (None, "fid"):
        base = PipelineGenerator(options.demo, refine=False, **settings)
        tower = ImageTower.load((options.demo or DEMO) / "image_tower")
        count = 40 if options.short else options.pairs
        note("fid", measure_fid(base, refined, tower, count=count, seed=options.seed), started)
    if options.json:
        write_json(options.json, results, indent=2)


if __name__ == "__main__":
    main()
