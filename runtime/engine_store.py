"""Engines in the store: what decides their contents, which of them runs a component here, why others do not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CacheError, RequestError
from .cache import Store
from .cache_contents import Entry, contents
from .engines import plugins, products
from .engines.base import Component
from .engines.sizes import Profile
from .manifests import read_manifest
from .place import dtype_name

__all__ = [
    "PLAN_FILE",
    "EngineTarget",
    "StoredEngine",
    "describe_engine",
    "find_engine",
    "last_seconds",
    "mismatches",
    "stored_engine",
]

_log = logging.getLogger(__name__)

PLAN_FILE = "model.plan"

_OLDEST_OF_PLUGINS = 80  # that the Triton kernels are written for


@dataclass(frozen=True)
class EngineTarget:
    """What an engine is for, apart from component and sizes.

    Attributes:
        product: "tensorrt" or "tensorrt-rtx".
        archs: compute capabilities such as 89; several for TensorRT for RTX only.
        weight_streaming: weights that do not fit may stay in host memory at run time; an engine of which some do cannot
            be captured in a CUDA graph.
        hardware_compatibility: "none", "same-capability" or "ampere-plus"; of TensorRT only.
        plugins: version of each operator of latentrt that is taken by a plugin, as `plugins.versions` gives them.
    """

    product: str
    archs: tuple[int, ...]
    weight_streaming: bool = False
    hardware_compatibility: str = "none"
    plugins: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        product = products.product(self.product)
        self._check_plugins()
        if product.needs_gpu:
            if len(self.archs) != 1:
                raise RequestError(
                    f"{product.title} builds only for the GPU that it runs on; leave --arch out, or use --engine "
                    "tensorrt-rtx"
                )
            return
        if self.hardware_compatibility != "none":  # it takes the option, and builds the same engine
            raise RequestError(
                f"hardware_compatibility is {self.hardware_compatibility!r}, which does nothing in {product.title}; "
                "name the architectures instead, such as --arch sm_86,sm_89"
            )
        known = products.architectures(products.load(product))
        unknown = [f"sm_{arch}" for arch in self.archs if arch not in known]
        if unknown or not self.archs:
            raise RequestError(
                f"{product.title} has no engines for {', '.join(unknown) or 'no architecture'}; it has them for "
                f"{', '.join(f'sm_{arch}' for arch in known)}. For others use --engine tensorrt on a machine with "
                "such a GPU"
            )

    def _check_plugins(self) -> None:
        """Their kernels are machine code."""
        old = [f"sm_{arch}" for arch in self.archs if arch < _OLDEST_OF_PLUGINS]
        if self.plugins and old:
            raise RequestError(
                f"plugins have no kernels for {', '.join(old)}; build for it without, with --plugins none"
            )
        if plugins.AOT_ATTENTION in self.plugins and self.product != "tensorrt":
            raise RequestError(
                f"{products.product(self.product).title} has no plugins that are compiled ahead of time; "
                "leave ':aot' out"
            )
        if self.plugins and self.hardware_compatibility == "ampere-plus":
            raise RequestError(
                "hardware_compatibility is 'ampere-plus', and plugins have kernels for this GPU only; leave one of "
                "the two out"
            )


@dataclass(frozen=True)
class StoredEngine:
    """An engine that is whole.

    Attributes:
        key: of its entry.
        plan: the file.
        profiles: what it takes, in the engine's order.
        figures: what its build measured.
        plugins: what it holds, by name; their versions.
        built: whether it was built just now.
    """

    key: str
    plan: Path
    profiles: tuple[Profile, ...]
    figures: Mapping[str, Any]
    plugins: Mapping[str, str]
    built: bool


def describe_engine(
    component: Component, target: EngineTarget, device: torch.device | None, *, onnx: str, builder: str
) -> dict[str, Any]:
    """What decides what an engine is, but for its sizes.

    Args:
        device: the GPU that TensorRT builds on; the current one by default.
        onnx: digest of what decides the ONNX model.
        builder: digest of the code that builds.
    """
    product = products.product(target.product)
    driver = products.driver_class(product)
    # Unless told otherwise TensorRT builds for one model of GPU: others of its compute capability are not promised.
    bound = product.needs_gpu and target.hardware_compatibility == "none"
    return {
        "name": component.name,
        "kind": "engine",
        "fingerprint": component.fingerprint,
        "dtype": dtype_name(component.dtype),
        "tf32": component.tf32,
        **asdict(target),
        "archs": list(target.archs),
        "version": str(products.load(product).__version__),
        "driver": driver,
        "gpu": torch.cuda.get_device_name(device) if bound else "",
        "onnx": onnx,
        "builder": builder,
    }


def find_engine(store: Store, wanted: Mapping[str, Any], title: str) -> Entry | None:
    """The engine of this component that runs here and was asked for last, whatever its sizes.

    A build that finds it asks for it: so `latentrt build --sizes` decides which sizes run. One that failed its
    verification is taken where there is no other, and one with weight streaming, where that is not wanted, where there
    is none without. If none runs here, those of the same component and product are named in warnings, with the reason
    why not, and so is what is too damaged to say what it is.
    """
    entries = contents(store)
    of_component = [entry for entry in entries if _same(entry.description, wanted)]
    fitting = [entry for entry in of_component if not mismatches(entry.description, wanted)]
    if not fitting:
        for entry in of_component:
            why = "; ".join(mismatches(entry.description, wanted))
            _log.warning(
                "ignoring engine %s of %s, built on %s: %s", entry.key[:12], title, entry.created, why
            )
        for entry in entries:
            if entry.damage is not None:
                _log.warning("ignoring the damaged cache entry %s: %s", entry.key[:12], entry.damage)

    def rank(entry: Entry) -> tuple[bool, bool, str]:
        as_wanted = entry.description["weight_streaming"] == wanted["weight_streaming"]
        return not entry.failed, as_wanted, entry.used

    return max(fitting, key=rank, default=None)


def mismatches(have: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Why an engine does not run here, or is not what would be built today; empty where it does and is."""
    found = []
    archs, here = have.get("archs", []), wanted["archs"]
    gpu = have.get("gpu", "")
    anywhere = have.get("hardware_compatibility") == "ampere-plus" and min(here) >= 80
    if have.get("version") != wanted["version"]:
        found.append(f"it was built by version {have.get('version')}, this is {wanted['version']}")
    if have.get("driver") != wanted["driver"]:
        found.append(f"it was built under the driver {have.get('driver')}, this is {wanted['driver']}")
    if not set(here) <= set(archs) and not anywhere:
        found.append(f"it was built for {_names(archs)}, wanted is {_names(here)}")
    elif gpu and wanted["gpu"] not in ("", gpu):
        found.append(f"it was built on {gpu}, this is {wanted['gpu']}")
    if _tf32(have) != _tf32(wanted):
        found.append(f"it was built {_tf32(have)}, wanted is {_tf32(wanted)}")
    # Not the digests of what their kernels were made of: an engine holds its kernels.
    if plugins.formats(have.get("plugins", {})) != plugins.formats(wanted["plugins"]):
        found.append(f"it was built with the plugins {have.get('plugins')}, wanted are {wanted['plugins']}")
    if have.get("onnx") != wanted["onnx"]:
        found.append("it is stale: exported by other versions of latentrt, PyTorch or onnxscript")
    elif have.get("builder") != wanted["builder"]:
        found.append("it is stale: built by other code of latentrt")
    return found


def last_seconds(store: Store, wanted: Mapping[str, Any]) -> float | None:
    """What building this component took last time, whatever the sizes; None if it is not known."""
    timed = [e for e in contents(store) if _same(e.description, wanted) and "seconds" in e.figures]
    newest = max(timed, key=lambda entry: entry.created, default=None)
    return None if newest is None else float(newest.figures["seconds"])


def stored_engine(folder: Path, *, built: bool) -> StoredEngine:
    """The engine in an entry's folder, once that was verified.

    Raises:
        CacheError: it has been removed since, or is being replaced.
    """
    try:
        manifest = read_manifest(folder)
    except CacheError as error:
        raise CacheError(f"the engine {folder} was changed as it was read: {error}; run it again") from error
    return StoredEngine(
        folder.name,
        folder / PLAN_FILE,
        tuple(Profile.from_json(axes) for axes in manifest.description["profiles"]),
        manifest.figures,
        manifest.description["plugins"],
        built,
    )


def _same(have: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    fields = ("kind", "name", "product", "fingerprint")
    return all(have.get(name) == wanted[name] for name in fields)


def _tf32(description: Mapping[str, Any]) -> str:
    return "with TF32" if description.get("tf32") else "without TF32"


def _names(archs: Sequence[int]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)
