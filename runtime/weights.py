"""Checkpoints: a diffusers folder, a hub id, a single safetensors file or the shipped demo, all read alike.

`open_checkpoint` finds one and reads nothing but small JSON files; `Checkpoint.weights` finds a component's
tensors, and `WeightSet.load_into` reads them. Pickled weights are refused: unpickling can run code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CheckpointNotFoundError, UnsafeWeightsError
from . import hub, single_file
from .digests import DigestMemory
from .json_file import read_json
from .tokenizer_files import TokenizerFiles, clip_merges, clip_vocabulary, read_tokenizer
from .weight_set import TensorRef, UnreadWeights, WeightSet, read_header

__all__ = ["Checkpoint", "open_checkpoint", "open_outline", "public_name", "refiner_source"]

_log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_DEMO = _HERE / "demo"
_DATA = _HERE / "data"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_REMEDY = (
    "unpickling can run code, so latentrt reads safetensors only: take the safetensors files of the model, or "
    "convert these where you trust them, e.g. with diffusers' save_pretrained(..., safe_serialization=True)"
)
_PUBLISHED = {"sdxl": "sdxl_base", "sdxl-refiner": "sdxl_refiner"}
_SHARED_WITH_BASE = ("text_encoder_2", "tokenizer_2", "vae")


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Find a checkpoint.

    Args:
        model: "demo" or "demo-refiner", the shipped ones; a diffusers folder; a single `.safetensors` file of
            SDXL's base or refiner in the original key layout; or a hub id `owner/name`. What exists on disk comes
            before the hub.
        variant: such as "fp16", for `*.fp16.safetensors`; components without it are read in their plain form,
            with a warning, and so is a single file.
        revision: branch, tag or commit of a hub id.
        cache_dir: latentrt's cache, where digests are remembered. Downloads are kept in huggingface_hub's own.

    Raises:
        CheckpointNotFoundError: neither on disk nor on the hub.
        UnsafeWeightsError: `model` is a pickle.
        CheckpointError: it is there but is no checkpoint that is understood, or has nothing of that variant.
    """
    source = os.fspath(model)
    if source in ("demo", "demo-refiner"):
        return _demo(source, variant, cache_dir)
    try:
        path = Path(source).expanduser()
    except RuntimeError:  # the home of a user there is not
        path = Path(source)
    # Absolute, since weights are read later, when the working directory may be another.
    if path.is_file():
        if variant is not None:
            _log.warning("%s is a single file, which has no variant %r: reading it as it is", path, variant)
        return _single_file(source, path.absolute(), cache_dir)
    if source and path.is_dir():  # "" would be the working directory
        return Checkpoint(source, path.absolute(), variant=variant, cache_dir=cache_dir)
    if isinstance(model, str) and hub.is_hub_id(model):
        folder = hub.fetch(model, variant=variant, revision=revision)
        return Checkpoint(source, folder, variant=variant, cache_dir=cache_dir)
    raise CheckpointNotFoundError(
        f"{source!r} is not a local folder or file, and not a hub id (owner/name) either; give one of these, "
        'or "demo" for the checkpoint that is shipped'
    )


def open_outline(model: str | os.PathLike[str], *, variant: str | None = None) -> Checkpoint:
    """Find a checkpoint whose weights are never read: its modules stay on the meta device, for planning.

    Args:
        model: as in `open_checkpoint`; or "sdxl" or "sdxl-refiner", the published configurations without any
            weights, where nothing of that name is on disk.
        variant: as in `open_checkpoint`.

    Raises:
        CheckpointError: as in `open_checkpoint`.
    """
    kind = _PUBLISHED.get(os.fspath(model))
    if kind is not None and not Path(model).exists():
        return _Published(os.fspath(model), _DATA / kind)
    return open_checkpoint(model, variant=variant).unread()


