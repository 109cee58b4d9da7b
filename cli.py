"""The command line: `latentrt generate`, `export`, `build`, `verify`, `cache`, `backends`, `info`, `kernels`.

Each command imports what it needs when it runs, so that `latentrt --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import BackendError, CacheError, LatentRTError, RequestError

if TYPE_CHECKING:
    from .export.verify import Verdict

__all__ = ["main"]


def _size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` -> (height, width)."""
    width, found, height = text.lower().partition("x")
    if not found or not width.isdecimal() or not height.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, such as 1024x1024")
    return int(height), int(width)


def _arch(text: str) -> int:
    """`sm_90` -> 90."""
    digits = text.lower().removeprefix("sm_")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an architecture; write sm_90 or the like")
    return int(digits)


def _archs(text: str) -> tuple[int, ...]:
    """`sm_89,sm_120` -> (89, 120)."""
    return tuple(sorted({_arch(part.strip()) for part in text.split(",")}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latentrt", description="An inference runtime for Stable Diffusion XL."
    )
    parser.add_argument("--version", action="version", version=f"latentrt {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say what is chosen, exported and loaded"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    g = commands.add_parser("generate", help="make images from a prompt")
    g.add_argument("prompt", metavar="PROMPT")
    g.add_argument(
        "-o", "--output", metavar="FILE", default="image.png", help="PNG to write (default image.png)"
    )
    g.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help="'demo' (shipped), a diffusers folder, a .safetensors file or a hub id",
    )
    g.add_argument(
        "--refiner",
        metavar="MODEL",
        help="refiner for the last steps; 'none' for none (default: the demo's own for the demo, else none)",
    )
    g.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    g.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: by device")
    g.add_argument("--variant", help="weights variant, such as fp16")
    g.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    g.add_argument("--sampler", help="override the checkpoint's, such as euler or dpm++2m-karras")
    g.add_argument("--steps", type=int, default=30)
    g.add_argument("--seed", type=int, help="of the first image; the next ones count up (default: random)")
    g.add_argument("--guidance", type=float, help="guidance scale; 1 or less turns guidance off")
    g.add_argument("--guidance-rescale", type=float, default=0.0)
    g.add_argument("--negative", metavar="PROMPT", help="what to steer away from")
    g.add_argument("--size", type=_size, metavar="WxH", help="in pixels (default: the model's own)")
    g.add_argument(
        "--count", type=int, default=1, help="images to make; FILE-1.png, FILE-2.png ... when several"
    )
    g.add_argument(
        "--high-noise-frac",
        type=float,
        default=0.8,
        help="share of the schedule the base denoises before a refiner",
    )
    g.add_argument("--no-metadata", action="store_true", help="do not write the parameters into the PNG")
    g.add_argument("--json", action="store_true", help="print what was made as JSON, and no progress")
    g.set_defaults(run=_generate)

    b = commands.add_parser("backends", help="which back ends there are, and whether they run here")
    b.add_argument("--json", action="store_true")
    b.set_defaults(run=_backends)

    i = commands.add_parser("info", help="read the generation parameters back from a PNG")
    i.add_argument("file", metavar="FILE.png")
    i.add_argument("--json", action="store_true")
    i.set_defaults(run=_info)

    e = commands.add_parser(
        "build",
        help="compile a model's components to TensorRT engines",
        description="Exports each component where that was not done yet and compiles it. tensorrt-rtx builds for named "
        "architectures without a GPU; tensorrt builds for the GPU it runs on. Engines that are in the cache already "
        "are found, not built.",
    )
    e.add_argument("model", metavar="MODEL", help="as for `latentrt generate --model`")
    e.add_argument("--engine", choices=("tensorrt", "tensorrt-rtx"), required=True)
    e.add_argument("--arch", type=_archs, metavar="sm_NN,...", help="default: this machine's GPU")
    e.add_argument(
        "--sizes",
        action="append",
        default=[],
        metavar="SIZES",
        help="WxH, or such as '512..1280 step 64'; may be repeated (default: half to 5/4 of the model's own)",
    )
    e.add_argument("--batch", default="1..4", metavar="N..M", help="images at once (default 1..4)")
    e.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    e.add_argument("--variant", help="weights variant, such as fp16")
    e.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    e.add_argument("--weight-streaming", action="store_true", help="weights may stay in host memory")
    e.add_argument(
        "--hardware-compatibility", choices=("none", "same-capability", "ampere-plus"), default="none"
    )
    e.add_argument(
        "--plugins",
        default="none",
        metavar="NAME,...",
        help="operators that plugins made of the Triton kernels take: all, none, or of GroupNorm, GroupNormSilu, "
        "ShiftGroupNormSilu, DotProductAttention (default none)",
    )
    e.add_argument("--rebuild", action="store_true", help="build anew what is in the cache")
    e.add_argument("--json", action="store_true", help="print what was built as JSON")
    e.set_defaults(run=_build)

    v = commands.add_parser(
        "verify",
        help="compare a back end with eager PyTorch in float32, part by part",
        description="Runs every component, and then whole pictures, on both sides with the same inputs, and holds "
        "relative error, PSNR and SSIM against limits. Ends with 1 where a part fails.",
    )
    v.add_argument("model", metavar="MODEL", help="as for `latentrt generate --model`")
    v.add_argument(
        "--refiner", metavar="MODEL", help="as well, and in the pictures; 'demo' for the demo's own"
    )
    v.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    v.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: by device")
    v.add_argument("--variant", help="weights variant, such as fp16")
    v.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    v.add_argument("--size", type=_size, metavar="WxH", help="in pixels (default: the model's own)")
    v.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    v.add_argument("--json", action="store_true", help="print what was found as JSON")
    v.set_defaults(run=_verify)

    c = commands.add_parser("cache", help="what is kept of exports and engines")
    c.add_argument("action", choices=("list", "verify", "prune"))
    c.add_argument(
        "--max-size",
        metavar="SIZE",
        help="prune: keep this much, such as 20GB, of what was used last (default: remove only what is damaged)",
    )
    c.add_argument("--json", action="store_true")
    c.set_defaults(run=_cache)

    k = commands.add_parser(
        "kernels",
        help="what the Triton kernels compile to, and the least time their work takes",
        description="Compiles each kernel at SDXL's shapes for an architecture, which needs no GPU, and puts the "
        "roofline of a named GPU beside it. --measure and --tune need a GPU, and go on where they stopped when run "
        "again.",
    )
    k.add_argument("--arch", type=_arch, metavar="sm_NN", help="default: the architecture of --gpu")
    k.add_argument("--gpu", default="H200", help="whose roofline (default H200)")
    k.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    k.add_argument(
        "--op", action="append", default=[], metavar="OP", help="only this operator; may be repeated"
    )
    k.add_argument("--json", action="store_true")
    k.add_argument("--measure", action="store_true", help="time them here, beside PyTorch's own")
    k.add_argument("--tune", action="store_true", help="find this GPU's block sizes and write them down")
    k.add_argument("--seconds", type=float, default=400.0, help="begin nothing new after (default 400)")
    k.add_argument("--out", type=Path, metavar="FOLDER", help="for the results (default bench/results)")
    k.add_argument(
        "--dry-run", action="store_true", help="only compile what --measure or --tune would run; needs no GPU"
    )
    k.set_defaults(run=_kernels)
    x = commands.add_parser(
        "export",
        help="write a model's components as ONNX files",
        description="Writes DIR/COMPONENT/model.onnx with its weights beside it, checked against PyTorch, and shows "
        "what each pass did to it.",
    )
    x.add_argument("model", metavar="MODEL", help="as for generate; 'demo-refiner' is the demo's refiner")
    x.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    x.add_argument("--component", action="append", default=[], help="only this one; may be repeated")
    x.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    x.add_argument("--passes", metavar="A,B", help="in place of the usual ones, in this order; '' for none")
    x.add_argument(
        "--split", action="store_true", help="the UNet in three: per prompt, per timestep and per step"
    )
    x.add_argument("--variant", help="weights variant, such as fp16")
    x.add_argument("--json", action="store_true")
    x.set_defaults(run=_export)
    return parser


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
        raise RequestError(
            f"the output {output!r} cannot be written: {existing} is no folder that can be written to"
        )
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k + 1}{path.suffix}") for k in range(count)]


