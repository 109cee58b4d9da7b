"""Command line arguments of `latentrt kernels` and `latentrt bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.arguments import DTYPES, Commands, arch, size

__all__ = ["add_commands"]


def counts(text: str) -> tuple[int, ...]:
    """`1,4,2` -> (1, 2, 4)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no counts from 1 up; write such as 1,2,4")
    return tuple(sorted(set(map(int, parts))))


def shares(text: str) -> tuple[float, ...]:
    """`0.6,0.8,1` -> (0.6, 0.8, 1.0), each 0 to 1."""
    try:
        shares = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} are no shares from 0 to 1; write such as 0.6,0.8,1")
    return shares


def add_commands(commands: Commands) -> None:
    """Add both commands to the command line's parser."""
    _add_kernels(commands)
    _add_bench(commands)


def _add_kernels(commands: Commands) -> None:
    parser = commands.add_parser(
        "kernels",
        help="what the Triton kernels compile to, and the least time their work takes",
        description="Compiles each kernel at SDXL's shapes for an architecture, which needs no GPU, and puts the "
        "roofline of a named GPU beside it. --measure and --tune need a GPU, and go on where they stopped when run "
        "again.",
    )
    parser.add_argument("--arch", type=arch, metavar="sm_NN", help="default: the architecture of --gpu")
    parser.add_argument("--gpu", default="H200", help="whose roofline (default H200)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16"),
        help="default bfloat16, with --measure both; --tune finds what serves both, by bfloat16",
    )
    parser.add_argument(
        "--op", action="append", default=[], metavar="OP", help="only this operator; may be repeated"
    )
    parser.add_argument("--json", action="store_true")
    on_a_gpu = parser.add_mutually_exclusive_group()
    on_a_gpu.add_argument("--measure", action="store_true", help="time them here, beside PyTorch's own")
    on_a_gpu.add_argument(
        "--tune", action="store_true", help="find this GPU's block sizes and write them down"
    )
    parser.add_argument("--seconds", type=float, default=400.0, help="start nothing new after (default 400)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path("out/kernels"),
        help="for the results (default out/kernels)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only compile what --measure or --tune would run; needs no GPU"
    )
    parser.set_defaults(run=("bench", "kernels"))


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed, memory and quality beside diffusers and plain ONNX Runtime",
        description="Measures each side of a case in turns, in a process of its own, and writes tables, plots and "
        "pictures. A side whose pictures are wrong has no speed. `latentrt bench list` has the cases and sides, "
        "`latentrt bench compare A.json B.json` tells what changed beyond noise.",
    )
    parser.add_argument(
        "--case", action="append", default=[], help="may be repeated (default: demo, or sdxl on a GPU)"
    )
    parser.add_argument(
        "--side",
        action="append",
        default=[],
        metavar="SIDE[@DTYPE]",
        help="may be repeated; the first is what the others are compared with (default: all that make sense here)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="in place of the case's, whose refiner is dropped: as for generate, or sdxl-random",
    )
    parser.add_argument(
        "--refiner", metavar="MODEL", help="the same, or sdxl-refiner-random; 'none' for none"
    )
    parser.add_argument("--size", type=size, metavar="WxH", help="in place of the case's")
    parser.add_argument("--steps", type=int, help="in place of the case's")
    parser.add_argument("--batch", type=counts, metavar="N,M,...", help="batch sizes, in place of the case's")
    parser.add_argument("--dtype", choices=DTYPES, help="in place of the case's")
    parser.add_argument("--guidance", type=float, help="in place of the case's")
    parser.add_argument("--high-noise-frac", type=float, help="in place of the case's")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--rounds", type=int, default=9, help="timed calls of each side and batch size (default 9)"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=4,
        help="compared with the reference's (default 4); FID by --inception needs 2049",
    )
    parser.add_argument("--gate", default="eager", help="what a speed has to pass (default eager)")
    parser.add_argument(
        "--metric", action="append", default=[], help="psnr, ssim, lpips, clip, fid (default: all there are)"
    )
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="a CLIP model for CLIP score, not the demo's"
    )
    parser.add_argument("--inception", type=Path, metavar="FILE", help="Inception-v3's weights for FID")
    parser.add_argument(
        "--truth", type=Path, metavar="DIR|FILE.npz", help="true pictures for FID, or their statistics"
    )
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="AlexNet's weights for LPIPS")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line")
    parser.add_argument(
        "--patience",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="a side that loads, compiles, is tuned (two pictures or more) or generates for longer has failed "
        "(default 1800)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("out/bench"), help="default out/bench"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep weights, exports and compiled code here; what this commit has built is used again",
    )
    parser.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.json",
        help="other results, to show beside these",
    )
    parser.add_argument(
        "--builders",
        type=int,
        default=1,
        metavar="N",
        help="sides that build at the same time: each takes longer then, all of them less; default %(default)s",
    )
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="SIDE",
        help="show where the time of one of its pictures goes, on a CPU",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=("bench", "bench"))
    actions = parser.add_subparsers(metavar="ACTION")
    actions.add_parser("list", help="the cases, sides and gates").set_defaults(run=("bench", "bench_list"))
    _add_compare(actions)
    _add_loadgen(actions)
    _add_sweep(actions)


def _add_compare(actions: Commands) -> None:
    parser = actions.add_parser("compare", help="what changed; ends with 1 where something got worse")
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--tolerance", type=float, default=0.03, help="of a speed (default 0.03)")
    parser.set_defaults(run=("bench", "bench_compare"))


def _add_loadgen(actions: Commands) -> None:
    parser = actions.add_parser(
        "loadgen", help="MLPerf's LoadGen over a pipeline; ends with 1 where it says INVALID"
    )
    parser.add_argument(
        "--scenario", action="append", default=[], help="SingleStream, Offline, Server (default: all)"
    )
    parser.add_argument("--model", default="demo", metavar="MODEL", help="as for generate")
    parser.add_argument("--refiner", metavar="MODEL", help="as for generate")
    parser.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: by device")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, default=20, help="of Euler (default 20, MLPerf's)")
    parser.add_argument("--guidance", type=float, default=8.0, help="default 8, MLPerf's")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (default: the demo's world)")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="least duration of a scenario (default 60)"
    )
    parser.add_argument(
        "--queries", type=int, help="least number of them (default 64, and 700 for Server's 99 %%)"
    )
    parser.add_argument("--rate", type=float, help="queries a second (default: by what is reached here)")
    parser.add_argument(
        "--latency", type=float, default=20.0, help="seconds that 99 %% of Server stay under (default 20)"
    )
    parser.add_argument("--batch", type=int, default=1, help="maximum batch size (default 1)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("out/loadgen"), help="for LoadGen's logs"
    )
    parser.set_defaults(run=("bench", "bench_loadgen"))


def _add_sweep(actions: Commands) -> None:
    parser = actions.add_parser(
        "sweep", help="time against quality over steps and the refiner's share, on the demo"
    )
    parser.add_argument(
        "--steps", type=counts, metavar="N,M,...", default=(8, 15, 30), help="default 8,15,30"
    )
    parser.add_argument(
        "--share", type=shares, metavar="F,G,...", default=(0.6, 0.8, 1.0), help="default 0.6,0.8,1"
    )
    parser.add_argument("--pictures", type=int, default=56, help="of each setting (default 56)")
    parser.add_argument("--batch", type=int, default=8, help="batch size (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("out/sweep"), help="default out/sweep"
    )
    parser.set_defaults(run=("bench", "bench_sweep"))