def refiner_source(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """What to open for a refiner: "demo" names the demo's own."""
    return "demo-refiner" if os.fspath(name) == "demo" else name


def public_name(source: str) -> str:
    """A checkpoint's name without the folders it lies in on this machine."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


class Checkpoint:
    """A diffusers folder.

    Args:
        source: what the user asked for, for messages.
        folder: where `model_index.json` is, as an absolute path.
        variant, cache_dir: as in `open_checkpoint`.

    Attributes:
        source: as given.
        folder: as given.
        model_index: `model_index.json`.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        *,
        variant: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        index = folder / "model_index.json"
        if not index.is_file():
            raise CheckpointError(_not_a_pipeline(folder))
        self.source = source
        self.folder = folder
        self.model_index: Mapping[str, Any] = read_json(index)
        self._memory = DigestMemory(cache_dir)
        self._variant = variant
        self._weight_set = WeightSet
        if variant is not None:
            self._check_variant(variant)

    def unread(self) -> Checkpoint:
        """The same checkpoint with `UnreadWeights`."""
        twin = copy(self)
        twin._weight_set = UnreadWeights
        return twin

    def has(self, component: str) -> bool:
        """Whether there is a component of that name, such as "text_encoder_2"."""
        entry = self.model_index.get(component)
        return isinstance(entry, list) and any(entry)

    def config(self, component: str) -> dict[str, Any]:
        """`config.json` of a network, `scheduler_config.json` of the scheduler.

        Raises:
            CheckpointError: there is no such component, or its file cannot be read.
        """
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_json(self._folder_of(component) / name)

    def tokenizer_files(self, tokenizer: str) -> TokenizerFiles:
        """The tables of "tokenizer" or "tokenizer_2".

        Raises:
            CheckpointError: there is no such tokenizer, or its files cannot be read.
        """
        return read_tokenizer(self._folder_of(tokenizer))

    def weights(self, component: str) -> WeightSet:
        """The tensors of a network, not read yet.

        Raises:
            UnsafeWeightsError: there are pickled ones only.
            CheckpointError: there is no such component, or a file is missing or damaged.
        """
        folder = self._folder_of(component)
        tensors: dict[str, TensorRef] = {}
        for file in _weight_files(folder, self._variant):
            for key, ref in read_header(file).items():
                if key in tensors:
                    raise CheckpointError(f"{file} and {tensors[key].file.name} both have {key!r}")
                tensors[key] = ref
        return self._weight_set(f"{component} of {self.source}", tensors, self._memory)

    def _folder_of(self, component: str) -> Path:
        if not self.has(component):
            parts = (name for name in self.model_index if not name.startswith("_") and self.has(name))
            raise CheckpointError(f"{self.source} has no {component}; it has {', '.join(sorted(parts))}")
        folder = self.folder / component
        if not folder.is_dir():
            raise CheckpointError(
                f"{self.source} lists {component} in model_index.json but {folder} is missing; the checkpoint is "
                "incomplete: fetch it again"
            )
        return folder

    def _check_variant(self, variant: str) -> None:
        folders = [self.folder / name for name in hub.WEIGHTED if name in self.model_index]
        if not any(_named(folder, hub.weight_names(variant)) for folder in folders):
            found = sorted({file.name for folder in folders for file in folder.glob("*.safetensors")})
            raise CheckpointError(
                f"{self.source} has nothing of variant {variant!r}"
                + (f"; its weights are {', '.join(found)}" if found else "")
                + ". Leave variant out to read the plain files"
            )


class _Published(Checkpoint):
    """A published checkpoint's configurations, without weights."""

    def tokenizer_files(self, tokenizer: str) -> TokenizerFiles:
        return _clip_tokenizer(self._folder_of(tokenizer))

    def weights(self, component: str) -> WeightSet:
        return UnreadWeights(f"{component} of {self.source}", {}, self._memory)


class _SingleFile(_Published):
    """A single file, described by the configurations of the published checkpoint that it is of the kind of."""

    def __init__(self, source: str, kind: str, tensors: Mapping[str, TensorRef], cache_dir: Any) -> None:
        super().__init__(source, _DATA / kind, cache_dir=cache_dir)
        self._tensors = tensors
        configs = {name: Checkpoint.config(self, name) for name in ("unet", "vae")}
        self._components = single_file.convert(kind, tensors, configs)

    def config(self, component: str) -> dict[str, Any]:
        config = super().config(component)
        conv_in = self._components["unet"].get("conv_in.weight")
        if component == "unet" and conv_in is not None and len(conv_in.shape) == 4:
            config["in_channels"] = conv_in.shape[1]  # 9 for inpainting
        if component == "scheduler":
            # Two empty tensors by which community checkpoints say how they were trained.
            if "v_pred" in self._tensors:
                config["prediction_type"] = "v_prediction"
            if "ztsnr" in self._tensors:
                config["rescale_betas_zero_snr"] = True
        return config

    def weights(self, component: str) -> WeightSet:
        if component not in self._components:
            raise CheckpointError(f"{self.source} has no {component}; it has {', '.join(self._components)}")
        return self._weight_set(f"{component} of {self.source}", self._components[component], self._memory)


class _DemoRefiner(Checkpoint):
    """The demo's refiner: what is its base's too is shipped once."""

    def has(self, component: str) -> bool:
        return component in _SHARED_WITH_BASE or super().has(component)

    def _folder_of(self, component: str) -> Path:
        return _DEMO / component if component in _SHARED_WITH_BASE else super()._folder_of(component)


def _clip_tokenizer(folder: Path) -> TokenizerFiles:
    """CLIP's tables, which are shipped, with a folder's configuration."""
    merges = clip_merges()
    return TokenizerFiles(clip_vocabulary(merges), merges, read_json(folder / "tokenizer_config.json"))


def _demo(name: str, variant: str | None, cache_dir: str | os.PathLike[str] | None) -> Checkpoint:
    if name == "demo":
        return Checkpoint(name, _DEMO, variant=variant, cache_dir=cache_dir)
    return _DemoRefiner(name, _DEMO / "refiner", variant=variant, cache_dir=cache_dir)


def _single_file(source: str, file: Path, cache_dir: str | os.PathLike[str] | None) -> Checkpoint:
    if file.suffix in _PICKLES:
        raise UnsafeWeightsError(f"{file} is a pickle; {_REMEDY}")
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is not a .safetensors file, nor a folder with a model_index.json")
    tensors = read_header(file)
    kind = single_file.recognise(file, tensors)
    return _SingleFile(source, kind, tensors, cache_dir)


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a component: one, or the shards its index lists."""
    found = _named(folder, hub.weight_names(variant))
    if not found and variant is not None:
        found = _named(folder, hub.weight_names(None))
        if found:
            _log.warning("%s has no variant %r: reading %s", folder, variant, found[0].name)
    if not found:
        there = sorted(path.name for path in folder.iterdir())
        gone = [name for name in there if name.endswith(".safetensors") and not (folder / name).exists()]
        if gone:
            raise CheckpointError(
                f"{folder}: {', '.join(gone)} is a link to a file that is gone; fetch the checkpoint again"
            )
        pickles = [name for name in there if Path(name).suffix in _PICKLES]
        if pickles:
            raise UnsafeWeightsError(f"{folder} has only pickled weights ({', '.join(pickles)}); {_REMEDY}")
        raise CheckpointError(
            f"{folder} has no weights: expected {' or '.join(f'{stem}.safetensors' for stem in hub.STEMS)}, "
            f"found {', '.join(there) or 'nothing'}"
        )
    first = found[0]
    if first.suffix == ".json":
        return _shards(first)
    if "-of-" in first.name:
        raise CheckpointError(f"{folder} has shards such as {first.name} without an index; fetch it again")
    return [first]


def _named(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files of these names, in the names' order."""
    return [path for name in names for path in sorted(folder.glob(name))]


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; it does not list shards")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # The index is downloaded text: it may name files beside it and nothing else.
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name!r}, which is not a safetensors file beside it; refused"
            )
    return [index.parent / name for name in names]


def _not_a_pipeline(folder: Path) -> str:
    """What to say of a folder without model_index.json."""
    message = f"{folder} has no model_index.json, so it is not a diffusers pipeline"
    if (folder / "config.json").is_file():
        return f"{message}; it looks like one component: give the folder above it"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files:
        return f"{message}; to load a single-file checkpoint give the file itself, such as {files[0]}"
    return message