def _generate(args: argparse.Namespace) -> None:
    if not args.prompt.strip():
        raise RequestError("the prompt is empty; say what the picture should show")
    if not 1 <= args.count <= 1024:  # before a path is made for each
        raise RequestError(f"--count is {args.count}; it must be 1 to 1024")
    paths = _output_paths(args.output, args.count)
    refiner = args.refiner
    if refiner is None and args.model == "demo":
        refiner = "demo"

    from .runtime.image import save_png
    from .runtime.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(
        args.model,
        None if refiner == "none" else refiner,
        backend=args.backend,
        dtype=args.dtype,
        variant=args.variant,
        device=args.device,
    )
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
        **options,
    )
    for image, path, parameters in zip(result.images, paths, result.parameters, strict=True):
        save_png(image, path, None if args.no_metadata else parameters)
    if args.json:
        files = [{"file": str(p), **q} for p, q in zip(paths, result.parameters, strict=True)]
        _write(json.dumps({"images": files, "timings": result.timings}, indent=2))
        return
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.timings.items())
    for path, parameters in zip(paths, result.parameters, strict=True):
        _write(f"{path}  {parameters['size']}, seed {parameters['seed']}, {parameters['backend']}")
    _write(stages)


def _backends(args: argparse.Namespace) -> None:
    import torch

    from .runtime.engines.registry import describe

    rows = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.json:
        _write(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        mark = "*" if row.preferred else " "
        state = row.reason if row.available else f"not here: {row.reason}; {row.remedy}"
        _write(f"{mark} {row.name:<14}{state}")
    _write("* what --backend auto takes")


def _info(args: argparse.Namespace) -> None:
    from .runtime.image import read_parameters

    record = read_parameters(args.file)
    if args.json:
        _write(json.dumps(record, indent=2))
        return
    width = max(len(key) for key in record)
    for key, value in record.items():
        _write(f"{_visible(key):<{width}}  {_visible(str(value))}")


def _build(args: argparse.Namespace) -> None:
    import torch

    from .export.engines import build_engines, local_archs
    from .runtime.engine_store import EngineTarget
    from .runtime.engines.plugins import chosen, versions

    target = EngineTarget(
        args.engine,
        args.arch or local_archs(args.engine),
        weight_streaming=args.weight_streaming,
        hardware_compatibility=args.hardware_compatibility,
        plugins=versions(chosen(args.plugins)),
    )
    rows = build_engines(
        args.model,
        target,
        dtype=getattr(torch, args.dtype),
        sizes=args.sizes,
        batch=args.batch,
        components=args.component,
        variant=args.variant,
        rebuild="always" if args.rebuild else "auto",
    )
    if args.json:
        built = list(rows)
        _write(json.dumps([row.to_json() for row in built], indent=2))
        _require_passed([row.verdict for row in built if row.verdict is not None])
        return
    verdicts = []
    for row in rows:
        how = "built" if row.engine.built else "found"
        size = row.engine.figures["engine_bytes"] / 1e6
        _write(
            f"{row.component:<16}{row.dtype:<9} {how} in {row.seconds:.1f} s, {size:,.0f} MB  {row.engine.key[:12]}"
        )
        for profile in row.engine.profiles:
            _write(f"{'':16}{profile}")
        if row.verdict is not None:
            _write(f"{'':16}{row.verdict}")
            verdicts.append(row.verdict)
    _require_passed(verdicts)


def _verify(args: argparse.Namespace) -> None:
    import torch

    from .export.verify import verify_model

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = verify_model(
        args.model,
        args.refiner,
        args.backend,
        device=device,
        dtype=getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "float16")),
        components=args.component,
        variant=args.variant,
        size=args.size,
    )
    if args.json:
        found = list(rows)
        _write(json.dumps([row.to_json() for row in found], indent=2))
    else:
        found = []
        for row in rows:
            _write(str(row))
            found.append(row)
    _require_passed(found)


