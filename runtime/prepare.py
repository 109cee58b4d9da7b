"""Exported models and engines for the runtime: from the cache, or made now.

The only module of the runtime that imports `export`, and only when the cache lacks something: reading a cached model
needs neither torch.export nor onnx, nor TensorRT's builder.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import BackendError, CacheError
from .cache import Store, cache_root
from .cache_contents import Entry
from .engine_store import (
    PLAN_FILE,
    EngineTarget,
    StoredEngine,
    describe_engine,
    find_engine,
    last_seconds,
    stored_engine,
)
from .engines.base import Component, TensorSpec
from .engines.products import product
from .engines.sizes import Profile, SizePolicy, profiles_for
from .place import dtype_name
from .sha256 import digest_of, digest_of_files

if TYPE_CHECKING:
    from ..export.tensorrt import EngineRequest

__all__ = ["Rebuild", "exporter_digest", "find_or_build_engine", "find_or_export_onnx"]

Rebuild = Literal["auto", "never", "always"]
"""Whether an engine is built if it is absent, damaged or stale ("auto"), never, or even if it is whole ("always")."""

_log = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"

# PyTorch's tracing is not thread-safe.
_ONE_AT_A_TIME = threading.Lock()

_PACKAGE = Path(__file__).resolve().parents[1]
# Sources that decide what an exported graph is: a change in any of them makes cached exports stale. Whole folders, so
# that a new file counts; the files named further below are left out.
_SOURCES = ("kernels", "runtime/models", "export")
_SOURCE_FILES = (
    *("runtime/engines/base.py", "runtime/engines/split.py"),
    *("runtime/loading.py", "runtime/single_file.py", "runtime/weight_set.py"),
)
# Sources that build engines from exported graphs: a change makes cached engines stale, but no graph.
_BUILDER = ("export/tensorrt.py", "export/build_process.py")
# Sources that neither write nor check a graph.
_OTHERS = (
    *(
        "export/arguments.py",
        "export/commands.py",
        "export/engines.py",
        "export/folder.py",
        "export/verify.py",
    ),
    *("export/plugin_kernels.py", "export/quick_plugins.py"),
    *("kernels/binaries.py", "kernels/aot.py", "kernels/atomic_file.py"),
)
_MAKERS = ("torch", "onnx", "onnx-ir", "onnxscript")
_CHECKERS = ("onnxruntime", "onnxruntime-gpu")


def find_or_export_onnx(component: Component, *, cache_dir: Path | None) -> Path:
    """The file of the component's ONNX model in the cache, with its weights beside it.

    It is exported and checked against PyTorch unless the cache has a whole copy, made from the same weights by the
    same code and versions.

    Raises:
        ExportError: the component could not be exported, or the export computes something else.
        CheckpointError: its weights were replaced since the checkpoint was loaded.
        CacheError: the cache cannot be written.
    """
    description = _describe_model(component, (*_MAKERS, *_CHECKERS))

    def build(directory: Path) -> Mapping[str, Any]:
        from ..export.check import export_checked

        _log.info("exporting %s to ONNX; this is done once", component.name)
        # A caller's autocast would become part of the graph.
        with _ONE_AT_A_TIME, torch.autocast("cpu", enabled=False):
            return export_checked(component, directory / MODEL_FILE)[1]

    store = Store(cache_root(cache_dir))
    return store.get_or_build(digest_of(description), description, build) / MODEL_FILE


def find_or_build_engine(
    component: Component,
    target: EngineTarget,
    sizes: SizePolicy | None = None,
    *,
    cache_dir: Path | None,
    rebuild: Rebuild = "auto",
    device: torch.device | None = None,
) -> StoredEngine:
    """The component's TensorRT engine, from the cache or built now; its ONNX model is exported first where absent.

    Args:
        target: product, architectures and options.
        sizes: the sizes that it takes. None for the last used engine that runs here, whatever its sizes; if there is
            none, one for sizes around the model's own is built.
        rebuild: "auto" builds what is absent, damaged or stale; "never" raises instead; "always" builds.
        device: the GPU that TensorRT builds on; the current one by default.

    Raises:
        BackendError: there is none, or only one that failed its verification, and `rebuild` is "never"; or the product
            is not there.
        ExportError, BuildError, CheckpointError: the component cannot be exported or built.
        CacheError: the cache cannot be written, holds a damaged one and `rebuild` is "never", or is changed by another
            process again and again.
    """
    store = Store(cache_root(cache_dir))
    wanted = describe_engine(
        component,
        target,
        device,
        onnx=digest_of(_describe_model(component, _MAKERS)),
        builder=digest_of_files([_PACKAGE / file for file in _BUILDER], _PACKAGE),
    )
    title = f"{component.name} in {wanted['dtype']}"
    found = find_engine(store, wanted, title) if sizes is None else None
    if found is None:
        profiles = profiles_for(component, sizes or SizePolicy.around(component))
        description = {**wanted, "profiles": [profile.to_json() for profile in profiles]}
        key = digest_of(description)
    else:
        if found.failed:
            _refuse_or_warn(found, title, rebuild)
        description, key = dict(found.description), found.key
    build = _EngineBuild(component, target, description, store, title, device)
    folder = _fetch(key, build, rebuild)
    try:
        return stored_engine(folder, built=build.done)
    except CacheError:  # another process has removed it since, or is replacing it
        return stored_engine(_fetch(key, build, rebuild), built=build.done)


@dataclass
class _EngineBuild:
    """Builds one engine into a folder of the cache.

    Attributes:
        description: of the engine, with its profiles.
        device: the GPU that TensorRT builds on; None for the current one.
        done: whether it has been built.
    """

    component: Component
    target: EngineTarget
    description: Mapping[str, Any]
    store: Store
    title: str
    device: torch.device | None
    done: bool = False

    def __call__(self, directory: Path) -> Mapping[str, Any]:
        """Write the engine's plan to `directory`; returns the figures of the build."""
        from ..export.build_process import build_in_child

        model = find_or_export_onnx(self.component, cache_dir=self.store.root)
        kernels = self._kernels(model)
        seconds = last_seconds(self.store, self.description)
        last = "" if seconds is None else f"; last time it took {seconds:.0f} s"
        _log.info("building the %s engine of %s%s", self.target.product, self.title, last)
        figures = build_in_child(self._request(model, kernels, directory), expected_seconds=seconds)
        self.done = True
        return figures

    def _kernels(self, model: Path) -> Mapping[str, Any]:
        """The compiled kernels of its plugins."""
        names = tuple(self.description["plugins"])
        if not names:
            return {}
        from ..export.plugin_kernels import plugin_kernels

        _log.info("compiling the kernels of %s for the plugins %s", self.title, ", ".join(names))
        return plugin_kernels(model, names, tuple(self.description["archs"]), cache=self.store.root / "aot")

    def _request(self, model: Path, kernels: Mapping[str, Any], directory: Path) -> EngineRequest:
        from ..export.tensorrt import EngineRequest

        description, name = self.description, self.target.product
        return EngineRequest(
            component=self.component.name,
            product=name,
            model=str(model),
            plan=str(directory / PLAN_FILE),
            profiles=tuple(
                {spec.name: profile.shapes(spec) for spec in self.component.inputs}
                for profile in map(Profile.from_json, description["profiles"])
            ),
            archs=tuple(description["archs"]),
            weight_streaming=description["weight_streaming"],
            hardware_compatibility=description["hardware_compatibility"],
            tf32=description["tf32"],
            plugins=tuple(description["plugins"]),
            kernels=kernels,
            timing_cache=_timings(self.store, name, description["version"]),
            gpu=_one_of_several(self.device) if product(name).needs_gpu else None,
        )


