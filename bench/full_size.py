"""Loads SDXL's base UNet at full size on the CPU, and runs one forward.

    python -m latentrt.bench.full_size [--dtype bfloat16] [--size 512] [--folder DIR] [--out FILE.json]

The weights are random, since the published ones may not be on this machine. They are written to a file in float16, one
tensor at a time: 5.1 GB, which are removed afterwards unless `--folder` says where to keep them. It is checked that
loading takes less than 1.3 times the weights' own memory, and that the output is finite.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..kernels.atomic_file import write_json
from ..runtime.host_memory import forget_peak, peak_bytes
from ..runtime.models.unet import UNet, UNetConfig, input_names
from ..runtime.place import dtype_name
from ..runtime.weights import open_checkpoint
from .cases import DTYPES
from .machine import describe_machine, module_command
from .random_checkpoint import PUBLISHED, write_weights

__all__ = ["Result", "main", "measure", "write_unet"]

MAX_LOAD_RATIO = 1.3
_CONFIG = PUBLISHED / "sdxl_base" / "unet" / "config.json"
_TOKENS = 77
_POOLED = 1280


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        parameters: of the UNet.
        dtype: of its weights and of the forward.
        size: of the image in pixels, along each side.
        weight_bytes: of the weights in `dtype`.
        load_seconds, forward_seconds: wall time.
        load_ratio: by how much loading raised the process's peak memory, divided by `weight_bytes`.
        forward_ratio: the same for the forward, with the weights included.
        output_std: standard deviation of the output.
        finite: the output has no infinities or NaNs.
    """

    parameters: int
    dtype: str
    size: int
    weight_bytes: int
    load_seconds: float
    forward_seconds: float
    load_ratio: float
    forward_ratio: float
    output_std: float
    finite: bool


def write_unet(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a UNet of random float16 weights as a diffusers folder: see `random_checkpoint.write_weights`.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in UNet(UNetConfig.from_dict(config)).state_dict().items()}
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}\n')
    (folder / "unet" / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", shapes)
    return folder


def measure(folder: Path, dtype: torch.dtype, size: int) -> Result:
    """Load the UNet of a folder and run it once on noise.

    Args:
        folder: a diffusers folder with a UNet of SDXL's anatomy.
        dtype: to load and run in.
        size: of the image in pixels, along each side.

    Raises:
        OSError: the system does not report peak memory (not Linux).
    """
    checkpoint = open_checkpoint(folder)
    config = UNetConfig.from_dict(checkpoint.config("unet"))
    with torch.device("meta"):
        unet = UNet(config).eval()
    parameters = sum(p.numel() for p in unet.parameters())
    weight_bytes = parameters * dtype.itemsize

    before = _reset_peak()
    started = time.perf_counter()
    checkpoint.weights("unet").load_into(unet, dtype)
    _read_all_pages(unet)
    load_seconds = time.perf_counter() - started
    load_ratio = ((peak_bytes() or 0) - before) / weight_bytes

    inputs = _inputs(config, dtype, size // 8)
    _reset_peak()
    started = time.perf_counter()
    with torch.inference_mode():
        output = unet(*inputs)
    forward_seconds = time.perf_counter() - started
    return Result(
        parameters=parameters,
        dtype=dtype_name(dtype),
        size=size,
        weight_bytes=weight_bytes,
        load_seconds=load_seconds,
        forward_seconds=forward_seconds,
        load_ratio=load_ratio,
        forward_ratio=((peak_bytes() or 0) - before) / weight_bytes,
        output_std=float(output.float().std()),
        finite=bool(output.isfinite().all()),
    )


def _read_all_pages(module: nn.Module) -> None:
    """Weights that are mapped from a file only take memory when their pages are read."""
    for parameter in module.parameters():
        parameter.detach().view(torch.int8).flatten()[::4096].sum()


def _inputs(config: UNetConfig, dtype: torch.dtype, side: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = {
        "sample": (1, config.in_channels, side, side),
        "timestep": (1,),
        "encoder_hidden_states": (1, _TOKENS, config.cross_attention_dim),
        "text_embeds": (1, _POOLED),
        "time_ids": (1, 6),
    }
    values = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    pixels = 8.0 * side
    values["timestep"] = torch.tensor([500.0])
    values["time_ids"] = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]])
    return [values[name] for name in input_names(config)]


def _reset_peak() -> int:
    """Reset the process's peak memory, for example after writing the weights; returns what it holds now, in bytes."""
    forget_peak()
    return peak_bytes() or 0


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 if a check fails."""
    parser = argparse.ArgumentParser(description="One forward of the full-size SDXL base UNet on the CPU.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side, a multiple of 8")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and use it if it is there")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(argv)
    if args.size < 8 or args.size % 8:
        parser.error(f"--size {args.size}: it must be a multiple of 8")
    with tempfile.TemporaryDirectory(prefix="latentrt-") as scratch:
        folder = args.folder or Path(scratch)
        if not (folder / "model_index.json").is_file():
            print(f"writing 5.1 GB of random weights to {folder}", flush=True)
            write_unet(folder, json.loads(_CONFIG.read_text("utf-8")))
        result = measure(folder, DTYPES[args.dtype], args.size)
    print(
        f"{result.parameters / 1e6:,.2f} M parameters in {result.dtype}, {result.weight_bytes / 1e9:.2f} GB\n"
        f"load     {result.load_seconds:7.1f} s, peak memory {result.load_ratio:.2f} x the weights\n"
        f"forward  {result.forward_seconds:7.1f} s at {result.size}x{result.size}, "
        f"peak memory {result.forward_ratio:.2f} x the weights, {torch.get_num_threads()} threads\n"
        f"output   standard deviation {result.output_std:.3f}, {'finite' if result.finite else 'NOT FINITE'}"
    )
    if args.out is not None:
        report = {
            "schema": 1,
            "benchmark": "full-size UNet, CPU",
            "command": module_command("latentrt.bench.full_size", argv),
            "machine": describe_machine(),
            "result": asdict(result),
        }
        write_json(args.out, report, indent=2)
    if result.load_ratio >= MAX_LOAD_RATIO:
        print(f"loading took {result.load_ratio:.2f} x the weights; the limit is {MAX_LOAD_RATIO}")
    return int(result.load_ratio >= MAX_LOAD_RATIO or not result.finite)


if __name__ == "__main__":
    sys.exit(main())