def _require_passed(verdicts: Sequence[Verdict]) -> None:
    failed = [f"{v.part}: {', '.join(v.failures)}" for v in verdicts if v.failures]
    if failed:
        raise BackendError(
            f"{verdicts[0].backend} computes something else than PyTorch; {'; '.join(failed)}; use another back end or "
            "dtype"
        )


def _cache(args: argparse.Namespace) -> None:
    from .runtime.cache import Store, cache_root
    from .runtime.cache_contents import contents, parse_bytes, prune, verify

    if args.max_size is not None and args.action != "prune":
        raise RequestError(f"--max-size is for `latentrt cache prune`, not for {args.action}")
    store = Store(cache_root())
    entries = contents(store)
    damage = verify(store) if args.action == "verify" else {}
    kept, last = entries, f"{len(entries)} entries"
    if args.action == "prune":
        removed = prune(store, None if args.max_size is None else parse_bytes(args.max_size))
        kept, entries = [entry for entry in entries if entry not in removed], removed
        last = f"removed {len(removed)}, kept {len(kept)} entries"
    if args.json:
        _write(json.dumps([{**asdict(e), "damage": damage.get(e.key)} for e in entries], indent=2))
    else:
        for entry in entries:
            state = f"  DAMAGED: {damage[entry.key]}" if entry.key in damage else ""
            _write(
                f"{entry.bytes / 1e6:>9,.1f} MB  {entry.used[:19]:<19}  {entry.key[:12]}  {entry.summary}{state}"
            )
        _write(f"{sum(entry.bytes for entry in kept) / 1e6:>9,.1f} MB  {last} in {store.root}")
    if damage:
        raise CacheError(
            f"{len(damage)} of {len(entries)} entries are damaged; they are built again when they are next needed, "
            "and `latentrt cache prune` removes them"
        )