def _fetch(key: str, build: _EngineBuild, rebuild: Rebuild) -> Path:
    """The folder of the engine in the cache, built first as `rebuild` says, but not twice.

    Raises:
        BackendError: it is not there, and `rebuild` is "never".
    """
    if rebuild != "never":
        again = rebuild == "always" and not build.done
        return build.store.get_or_build(key, build.description, build, again=again)
    folder = build.store.get(key)
    if folder is None:
        raise BackendError(
            f"the cache {build.store.root} has no {build.target.product} engine of {build.title} that runs here; "
            "`latentrt build` makes one"
        )
    return folder


def _refuse_or_warn(found: Entry, title: str, rebuild: Rebuild) -> None:
    what = (
        f"the engine {found.key[:12]} of {title} computed something else than PyTorch when it was verified "
        "(`latentrt cache list`); run `latentrt verify` again, or use another back end or dtype"
    )
    if rebuild == "never":
        raise BackendError(what)
    _log.warning("%s", what)


def _one_of_several(device: torch.device | None) -> str | None:
    """The UUID of a GPU, which is the same in every process; None if it is the only one."""
    if torch.cuda.device_count() < 2:
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _timings(store: Store, name: str, version: str) -> str | None:
    """The timing cache of one version of TensorRT; None for TensorRT for RTX, which times nothing."""
    if not product(name).needs_gpu:
        return None
    return str(store.root / "timings" / f"{digest_of({'of': version})[:12]}.cache")


@cache
def exporter_digest() -> str:
    """SHA-256, in hex, over the sources that decide what an export contains."""
    files = [path for folder in _SOURCES for path in sorted((_PACKAGE / folder).rglob("*.py"))]
    files += [_PACKAGE / file for file in _SOURCE_FILES]
    deciding = [path for path in files if not path.as_posix().endswith((*_BUILDER, *_OTHERS))]
    return digest_of_files(deciding, _PACKAGE)


def _describe_model(component: Component, distributions: Iterable[str]) -> dict[str, Any]:
    """Everything that an exported model depends on."""
    return {
        "name": component.name,
        "kind": "onnx",
        "fingerprint": component.fingerprint,
        "dtype": dtype_name(component.dtype),
        "inputs": [_interface(spec) for spec in component.inputs],
        "outputs": [_interface(spec) for spec in component.outputs],
        "exporter": exporter_digest(),
        "versions": _versions(distributions),
    }


def _interface(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} {list(spec.dims)}"


def _versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of the installed distributions, without local suffixes such as +cu128 or +cpu."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return versions
