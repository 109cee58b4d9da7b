"""Where the runtime asks for an export: the ONNX model of a component, from the cache or made now.

The only module of the runtime that imports `export`, and only when the cache lacks the model: reading a
cached model needs neither torch.export nor onnx.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .cache import Store, cache_root, digest_of
from .engines.base import Component, TensorSpec

__all__ = ["exporter_digest", "onnx_model"]

_log = logging.getLogger(__name__)

MODEL_FILE = "model.onnx"

# PyTorch's tracing is not meant for several threads.
_ONE_AT_A_TIME = threading.Lock()

_PACKAGE = Path(__file__).resolve().parents[1]
# What an exported graph is made of: a change in any of these sources is another graph.
_SOURCES = ("kernels", "runtime/models", "export")
_DISTRIBUTIONS = ("torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu")


def onnx_model(component: Component, *, cache_dir: Path | None) -> Path:
    """The file of the component's ONNX model, with its weights beside it, in the cache.

    Exported and checked against PyTorch when the cache has no whole copy made from the same weights by the
    same code and versions.

    Raises:
        ExportError: the component could not be exported, or the export computes something else.
        CacheError: the cache cannot be written.
    """
    description = {
        "name": component.name,
        "kind": "onnx",
        "fingerprint": component.fingerprint,
        "dtype": str(component.dtype).removeprefix("torch."),
        "inputs": [_interface(spec) for spec in component.inputs],
        "outputs": [_interface(spec) for spec in component.outputs],
        "exporter": exporter_digest(),
        "versions": _versions(),
    }

    def build(directory: Path) -> Mapping[str, Any]:
        from ..export import export_checked

        _log.info("exporting %s to ONNX; this is done once", component.name)
        with _ONE_AT_A_TIME:
            return export_checked(component, directory / MODEL_FILE)

    store = Store(cache_root(cache_dir))
    return store.get_or_build(digest_of(description), description, build) / MODEL_FILE


@cache
def exporter_digest() -> str:
    """SHA-256, in hex, over the sources that decide what an export contains."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((_PACKAGE / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _interface(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} {list(spec.dims)}"


def _versions() -> dict[str, str]:
    """Versions of what an export is made and checked with, as far as it is installed."""
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
