"""Checkpoints from the Hugging Face hub: only the files that are read here, and the local cache when offline.

Downloads go where huggingface_hub puts them (HF_HOME, HF_HUB_CACHE), so that what other programs fetched is
found and fetched once.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointNotFoundError

__all__ = ["STEMS", "WEIGHTED", "fetch", "is_hub_id", "weight_names"]

_log = logging.getLogger(__name__)

WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The components with weights."""

STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call a weights file."""

_DESCRIPTIONS = (
    "model_index.json",
    *(f"{component}/config.json" for component in WEIGHTED),
    "scheduler/scheduler_config.json",
    *(
        f"{tokenizer}/{name}"
        for tokenizer in ("tokenizer", "tokenizer_2")
        for name in (
            "vocab.json",
            "merges.txt",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        )
    ),
)


def is_hub_id(model: str) -> bool:
    """Whether this reads as `owner/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not model.startswith(".")


def weight_names(variant: str | None) -> list[str]:
    """Names a component's weights may have, as patterns in which `?` is one character: whole files first, then
    indices, then shards. With a variant there are two habits for the last two.
    """
    names = []
    variant = variant and glob.escape(variant)
    for stem in STEMS:
        if variant is None:
            names += [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
            names += [f"{stem}-?????-of-?????.safetensors"]
        else:
            names += [f"{stem}.{variant}.safetensors"]
            names += [f"{stem}.safetensors.index.{variant}.json", f"{stem}.{variant}.safetensors.index.json"]
            names += [f"{stem}-?????-of-?????.{variant}.safetensors"]
            names += [f"{stem}.{variant}-?????-of-?????.safetensors"]
    return names


def fetch(model: str, *, variant: str | None, revision: str | None) -> Path:
    """The local folder of a hub checkpoint; downloaded unless it is there already.

    Components without the variant come in their plain form, but none where no component has it.

    Raises:
        CheckpointNotFoundError: the hub does not have it or cannot be reached, and neither has the local cache.
    """
    names = weight_names(variant)
    patterns = [*_DESCRIPTIONS, *(f"{component}/{name}" for component in WEIGHTED for name in names)]
    folder = _snapshot(model, revision, patterns)
    if variant is not None:
        lacking = [component for component in WEIGHTED if not _has_weights(folder / component, names)]
        if lacking and lacking != list(WEIGHTED):
            plain = [f"{component}/{name}" for component in lacking for name in weight_names(None)]
            folder = _snapshot(model, revision, plain)
    return folder


def _has_weights(folder: Path, names: Iterable[str]) -> bool:
    return any(next(folder.glob(name), None) for name in names)


def _snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    def snapshot(*, offline: bool) -> Path:
        found = snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=offline)
        return Path(found).absolute()  # HF_HOME may be relative

    # What the hub and the network under it raise differs between releases, and each of it leaves the same
    # choice: the local copy, or telling the user.
    try:
        return snapshot(offline=False)
    except Exception as error:
        try:
            folder = snapshot(offline=True)
        except Exception:
            raise CheckpointNotFoundError(
                f"{model!r} is not a local folder or file, and could not be fetched from the model hub"
                + (f" at revision {revision!r}" if revision else "")
                + f" ({type(error).__name__}: {_first_line(error)}). Check the spelling; log in with "
                "`hf auth login` if access to it is restricted; without a network, give the path of a "
                "downloaded folder or .safetensors file"
            ) from error
        _log.warning("%s is taken from the local cache: %s", model, _first_line(error))
        return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