def _visible(text: str) -> str:
    """Without control characters, which would drive the terminal: anyone may have written the file."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


def _kernels(args: argparse.Namespace) -> None:
    import torch

    from .kernels import aot, roofline
    from .kernels.registry import specs

    unknown = set(args.op) - {spec.name for spec in specs()}
    if unknown:
        names = ", ".join(spec.name for spec in specs())
        raise RequestError(f"no operator is called {', '.join(sorted(unknown))}; there are {names}")
    if args.measure or args.tune:
        _kernels_on_gpu(args)
        return

    gpu = roofline.gpu(args.gpu)
    arch, dtype = args.arch or gpu.arch, getattr(torch, args.dtype)
    cases = [(spec, case) for spec in specs(args.op) for case in spec.cases]
    requests = [aot.Request(s.name, c.inputs(dtype, torch.device("meta")), arch) for s, c in cases]
    rows = []
    for (spec, case), built in zip(cases, aot.reports(requests), strict=True):
        floor = {"floor_us": roofline.floor_us(case, dtype, gpu), "gpu": gpu.name, "ceilings": gpu.source}
        work = {"flops": case.flops, "bytes": case.elements * dtype.itemsize, "calls": case.calls}
        kernels = [asdict(report) for report in built]
        rows.append({"op": spec.name, "case": case.name, **work, **floor, "kernels": kernels})
    if args.json:
        _write(json.dumps({"arch": arch, "dtype": args.dtype, "rows": rows}, indent=2))
        return
    _write(f"sm_{arch}, {args.dtype}; floors of {gpu.name} by {gpu.source} ceilings")
    _write(f"{'':44}{'GFLOP':>9}{'MB':>9}{'floor us':>10}{'regs':>6}{'spill':>6}{'smem':>8}  tensor cores")
    for row in rows:
        figures = f"{row['flops'] / 1e9:>9.2f}{row['bytes'] / 1e6:>9.1f}{row['floor_us']:>10.1f}"
        _write(f"{row['op'] + ', ' + row['case']:<44}{figures}")
        for k in row["kernels"]:
            cores = ", ".join(f"{count} {name}" for name, count in k["tensor_core"].items())
            code = f"{k['registers']:>6}{k['spills']:>6}{k['shared'] / 1024:>6.0f} K  {cores}"
            _write(f"    {k['kernel']:<68}{code}".rstrip())


def _export(args: argparse.Namespace) -> None:
    import torch

    from .export.command import export_model
    from .export.passes import DEFAULT

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
        _write(json.dumps([made.to_json() for made in exported], indent=2))
        return
    for made in exported:
        _write(made.to_text())


def _kernels_on_gpu(args: argparse.Namespace) -> None:
    from .bench import kernel_timing as timing
    from .bench import kernel_tuning
    from .bench import kernels as bench
    from .kernels import roofline
    from .kernels.registry import specs

    if args.dry_run:
        work = kernel_tuning.tuned_requests if args.tune else bench.measured_requests
        found = bench.dry_run(work(specs(args.op), args.arch or roofline.gpu(args.gpu).arch), args.seconds)
        _write(json.dumps(found, indent=2))
        return
    here = timing.Bench(
        timing.require_gpu(), timing.cuda_microseconds, args.seconds, args.out or timing.RESULTS
    )
    result = (kernel_tuning.tune if args.tune else bench.measure)(here, specs(args.op))
    lines = (kernel_tuning.lines if args.tune else bench.lines)(result)
    _write(json.dumps(result, indent=2) if args.json else "\n".join(lines))


def _write(text: str) -> None:
    print(text)  # noqa: T201 (unlike sys.stdout.write, it bears a stream that is closed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 1 after an error told in one line, 2 for unusable arguments, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a prompt may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    logging.basicConfig(format="latentrt: %(message)s")
    logging.getLogger("latentrt").setLevel(logging.INFO if args.verbose else logging.WARNING)
    # A first run exports for a minute; that is said without being asked for.
    logging.getLogger("latentrt.runtime.prepare").setLevel(logging.INFO)
    try:
        args.run(args)
    except LatentRTError as error:
        sys.stderr.write(f"latentrt: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(
            f"latentrt: {error.strerror or error}: {error.filename or ''}\n".rstrip(": \n") + "\n"
        )
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("latentrt: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
