"""Exports every component of SDXL's base and refiner and of SD 1.5 and 2.1 at full size to ONNX, and builds them with
TensorRT for RTX.

    python -m latentrt.bench.full_size_engines [sdxl_base sdxl_refiner sd15 sd21] [--component unet] [--again]
                                               [--out FILE.json]

Needs no GPU: engines are for sm_89, images from half to 5/4 of the model's own size (SDXL: 512 to 1280 pixels, 64 to
160 latents a side) and batches of up to 8 rows (4 images with guidance). Weights are float16 and random from a fixed
seed. SDXL base's VAE stays in float32, as its configuration says. The others' are in float16: the refiner gets the
configuration of VAEs that were fixed for float16, and SD's do not overflow.

Each step is a process of its own, so that its memory can be measured and is freed. Besides that everything builds, it
is checked that the base UNet's export and build stay within limits of time and memory, and that a second build finds
the first one within 5 s.

Components are processed one by one, and files of one are removed before the next: the disk holds one checkpoint, and
the model and engine of one component. Every row is saved as soon as it is measured. Run again, the script continues
with rows that are missing, or that were measured at another commit or with other versions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CacheError, LatentRTError
from ..export.build_process import build_bytes
from ..kernels.atomic_file import write_json
from ..runtime.cache import Store
from ..runtime.engine_store import EngineTarget
from ..runtime.engines.base import Component
from ..runtime.engines.sizes import SizePolicy
from ..runtime.engines.split import in_parts
from ..runtime.engines.tensorrt import TensorRTRTXBackend
from ..runtime.host_memory import available_bytes, peak_bytes
from ..runtime.loading import load_components
from ..runtime.models.unet_parts import PARTS
from ..runtime.place import dtype_name
from ..runtime.prepare import find_or_build_engine, find_or_export_onnx
from ..runtime.weights import open_checkpoint
from .machine import ROOT, describe_machine, module_command
from .random_checkpoint import PUBLISHED, component_bytes, write_checkpoint

__all__ = ["Limits", "Row", "disk_needed", "exceeded_limits", "main", "measure"]

_TARGET = EngineTarget("tensorrt-rtx", (89,))
_BATCH = "1..4"
_DISK_PER_WEIGHT_BYTE = 2.1
"""An exported model and its engine together."""
_FOUND_SECONDS = 5.0


@dataclass(frozen=True)
class Limits:
    """The most that a component may take, in seconds and bytes."""

    export_seconds: float
    export_bytes: float
    build_seconds: float
    build_bytes: float


LIMITS = {("sdxl_base", "unet"): Limits(240, 8e9, 150, 20e9)}
CHANGES = {model: {"vae": {"force_upcast": False}} for model in ("sdxl_refiner", "sd15", "sd21")}


@dataclass(frozen=True)
class Row:
    """The figures of one component.

    Attributes:
        model, component, dtype: which one.
        sizes: the input sizes of the engine.
        weight_bytes: of the exported model's weights.
        export_seconds: from reading the weights to the end of the check against PyTorch.
        export_bytes: peak memory of the exporting process, mapped files included.
        relative_error: the export's largest error, on ONNX Runtime compared with PyTorch.
        build_seconds: of the whole building process.
        build_bytes: its peak memory.
        engine_bytes: size of the engine.
        layers: of the parsed network.
        found_seconds: for a new process to find the built engine, not counting its imports.
        machine: what it was measured on.
    """

    model: str
    component: str
    dtype: str
    sizes: str
    weight_bytes: int
    export_seconds: float
    export_bytes: int | None
    relative_error: float
    build_seconds: float
    build_bytes: int | None
    engine_bytes: int
    layers: int
    found_seconds: float
    machine: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.component


def exceeded_limits(row: Row) -> list[str]:
    """Which limits a row exceeds, in words."""
    checks = [("finding its engine again", row.found_seconds, _FOUND_SECONDS, "s", 1.0)]
    limits = LIMITS.get(row.key)
    if limits is not None:
        checks += [
            ("export", row.export_seconds, limits.export_seconds, "s", 1.0),
            ("export", row.export_bytes or 0, limits.export_bytes, "GB", 1e9),
            ("build", row.build_seconds, limits.build_seconds, "s", 1.0),
            ("build", row.build_bytes or 0, limits.build_bytes, "GB", 1e9),
        ]
    return [
        f"{row.model} {row.component}: {what} took {value / unit:.1f} {name}, the limit is {limit / unit:.0f} {name}"
        for what, value, limit, name, unit in checks
        if value > limit
    ]


def disk_needed(weights: Mapping[str, int]) -> int:
    """About how many bytes of disk space measuring a checkpoint takes at most.

    Args:
        weights: component -> bytes of its weights.
    """
    return int(sum(weights.values()) + _DISK_PER_WEIGHT_BYTE * max(weights.values()))


def measure(model: str, checkpoint: Path, name: str, cache_dir: Path, sizes: Sequence[str]) -> dict[str, Any]:
    """Export a component, build it, and build it again, which has to find the first build. Removes both at the end.

    Args:
        model: for messages.
        checkpoint: a diffusers folder.
        name: of the component.
        cache_dir: for the exported model and the engine, and for digests of the weights, which stay.
        sizes: as `SizePolicy.parse` takes them; if empty, sizes around the model's own.

    Returns:
        The measured fields of a row.

    Raises:
        LatentRTError: a step failed, or the second build did not find the first.
        BrokenProcessPool: a step was killed, for example when memory ran out.
    """
    component = (checkpoint, name, cache_dir)
    entries = Store(cache_dir).entries
    # An earlier run may have been killed.
    shutil.rmtree(entries, ignore_errors=True)
    try:
        print(f"{model} {name}: exporting", flush=True)
        exported = _in_new_process(_export, *component)
        print(f"{model} {name}: exported in {exported['export_seconds']:.0f} s; building", flush=True)
        first_build = _in_new_process(_build, *component, tuple(sizes))
        second_build = _in_new_process(_build, *component, tuple(sizes))
    finally:
        shutil.rmtree(entries, ignore_errors=True)
    if second_build["built"]:
        raise CacheError(f"{model} {name} was built twice: the second build should find the first")
    figures = first_build["figures"]
    return {
        **exported,
        "sizes": first_build["sizes"],
        "build_seconds": figures["seconds"],
        "build_bytes": figures["peak_memory_bytes"],
        "engine_bytes": figures["engine_bytes"],
        "layers": figures["layers"],
        "found_seconds": second_build["seconds"],
    }


# --- steps, each in a process of its own


def _in_new_process(step: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step, *args).result()


def _component(checkpoint: Path, name: str, cache_dir: Path) -> Component:
    half, upcast = torch.float16, TensorRTRTXBackend.upcast
    components = load_components(open_checkpoint(checkpoint, cache_dir=cache_dir), half, upcast=upcast)
    whole, _, part = name.partition(".")
    return next(c for c in in_parts(components[whole]) if c.name == name) if part else components[whole]


def _export(checkpoint: Path, name: str, cache_dir: Path) -> dict[str, Any]:
    component = _component(checkpoint, name, cache_dir)
    started = time.perf_counter()
    model = find_or_export_onnx(component, cache_dir=cache_dir)
    seconds = time.perf_counter() - started
    manifest = json.loads((model.parent / "manifest.json").read_text("utf-8"))
    errors = manifest["figures"]["relative_error"]
    return {
        "dtype": dtype_name(component.dtype),
        "export_seconds": seconds,
        "export_bytes": peak_bytes(),
        "weight_bytes": model.with_name(f"{model.name}.data").stat().st_size,
        "relative_error": max(error for case in errors.values() for error in case.values()),
    }


def _build(checkpoint: Path, name: str, cache_dir: Path, sizes: Sequence[str]) -> dict[str, Any]:
    started = time.perf_counter()
    component = _component(checkpoint, name, cache_dir)
    policy = SizePolicy.parse(sizes, _BATCH) if sizes else None
    built = find_or_build_engine(
        component, _TARGET, policy or SizePolicy.around(component), cache_dir=cache_dir
    )
    return {
        "built": built.built,
        "seconds": time.perf_counter() - started,
        "figures": dict(built.figures),
        "sizes": "; ".join(str(profile) for profile in built.profiles),
    }


# --- the command line


def _table(rows: Sequence[Row]) -> str:
    head = f"{'':<32}{'weights':>9}   {'export':^17}   {'build':^17}{'engine':>10}{'layers':>9}{'found':>9}"
    lines = [head]
    for row in rows:
        export = f"{row.export_seconds:>6.0f} s {_gb(row.export_bytes):>8}"
        build = f"{row.build_seconds:>6.0f} s {_gb(row.build_bytes):>8}"
        lines.append(
            f"{f'{row.model} {row.component} {row.dtype}':<38}{_gb(row.weight_bytes):>9}   {export}   {build}"
            f"{_gb(row.engine_bytes):>10}{row.layers:>9,}{row.found_seconds:>7.1f} s"
        )
    return "\n".join(lines)


def _gb(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.2f} GB"


def _components(configs: Path) -> list[str]:
    """Names of the components of a checkpoint with these configurations."""
    parts = {"vae": ["vae_decoder", "vae_encoder"]}
    return [part for name in component_bytes(configs) for part in parts.get(name, [name])]


def _read(out: Path) -> dict[tuple[str, str], Row]:
    """The rows of earlier runs."""
    if not out.is_file():
        return {}
    rows = [Row(**row) for row in json.loads(out.read_text("utf-8"))["rows"]]
    return {row.key: row for row in rows}


def _write(out: Path, rows: Sequence[Row], command: str) -> None:
    report = {
        "schema": 1,
        "benchmark": "full-size engines, without a GPU",
        "command": command,
        "arch": [f"sm_{arch}" for arch in _TARGET.archs],
        "rows": [asdict(row) for row in rows],
    }
    write_json(out, report, indent=2)


def _shortage(configs: Path, folder: Path) -> str | None:
    """Print how much disk and memory a checkpoint takes. Returns what is missing, in words, or None."""
    weights = component_bytes(configs)
    disk, free_disk = disk_needed(weights), shutil.disk_usage(folder).free
    memory, free_memory = build_bytes(max(weights.values())), available_bytes()
    known = "unknown" if free_memory is None else f"{free_memory / 1e9:.1f} GB"
    print(
        f"{configs.name}: takes about {disk / 1e9:.1f} GB of the disk at {folder} ({free_disk / 1e9:.1f} GB free) and "
        f"{memory / 1e9:.1f} GB of memory ({known} available)",
        flush=True,
    )
    if disk > free_disk:
        return f"the disk is too small for {configs.name}; name another folder with --folder"
    if free_memory is not None and memory > free_memory:
        return f"memory is too small for {configs.name}; end other programs"
    return None


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 if a check fails, or the machine is too small."""
    parser = argparse.ArgumentParser(
        description="Full-size checkpoints exported, and built by TensorRT for RTX."
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=Path,
        default=[Path(name) for name in ("sdxl_base", "sdxl_refiner", "sd15", "sd21")],
        help="of sdxl_base, sdxl_refiner, sd15, sd21 (all by default), or diffusers folders of which the "
        "configurations are read",
    )
    parser.add_argument("--component", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--size", action="append", default=[], help="as `latentrt build --sizes` takes it")
    parser.add_argument("--split", action="store_true", help="a UNet as its parts")
    parser.add_argument("--again", action="store_true", help="measure what was measured here before, too")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, for another run")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "full_size", help="for all files")
    parser.add_argument("--out", type=Path, default=Path("out/full_size_engines.json"))
    args = parser.parse_args(argv)
    command = module_command("latentrt.bench.full_size_engines", argv)
    machine, rows = describe_machine(), _read(args.out)
    args.folder.mkdir(parents=True, exist_ok=True)
    requested: list[tuple[str, str]] = []
    problems: list[str] = []

    for given in args.models:
        configs = PUBLISHED / given if (PUBLISHED / given).is_dir() else given
        model = configs.name
        names = [name for name in _components(configs) if not args.component or name in args.component]
        if args.split and "unet" in names:
            at = names.index("unet")
            names[at : at + 1] = [f"unet.{part}" for part in PARTS]
        requested += [(model, name) for name in names]
        measured_before = {
            name for name in names if (model, name) in rows and rows[model, name].machine == machine
        }
        todo = names if args.again else [name for name in names if name not in measured_before]
        if not todo:
            continue
        if shortage := _shortage(configs, args.folder):
            print(shortage)
            return 1
        print(f"{model}: writing random weights, or taking those that are there", flush=True)
        checkpoint = write_checkpoint(args.folder / model, configs, CHANGES.get(model))
        cache_dir = args.folder / "cache"
        for name in todo:
            try:
                measured = measure(model, checkpoint, name, cache_dir, args.size)
            except (LatentRTError, BrokenProcessPool) as error:  # the other components may still work
                problems.append(f"{model} {name}: {error}")
                print(problems[-1], flush=True)
                continue
            row = rows[model, name] = Row(model=model, component=name, machine=machine, **measured)
            _write(args.out, list(rows.values()), command)
            print(_table([row]), flush=True)
        shutil.rmtree(cache_dir, ignore_errors=True)
        if not args.keep and not problems:
            shutil.rmtree(checkpoint)
    done = [rows[key] for key in requested if key in rows]
    print(_table(done))
    problems += [problem for row in done for problem in exceeded_limits(row)]
    print("\n".join(problems) if problems else f"within the limits; {args.out}")
    return int(bool(problems) or not done)


if __name__ == "__main__":
    sys.exit(main())
