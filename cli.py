"""The command line: `latentrt generate`, `plan`, `export`, `build`, `verify`, `bench`, `cache`, `backends`, `info` and
`kernels`.

The arguments are here, the bodies beside their subjects in the `commands.py` of a folder: generators of lines to
print, imported when they run, so that `latentrt --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .errors import LatentRTError

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


def _counts(text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no counts from 1 up; write such as 1,2,4")
    return tuple(dict.fromkeys(map(int, parts)))


def _shares(text: str) -> tuple[float, ...]:
    """`0.6,0.8,1` -> (0.6, 0.8, 1.0), each 0 to 1."""
    try:
        shares = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} are no shares from 0 to 1; write such as 0.6,0.8,1")
    return shares


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
    g.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="record a denoising step once and replay it (default: on a GPU, as a CUDA graph)",
    )
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
    g.set_defaults(run=("runtime", "generate"))

    p = commands.add_parser(
        "plan",
        help="what a request takes of a GPU's memory, and its least time there",
        description="From the model's own shapes: no weight is read, nothing is loaded, and no GPU is needed.",
    )
    p.add_argument(
        "model",
        metavar="MODEL",
        help="as for `latentrt generate --model`; or 'sdxl' or 'sdxl-refiner', the published configurations",
    )
    p.add_argument("--refiner", metavar="MODEL", help="the same; 'none' for none (default: as for generate)")
    p.add_argument("--size", type=_size, metavar="WxH", help="in pixels (default: the model's own)")
    p.add_argument("--batch", type=int, default=1, help="images at once (default 1)")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    p.add_argument("--variant", help="weights variant, such as fp16")
    p.add_argument("--backend", choices=("triton", "eager"), default="triton")
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--guidance", type=float, default=5.0, help="1 or less turns guidance off")
    p.add_argument("--sampler", help="override the checkpoint's")
    p.add_argument("--high-noise-frac", type=float, default=0.8, help="as for generate")
    p.add_argument("--from-image", action="store_true", help="it starts from a picture")
    p.add_argument("--gpu", default="H200", help="whose floors and kernels (default H200)")
    p.add_argument("--policy", default="resident", help="what --memory is held against (default resident)")
    p.add_argument(
        "--memory",
        metavar="SIZE",
        help="free device memory, such as 24GB; ends with 1 where it is too little",
    )
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=("runtime", "plan"))

    b = commands.add_parser("backends", help="which back ends there are, and whether they run here")
    b.add_argument("--json", action="store_true")
    b.set_defaults(run=("runtime", "backends"))

    i = commands.add_parser("info", help="read the generation parameters back from a PNG")
    i.add_argument("file", metavar="FILE.png")
    i.add_argument("--json", action="store_true")
    i.set_defaults(run=("runtime", "info"))

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
    e.set_defaults(run=("export", "build"))

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
    v.set_defaults(run=("export", "verify"))

    c = commands.add_parser("cache", help="what is kept of exports and engines")
    c.add_argument("action", choices=("list", "verify", "prune"))
    c.add_argument(
        "--max-size",
        metavar="SIZE",
        help="prune: keep this much, such as 20GB, of what was used last (default: remove only what is damaged)",
    )
    c.add_argument("--json", action="store_true")
    c.set_defaults(run=("runtime", "cache"))

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
    k.set_defaults(run=("bench", "kernels"))
    _add_bench(commands)
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
    x.set_defaults(run=("export", "export"))
    return parser


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    b = commands.add_parser(
        "bench",
        help="speed, memory and quality beside diffusers and plain ONNX Runtime",
        description="Measures each side of a case in turns, in a process of its own, and writes tables, plots and "
        "pictures. A side whose pictures are wrong has no speed. `latentrt bench list` has the cases and sides, "
        "`latentrt bench compare A.json B.json` tells what changed beyond noise.",
    )
    b.add_argument(
        "--case", action="append", default=[], help="may be repeated (default: demo, or sdxl on a GPU)"
    )
    b.add_argument(
        "--side",
        action="append",
        default=[],
        metavar="SIDE[@DTYPE]",
        help="may be repeated; the first is what the others are compared with (default: all that make sense here)",
    )
    b.add_argument("--model", metavar="MODEL", help="in place of the case's: as for generate, or sdxl-random")
    b.add_argument("--refiner", metavar="MODEL", help="the same, or sdxl-refiner-random; 'none' for none")
    b.add_argument("--size", type=_size, metavar="WxH", help="in place of the case's")
    b.add_argument("--steps", type=int, help="in place of the case's")
    b.add_argument("--batch", type=_counts, metavar="N,M,...", help="images at once, in place of the case's")
    b.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="in place of the case's")
    b.add_argument("--guidance", type=float, help="in place of the case's")
    b.add_argument("--high-noise-frac", type=float, help="in place of the case's")
    b.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    b.add_argument(
        "--rounds", type=int, default=7, help="timed calls of each side and batch size (default 7)"
    )
    b.add_argument("--pictures", type=int, default=4, help="of each side for the gate (default 4)")
    b.add_argument("--gate", default="eager", help="what a speed has to pass (default eager)")
    b.add_argument(
        "--metric", action="append", default=[], help="psnr, ssim, clip, fid (default: all there are)"
    )
    b.add_argument(
        "--clip", type=Path, metavar="DIR", help="a CLIP model for CLIP score and FID, not the demo's"
    )
    b.add_argument("--truth", type=Path, metavar="DIR", help="true pictures for FID, with --clip")
    b.add_argument("--prompts", type=Path, metavar="FILE", help="one a line")
    b.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    b.add_argument("--out", type=Path, metavar="DIR", default=Path("out/bench"), help="default out/bench")
    b.add_argument("--work", type=Path, metavar="DIR", help="keep weights, exports and compiled code here")
    b.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="FILE.json", help="show as well"
    )
    b.add_argument("--json", action="store_true", help="print the results as JSON")
    b.set_defaults(run=("bench", "bench"))
    actions = b.add_subparsers(metavar="ACTION")
    actions.add_parser("list", help="the cases, sides and gates").set_defaults(run=("bench", "bench_list"))
    c = actions.add_parser("compare", help="what changed; ends with 1 where something got worse")
    c.add_argument("before", type=Path, metavar="A.json")
    c.add_argument("after", type=Path, metavar="B.json")
    c.add_argument("--tolerance", type=float, default=0.03, help="of a speed (default 0.03)")
    c.set_defaults(run=("bench", "bench_compare"))
    m = actions.add_parser(
        "loadgen", help="MLPerf's LoadGen over a pipeline; ends with 1 where it says INVALID"
    )
    m.add_argument(
        "--scenario", action="append", default=[], help="SingleStream, Offline, Server (default: all)"
    )
    m.add_argument("--model", default="demo", metavar="MODEL", help="as for generate")
    m.add_argument("--refiner", metavar="MODEL", help="as for generate")
    m.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    m.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: by device")
    m.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    m.add_argument("--size", type=_size, metavar="WxH", help="in pixels (default: the model's own)")
    m.add_argument("--steps", type=int, default=20, help="of Euler (default 20, MLPerf's)")
    m.add_argument("--guidance", type=float, default=8.0, help="default 8, MLPerf's")
    m.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (default: the demo's world)")
    m.add_argument("--seconds", type=float, default=60.0, help="least duration of a scenario (default 60)")
    m.add_argument("--queries", type=int, default=64, help="least number of them (default 64)")
    m.add_argument("--rate", type=float, help="queries a second (default: by what is reached here)")
    m.add_argument(
        "--latency", type=float, default=20.0, help="seconds that 99 %% of Server stay under (default 20)"
    )
    m.add_argument("--batch", type=int, default=1, help="pictures made at once, at most (default 1)")
    m.add_argument("--out", type=Path, metavar="DIR", default=Path("out/loadgen"), help="for LoadGen's logs")
    m.set_defaults(run=("bench", "bench_loadgen"))
    w = actions.add_parser(
        "sweep", help="time against quality over steps and the refiner's share, on the demo"
    )
    w.add_argument("--steps", type=_counts, metavar="N,M,...", default=(8, 15, 30), help="default 8,15,30")
    w.add_argument(
        "--share", type=_shares, metavar="F,G,...", default=(0.6, 0.8, 1.0), help="default 0.6,0.8,1"
    )
    w.add_argument("--pictures", type=int, default=48, help="of each setting (default 48)")
    w.add_argument("--batch", type=int, default=8, help="pictures at once (default 8)")
    w.add_argument("--seed", type=int, default=0)
    w.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    w.add_argument("--out", type=Path, metavar="DIR", default=Path("out/sweep"), help="default out/sweep")
    w.set_defaults(run=("bench", "bench_sweep"))


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
        folder, name = args.run
        body = getattr(importlib.import_module(f".{folder}.commands", __package__), name)
        for line in body(args):
            print(line)  # noqa: T201 (unlike sys.stdout.write, it bears a stream that is closed)
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
