"""Arguments of `latentrt export`, `build` and `verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.arguments import DTYPES, Commands, archs, size

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """To the command line's parser."""
    _add_export(commands)
    _add_build(commands)
    _add_verify(commands)


def _folder(text: str) -> Path:
    if not text:  # Path("") is the working directory
        raise argparse.ArgumentTypeError("it is empty; name a folder, or write . for this one")
    return Path(text)


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model's components as ONNX files",
        description="Writes DIR/COMPONENT/model.onnx with its weights beside it, checked against PyTorch, and shows "
        "what each pass did to it.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="as for generate; 'demo-refiner' is the demo's refiner"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=_folder, required=True)
    parser.add_argument("--component", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument(
        "--passes", metavar="A,B", help="in place of the usual ones, in this order; '' for none"
    )
    parser.add_argument(
        "--split", action="store_true", help="the UNet in three: per prompt, for all timesteps, and per step"
    )
    parser.add_argument("--variant", help="weights variant, such as fp16")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=("export", "export"))


def _add_build(commands: Commands) -> None:
    parser = commands.add_parser(
        "build",
        help="compile a model's components to TensorRT engines",
        description="Exports each component if that was not done yet, and compiles it. tensorrt-rtx builds for named "
        "architectures without a GPU; tensorrt builds for the GPU it runs on. Engines that are in the cache are not "
        "built again.",
    )
    parser.add_argument("model", metavar="MODEL", help="as for `latentrt generate --model`")
    parser.add_argument(
        "--engine", choices=("tensorrt", "tensorrt-rtx"), required=True, help="which TensorRT to build for"
    )
    parser.add_argument("--arch", type=archs, metavar="sm_NN,...", help="default: this machine's GPU")
    parser.add_argument(
        "--sizes",
        action="append",
        default=[],
        metavar="SIZES",
        help="WxH, or such as '512..1280 step 64'; may be repeated (default: half to 5/4 of the model's own)",
    )
    parser.add_argument("--batch", default="1..4", metavar="N..M", help="images at once (default 1..4)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--variant", help="weights variant, such as fp16")
    parser.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    parser.add_argument(
        "--weight-streaming",
        action="store_true",
        help="let the engine keep part of its weights in host memory",
    )
    parser.add_argument(
        "--hardware-compatibility",
        choices=("none", "same-capability", "ampere-plus"),
        default="none",
        help="tensorrt only: other GPUs that the engine runs on too (default none)",
    )
    parser.add_argument(
        "--plugins",
        default="none",
        metavar="NAME,...",
        help="operators to run by plugins made of the Triton kernels: all, none, or a list of GroupNorm, "
        "GroupNormSilu, ShiftGroupNormSilu, DotProductAttention; for tensorrt also DotProductAttention:aot, which "
        "needs no Python where it runs (default none)",
    )
    parser.add_argument(
        "--split",
        action="store_true",
        help="the UNet as three engines: per prompt, for all timesteps, and per step; run them with LATENTRT_SPLIT=1",
    )
    parser.add_argument("--rebuild", action="store_true", help="build even what is in the cache")
    parser.add_argument("--json", action="store_true", help="print what was built as JSON")
    parser.set_defaults(run=("export", "build"))


def _add_verify(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="compare a back end with eager PyTorch in float32, part by part",
        description="Runs every component, and then whole pictures, on both sides with the same inputs, and compares "
        "relative error, PSNR and SSIM with limits. Ends with 1 if a part fails.",
    )
    parser.add_argument("model", metavar="MODEL", help="as for `latentrt generate --model`")
    parser.add_argument(
        "--refiner", metavar="MODEL", help="as for generate: its components, and in the pictures"
    )
    parser.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: by device")
    parser.add_argument("--variant", help="weights variant, such as fp16")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model's own)")
    parser.add_argument(
        "--batch", type=int, default=1, help="images at once (default 1); for engines that take no fewer"
    )
    parser.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.set_defaults(run=("export", "verify"))
