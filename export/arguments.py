"""Arguments of `latentrt export`, `build` and `verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runtime.arguments import archs, size

__all__ = ["add_commands"]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """To the command line's parser."""
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
        "--split", action="store_true", help="the UNet in three: per prompt, for all timesteps, and per step"
    )
    x.add_argument("--variant", help="weights variant, such as fp16")
    x.add_argument("--json", action="store_true")
    x.set_defaults(run=("export", "export"))

    e = commands.add_parser(
        "build",
        help="compile a model's components to TensorRT engines",
        description="Exports each component where that was not done yet and compiles it. tensorrt-rtx builds for named "
        "architectures without a GPU; tensorrt builds for the GPU it runs on. Engines that are in the cache already "
        "are found, not built.",
    )
    e.add_argument("model", metavar="MODEL", help="as for `latentrt generate --model`")
    e.add_argument("--engine", choices=("tensorrt", "tensorrt-rtx"), required=True)
    e.add_argument("--arch", type=archs, metavar="sm_NN,...", help="default: this machine's GPU")
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
        "ShiftGroupNormSilu, DotProductAttention; for tensorrt also DotProductAttention:ahead, which needs no Python "
        "where it runs (default none)",
    )
    e.add_argument(
        "--split",
        action="store_true",
        help="the UNet as three engines: per prompt, for all timesteps, and per step; run them with LATENTRT_SPLIT=1",
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
    v.add_argument("--refiner", metavar="MODEL", help="as for generate: its components, and in the pictures")
    v.add_argument("--backend", default="auto", help="see `latentrt backends` (default auto)")
    v.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: by device")
    v.add_argument("--variant", help="weights variant, such as fp16")
    v.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    v.add_argument("--size", type=size, metavar="WxH", help="in pixels (default: the model's own)")
    v.add_argument(
        "--batch", type=int, default=1, help="images at once (default 1); for engines that take no fewer"
    )
    v.add_argument(
        "--component", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    v.add_argument("--json", action="store_true", help="print what was found as JSON")
    v.set_defaults(run=("export", "verify"))
