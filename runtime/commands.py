"""The bodies of `latentrt generate`, `plan`, `backends`, `info`, `cache`: parsed arguments in, lines to print out."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CacheError, RequestError

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["backends", "cache", "generate", "info", "load", "plan", "refiner_of"]


def _output_paths(output: str, count: int) -> list[Path]:
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise RequestError(
            f"the output is {output!r}; latentrt writes PNG, so name it {path.stem or 'image'}.png"
        )
    if path.is_dir():
        raise RequestError(f"the output {output!r} is a folder; give a file name in it")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RequestError(f"the output {output!r} cannot be written: {existing} is not a writable folder")
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k + 1}{path.suffix}") for k in range(count)]


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline that the arguments name, of those that several commands share."""
    from .pipeline import Pipeline

    return Pipeline.from_pretrained(
        args.model,
        refiner_of(args),
        backend=args.backend,
        dtype=args.dtype,
        variant=args.variant,
        device=args.device,
        graphs=args.graphs,
        memory=args.memory,
        memory_limit=args.memory_limit,
        scheduler=args.timestep_spacing and {"timestep_spacing": args.timestep_spacing},
    )


def refiner_of(args: argparse.Namespace) -> str | None:
    """The refiner that `--refiner` names: the demo has one of its own, unless another is given, or "none"."""
    if args.refiner is None:
        return "demo" if args.model == "demo" else None
    return None if args.refiner == "none" else str(args.refiner)


def generate(args: argparse.Namespace) -> Iterator[str]:
    """Make images, and print where they are and how long each stage took."""
    if not args.prompt.strip():
        raise RequestError("the prompt is empty; say what the picture should show")
    if not 1 <= args.count <= 1024:  # before a path is made for each
        raise RequestError(f"--count is {args.count}; it must be 1 to 1024")
    paths = _output_paths(args.output, args.count)
    from .image import save_png

    pipe = load(args)
    pipe.set_progress_bar_config(disable=True if args.json else None)
    options: dict[str, Any] = {} if args.guidance is None else {"guidance_scale": args.guidance}
    if args.size is not None:
        options["height"], options["width"] = args.size
    result = pipe(
        args.prompt,
        negative_prompt=args.negative,
        num_images_per_prompt=args.count,
        num_inference_steps=args.steps,
        guidance_rescale=args.guidance_rescale,
        high_noise_frac=args.high_noise_frac,
        seed=args.seed,
        sampler=args.sampler,
        tiled_vae=args.tiled_vae,
        **options,
    )
    for image, path, parameters in zip(result.images, paths, result.parameters, strict=True):
        save_png(image, path, None if args.no_metadata else parameters)
    if args.json:
        files = [{"file": str(p), **q} for p, q in zip(paths, result.parameters, strict=True)]
        yield json.dumps({"images": files, "timings": result.timings}, indent=2)
        return
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.timings.items())
    for path, parameters in zip(paths, result.parameters, strict=True):
        yield f"{path}  {parameters['size']}, seed {parameters['seed']}, {parameters['backend']}"
    yield stages


def plan(args: argparse.Namespace) -> Iterator[str]:
    """What a request takes of a GPU's memory, and its least time there."""
    import torch

    from ..kernels import roofline
    from .place import parse_bytes
    from .plan_table import lines
    from .planner import Planner

    gpu = roofline.gpu(args.gpu)
    available = parse_bytes(args.memory_limit, "--memory-limit")
    height, width = args.size or (None, None)
    found = Planner.of(
        args.model,
        refiner_of(args),
        dtype=getattr(torch, args.dtype),
        variant=args.variant,
        backend=args.backend,
        arch=gpu.arch,
    ).plan(
        height=height,
        width=width,
        batch=args.batch,
        steps=args.steps,
        guidance_scale=args.guidance,
        sampler=args.sampler,
        high_noise_frac=args.high_noise_frac,
        from_image=args.from_image,
    )
    if args.json:
        yield json.dumps(found.as_json(gpu), indent=2)
    else:
        yield from lines(found, gpu)
    if available is not None:
        found.require_fit(available, args.memory, "give a larger --memory-limit")


def backends(args: argparse.Namespace) -> Iterator[str]:
    """A line for each back end, with why it does not run here."""
    import torch

    from .engines.registry import describe

    rows = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.json:
        yield json.dumps([asdict(row) for row in rows], indent=2)
        return
    for row in rows:
        mark = "*" if row.preferred else " "
        state = row.reason if row.available else f"not here: {row.reason}; {row.remedy}"
        yield f"{mark} {row.name:<14}{state}"
    yield "* what --backend auto takes"


def info(args: argparse.Namespace) -> Iterator[str]:
    """What a PNG says it was made with."""
    from .image import read_parameters

    record = read_parameters(args.file)
    if args.json:
        yield json.dumps(record, indent=2)
        return
    width = max(len(key) for key in record)
    for key, value in record.items():
        yield f"{_visible(key):<{width}}  {_visible(str(value))}"


def cache(args: argparse.Namespace) -> Iterator[str]:
    """List, check or prune what is kept of exports and engines."""
    from .cache import Store, cache_root
    from .cache_contents import contents, prune, verify
    from .place import parse_bytes

    if args.max_size is not None and args.action != "prune":
        raise RequestError(f"--max-size is for `latentrt cache prune`, not for {args.action}")
    store = Store(cache_root())
    entries = contents(store)
    damage = verify(store) if args.action == "verify" else {}
    kept, last = entries, f"{len(entries)} entries"
    if args.action == "prune":
        removed = prune(store, parse_bytes(args.max_size, "--max-size"))
        kept, entries = [entry for entry in entries if entry not in removed], removed
        last = f"removed {len(removed)}, kept {len(kept)} entries"
    if args.json:
        yield json.dumps([{**asdict(e), "damage": damage.get(e.key, e.damage)} for e in entries], indent=2)
    else:
        for entry in entries:
            state = f"  DAMAGED: {damage[entry.key]}" if entry.key in damage else ""
            yield (
                f"{entry.bytes / 1e6:>9,.1f} MB  {entry.used[:19]:<19}  {entry.key[:12]}  {entry.summary}{state}"
            )
        yield f"{sum(entry.bytes for entry in kept) / 1e6:>9,.1f} MB  {last} in {store.root}"
    if damage:
        raise CacheError(
            f"{len(damage)} of {len(entries)} entries are damaged; they are built again when they are next needed, "
            "and `latentrt cache prune` removes them"
        )


def _visible(text: str) -> str:
    """Without control characters, which would drive the terminal: anyone may have written the file."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)
