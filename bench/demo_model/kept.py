"""The outputs of stages: written atomically, each with a note of what it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from ...errors import RequestError
from ...kernels.atomic_file import write_json
from ...runtime.sha256 import sha256_of
from .loop import console

SHARP = "vae_sharp"  # folder of the VAE of before stage "soft"
MARK_FILE = "soft.pt"  # the mark of stage "soft", made from that VAE


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
    """Digest of the weights that stage "vae" wrote.

    Raises:
        RequestError: it wrote none.
    """
    path = out / SHARP / "diffusion_pytorch_model.safetensors"
    if not path.exists():
        raise RequestError(f"{path} is not there; run --stage vae first")
    return sha256_of(path)


def noted_of(file: Path) -> dict[str, Any]:
    """What a file was made from; empty where nobody noted it, or the file is not there."""
    beside = file.with_suffix(".json")
    return dict(json.loads(beside.read_text("utf-8"))) if file.exists() and beside.exists() else {}


def is_made_from(file: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a file is there and was made from this; where it is there and was not, it is told why it is made anew,
    and counts as not made until `note_made_from`."""
    known = noted_of(file)
    if known == wanted:
        return True
    file.with_suffix(".json").unlink(missing_ok=True)
    if file.exists():
        others = ", ".join(
            f"{key} {known.get(key)} and not {wanted[key]}" for key in wanted if known.get(key) != wanted[key]
        )
        console.log(f"{file.name} is made anew: it was made from {others}")
    return False


def note_made_from(file: Path, made_from: Mapping[str, Any]) -> None:
    """Beside a file that is whole."""
    write_json(file.with_suffix(".json"), made_from)
