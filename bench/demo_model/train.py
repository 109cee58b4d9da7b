"""Train the demo checkpoint: `python -m latentrt.bench.demo_model.train --out DIR --seed 0`.

Stages, each resumable: vae, soft, text (both text encoders and the image tower), latents, base, handover, refiner. On
two CPU cores the default minutes take about as many steps as the shipped checkpoint had; a GPU trains in bf16.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import torch

from . import evaluate
from .loop import Run

STAGES = ("vae", "soft", "text", "latents", "base", "handover", "refiner")
MODULES = {
    "vae": "train_vae",
    "soft": "train_soft",
    "text": "train_text",
    "latents": "latents",
    "base": "train_unet",
    "handover": "handover",
    "refiner": "train_unet",
}
MINUTES = {
    "vae": 70.0,
    "soft": 12.0,
    "text": 9.0,
    "latents": 0.0,
    "base": 220.0,
    "handover": 0.0,
    "refiner": 120.0,
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the stages asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="where checkpoints and the pipeline folder go"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", nargs="*", default=[], metavar="STAGE=N", help=f"defaults: {MINUTES}")
    parser.add_argument("--examples", type=int, default=30_000, help="encoded scenes to train the UNets on")
    parser.add_argument("--batch", type=int, default=32, help="of the UNets; a GPU takes 128 as easily")
    parser.add_argument(
        "--workers", type=int, help="threads sharing a UNet's batch; on a CPU its cores, else 1"
    )
    options = parser.parse_args(arguments)
    minutes = dict(MINUTES)
    for item in options.minutes:
        stage, _, value = item.partition("=")
        if stage not in STAGES:
            parser.error(f"--minutes: unknown stage {stage!r}: one of {', '.join(STAGES)}")
        minutes[stage] = float(value)
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    workers = options.workers or (torch.get_num_threads() if device.type == "cpu" else 1)
    run = Run(options.out, options.seed, device, minutes, options.examples, options.batch, workers)
    for stage in STAGES if options.stage == "all" else (options.stage,):
        module = importlib.import_module(f".{MODULES[stage]}", __package__)
        stage_function: Callable[[Run], None] = getattr(module, f"stage_{stage}")
        stage_function(run)
    if options.stage == "all":
        evaluate.main(["--demo", str(options.out / "demo"), "--seed", str(options.seed)])


if __name__ == "__main__":
    main()
