"""Arguments of `latentrt generate`, `plan`, `serve`, `backends`, `info` and `cache`, and forms that others share.

The command line imports this before it knows which command it runs: nothing here imports much.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

__all__ = ["DTYPES", "Commands", "add_commands", "arch", "archs", "size"]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""To which a command adds its parser."""

DTYPES = ("float32", "float16", "bfloat16")
_POLICIES = ("resident", "balanced", "low")  # memory.POLICIES, which cannot be imported here


def size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` -> (height, width)."""
    width, found, height = text.lower().partition("x")
    if not found or not width.isdecimal() or not height.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, such as 1024x1024")
    return int(height), int(width)


def arch(text: str) -> int:
    """`sm_90` -> 90."""
    digits = text.lower().removeprefix("sm_")
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an architecture; write sm_90 or the like")
    return int(digits)


def archs(text: str) -> tuple[int, ...]:
    """`sm_89,sm_120` -> (89, 120)."""
    return tuple(sorted({arch(part.strip()) for part in text.split(",")}))


def _replicas(text: str) -> tuple[int, int]:
    """`1..4` -> (1, 4); `2` -> (2, 2)."""
    least, found, most = text.partition("..")
    most = most if found else least
    if not least.isdecimal() or not most.isdecimal() or not 1 <= int(least) <= int(most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of replicas; write 2, or 1..4")
    return int(least), int(most)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `commands.load` reads."""
    parser.add_argument(
        "--model",
        default="demo",
        metavar="MODEL",
        help="'demo' (shipped), a diffusers folder, a hub id, or a single .safetensors file of SDXL",
    )
    parser.add_argument(
        "--refiner",
        metavar="MODEL",
        help="refiner for the last steps; 'none' for none (default: the demo's own for the demo, else none)",
    )
    parser.add_argument(
        "--timestep-spacing",
        choices=("leading", "linspace", "trailing"),
        help="override the checkpoint's; models distilled to a few steps want trailing",
    )
    parser.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, float16 on a GPU")
    parser.add_argument("--variant", help="weights variant, such as fp16")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="capture a denoising step once and replay it (default: on a GPU, as a CUDA graph)",
    )
    parser.add_argument(
        "--memory",
        choices=_POLICIES,
        default="resident",
        help="weights on the device: all of them, text encoders for the text only, or one network at a time "
        "(default resident)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="refuse requests that by plan need more device memory, such as 8GB (default: what is free on a GPU)",
    )


def add_commands(commands: Commands) -> None:
    """Add these commands to the command line's parser."""
    _add_generate(commands)
    _add_plan(commands)
    _add_serve(commands)
    _add_backends(commands)
    _add_info(commands)
    _add_cache(commands)


def _add_generate(commands: Commands) -> None:
    parser = commands.add_parser("generate", help="make images from a prompt")
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="image.png", help="PNG to write (default image.png)"
    )
    _add_loading(parser)
    parser.add_argument(
        "--sampler",
        help="euler, euler-a, ddim, ddpm, pndm, dpm++2m, dpm++2m-karras or lcm (default: the checkpoint's)",
    )
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (default 30)")
    parser.add_argument(
        "--seed", type=int, help="of the first image; the next ones count up (default: random)"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale; 1 or less turns it off (default: 5 for SDXL, 7.5 for SD 1.x and 2.x)",
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        help="0 to 1: rescales guidance against overexposure (default 0)",
    )
    parser.add_argument(
        "--tiled-vae", action="store_true", help="decode large pictures in tiles: less memory"
    )
    parser.add_argument("--negative", metavar="PROMPT", help="what to steer away from")
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model's own)")
    parser.add_argument(
        "--count",
        type=int,
        default=1,
        help="number of images; several are written as FILE-1.png, FILE-2.png, ... (default 1)",
    )
    parser.add_argument(
        "--high-noise-frac",
        type=float,
        default=0.8,
        help="share of the schedule that the base denoises; a refiner goes on from there (default 0.8)",
    )
    parser.add_argument("--no-metadata", action="store_true", help="do not write the parameters into the PNG")
    parser.add_argument(
        "--json", action="store_true", help="print the parameters and timings as JSON, and no progress"
    )
    parser.set_defaults(run=("runtime", "generate"))


def _add_plan(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="the device memory that a request needs, and the least time that it takes on a GPU",
        description="From the model's own shapes: no weight is read, nothing is loaded, and no GPU is needed.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="as for `latentrt generate --model`; or 'sdxl' or 'sdxl-refiner', the published configurations",
    )
    parser.add_argument(
        "--refiner", metavar="MODEL", help="the same; 'none' for none (default: as for generate)"
    )
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--variant", help="weights variant, such as fp16")
    parser.add_argument("--backend", choices=("triton", "eager"), default="triton")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0, help="1 or less turns guidance off")
    parser.add_argument("--sampler", help="override the checkpoint's")
    parser.add_argument("--high-noise-frac", type=float, default=0.8, help="as for generate")
    parser.add_argument("--from-image", action="store_true", help="plan an image-to-image request")
    parser.add_argument(
        "--gpu", default="H200", help="GPU to plan for: its limits and kernels (default H200)"
    )
    parser.add_argument(
        "--memory",
        choices=_POLICIES,
        default="resident",
        help="the policy that --memory-limit is compared with (default resident); all are shown",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="free device memory, such as 24GB; ends with 1 if it is too little",
    )
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=("runtime", "plan"))


def _add_serve(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="make images over HTTP, with OpenAI's images API",
        description="Listens at once; GET /ready is true when the model is loaded and has made an image. On SIGTERM "
        "accepted requests are finished and new ones refused.",
    )
    _add_loading(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default 8000)")
    parser.add_argument(
        "--max-queue", type=int, default=64, help="images that may wait; beyond it 429 (default 64)"
    )
    parser.add_argument("--max-batch", type=int, default=8, help="images in a batch at most (default 8)")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer requests for this name too, such as a proxy's; may be repeated. Without it, and without API keys, "
        "a server at an address of this machine alone answers for localhost and that address",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=60.0,
        help="time to finish accepted requests after SIGTERM (default 60)",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="API keys, one a line; requests then need one of them",
    )
    parser.add_argument(
        "--ray", action="store_true", help="in replicas on this machine, by Ray Serve (needs the extra 'ray')"
    )
    parser.add_argument(
        "--replicas",
        type=_replicas,
        default=(1, 1),
        metavar="MIN..MAX",
        help="with --ray: number of replicas, by load (default 1)",
    )
    parser.add_argument(
        "--cpus",
        type=float,
        default=1.0,
        metavar="N",
        help="with --ray: CPU cores a replica counts for (default 1); on CUDA each has a GPU as well",
    )
    parser.set_defaults(run=("runtime.serve", "serve"))


def _add_backends(commands: Commands) -> None:
    parser = commands.add_parser("backends", help="which back ends there are, and whether they run here")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=("runtime", "backends"))


def _add_info(commands: Commands) -> None:
    parser = commands.add_parser("info", help="read the generation parameters back from a PNG")
    parser.add_argument("file", metavar="FILE.png")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=("runtime", "info"))


def _add_cache(commands: Commands) -> None:
    parser = commands.add_parser("cache", help="what is kept of exports and engines")
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        help="prune: keep this much, such as 20GB, of what was used last (default: remove only what is damaged)",
    )
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=("runtime", "cache"))
