"""The bodies of `latentrt export`, `build` and `verify`: parsed arguments in, lines to print out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..errors import BackendError

__all__ = ["build", "export", "verify"]


def export(args: argparse.Namespace) -> Iterator[str]:
    """Write components as ONNX files; what each pass left."""
    from .folder import export_model
    from .passes import DEFAULT

    exported = export_model(
        args.model,
        args.output,
        dtype=getattr(torch, args.dtype),
        components=args.component,
        passes=DEFAULT if args.passes is None else [name for name in args.passes.split(",") if name],
        split=args.split,
        variant=args.variant,
    )
    if args.json:
        yield json.dumps([made.to_json() for made in exported], indent=2)
        return
    for made in exported:
        yield made.to_text()


def build(args: argparse.Namespace) -> Iterator[str]:
    """Build engines, or find them; what they took, and the verdict where they run here."""
    from ..runtime.engine_store import EngineTarget
    from ..runtime.engines.plugins import parse_plugins, versions
    from .engines import build_engines, target_archs

    target = EngineTarget(
        args.engine,
        target_archs(args.engine, args.arch),
        weight_streaming=args.weight_streaming,
        hardware_compatibility=args.hardware_compatibility,
        plugins=versions(parse_plugins(args.plugins)),
    )
    rows = build_engines(
        args.model,
        target,
        dtype=getattr(torch, args.dtype),
        sizes=args.sizes,
        batch=args.batch,
        components=args.component,
        variant=args.variant,
        split=args.split,
        rebuild="always" if args.rebuild else "auto",
    )
    if args.json:
        built = list(rows)
        yield json.dumps([row.to_json() for row in built], indent=2)
        _require_passed(args.engine, {row.component: row.failures for row in built})
        return
    failures = {}
    for row in rows:
        how = "built" if row.engine.built else "found"
        size = row.engine.figures["engine_bytes"] / 1e6
        yield (
            f"{row.component:<16}{row.dtype:<9} {how} in {row.seconds:.1f} s, {size:,.0f} MB  {row.engine.key[:12]}"
        )
        for profile in row.engine.profiles:
            yield f"{'':16}{profile}"
        if row.judged is not None:
            yield f"{'':16}{row.judged}"
        failures[row.component] = row.failures
    _require_passed(args.engine, failures)


def verify(args: argparse.Namespace) -> Iterator[str]:
    """Compare a back end with PyTorch; a line for each part."""
    from ..runtime.commands import refiner_of
    from ..runtime.parts import dtype_for
    from ..runtime.place import parse_device
    from .verify import verify_model

    device = parse_device(args.device)
    rows = verify_model(
        args.model,
        refiner_of(args),
        args.backend,
        device=device,
        dtype=dtype_for(device, args.dtype),
        components=args.component,
        variant=args.variant,
        size=args.size,
        batch=args.batch,
    )
    if args.json:
        found = list(rows)
        yield json.dumps([row.to_json() for row in found], indent=2)
    else:
        found = []
        for row in rows:
            yield str(row)
            found.append(row)
    _require_passed(found[0].backend, {verdict.part: verdict.failures for verdict in found})


def _require_passed(backend: str, failures: Mapping[str, Sequence[str]]) -> None:
    """What speaks against it, by part."""
    failed = [f"{part}: {', '.join(found)}" for part, found in failures.items() if found]
    if failed:
        raise BackendError(
            f"{backend} computes something else than PyTorch; {'; '.join(failed)}; use another back end or dtype"
        )
