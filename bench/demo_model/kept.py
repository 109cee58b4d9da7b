"""What a stage leaves for the next ones: written whole, and beside it what it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from ...kernels.whole_file import write_json
from ...runtime.sha256 import sha256_of
from .loop import console

SHARP = "vae_sharp"  # folder of the VAE of before stage "soft"


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Write it whole or not at all."""
    aside, before = (folder.with_name(f"{folder.name}.{kind}") for kind in ("tmp", "old"))
    for left in (aside, before):
        shutil.rmtree(left, ignore_errors=True)
    vae.save_pretrained(aside)
    if folder.exists():
        folder.rename(before)  # removed in place, a part of it would be there for a while
    aside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def sharp_vae(out: Path) -> str:
    """Digest of the weights that stage "vae" wrote."""
    return sha256_of(out / SHARP / "diffusion_pytorch_model.safetensors")


def is_made_from(file: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a file is there and was made from this; where it is there and was not, it is told why it is made anew,
    and counts as not made until `note_made_from`."""
    beside = file.with_suffix(".json")
    known = json.loads(beside.read_text("utf-8")) if beside.exists() else {}
    if file.exists() and known == wanted:
        return True
    beside.unlink(missing_ok=True)
    if file.exists():
        others = ", ".join(
            f"{key} {known.get(key)} and not {wanted[key]}" for key in wanted if known.get(key) != wanted[key]
        )
        console.log(f"{file.name} is made anew: it was made from {others}")
    return False


def note_made_from(file: Path, made_from: Mapping[str, Any]) -> None:
    """Beside a file that is whole."""
    write_json(file.with_suffix(".json"), made_from)
