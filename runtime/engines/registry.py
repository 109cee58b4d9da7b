"""The back ends there are, by name, and the choice among them.

A back end's module is imported when that back end is asked for. A new one is a line in `_BACKENDS`, and a
place in `_PREFERENCE` once it has been measured to deserve one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import cast

import torch

from ...errors import BackendUnavailableError, UnknownBackendError
from ..checks import shown
from .base import Availability, Backend

__all__ = [
    "Description",
    "backend_names",
    "choose",
    "describe",
    "get_backend",
]

_log = logging.getLogger(__name__)

# name -> module of this package and the class in it
_BACKENDS = {
    "onnxruntime": (".onnxruntime", "OnnxRuntimeBackend"),
    "eager": (".eager", "EagerBackend"),
    "triton": (".triton", "TritonBackend"),
    "tensorrt": (".tensorrt", "TensorRTBackend"),
    "tensorrt-rtx": (".tensorrt", "TensorRTRTXBackend"),
}

# What `auto` tries, best first. On the CPU ONNX Runtime is faster and gives an image the same bits at any batch
# size. Elsewhere the project's own kernels, which need no export, then PyTorch's. TensorRT has never been run: who
# wants it asks for it.
_PREFERENCE = {"cpu": ("onnxruntime", "eager")}
_PREFERENCE_ELSEWHERE = ("triton", "eager", "onnxruntime")


@dataclass(frozen=True)
class Description:
    """One row of `latentrt backends`.

    Attributes:
        reason: a version where the back end can run, else why it cannot.
        remedy: what would make it run; empty where it can.
        preferred: whether `auto` takes it.
    """

    name: str
    available: bool
    reason: str
    remedy: str
    preferred: bool


def backend_names() -> list[str]:
    """Every name that `get_backend` takes, whether or not it can run here."""
    return list(_BACKENDS)


def get_backend(name: str) -> Backend:
    """The back end of that name, which may still be unable to run here: ask its `availability`.

    Raises:
        UnknownBackendError: no such name; the names are listed.
    """
    if not isinstance(name, str) or name not in _BACKENDS:
        raise UnknownBackendError(f"no back end {shown(name)}; there are {', '.join(_BACKENDS)}, and auto")
    module, cls = _BACKENDS[name]
    return cast(Backend, getattr(import_module(module, __package__), cls)())


def choose(name: str, device: torch.device, *dtypes: torch.dtype) -> Backend:
    """The back end `name`, or with `"auto"` the best that can run all of `dtypes`, by default float32, on `device`.
    Logged with its reason at INFO.

    Raises:
        UnknownBackendError: no such name.
        BackendUnavailableError: it cannot run here; says why and what would change that.
    """
    if isinstance(name, str) and name == "auto":
        return _best(device, dtypes)
    backend = get_backend(name)
    found = _availability(backend, device, dtypes)
    if not found.ok:
        raise BackendUnavailableError(f"back end {name!r} cannot run here: {found.reason}; {found.remedy}")
    _log.info("back end %s: asked for; %s", name, found.reason)
    return backend


def _best(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Backend:
    """The first one by preference that can run here.

    Raises:
        BackendUnavailableError: none can.
    """
    passed_over: list[str] = []
    for candidate in _preferred(device):
        backend = get_backend(candidate)
        found = _availability(backend, device, dtypes)
        if found.ok:
            why = f"the best for {device.type}; {found.reason}"
            if passed_over:
                why = f"{found.reason}; passed over {'; '.join(passed_over)}"
            _log.info("back end %s: %s", candidate, why)
            return backend
        passed_over.append(f"{candidate}: {found.reason} ({found.remedy})")
    wanted = " and ".join(str(dtype) for dtype in dtypes or (torch.float32,))
    raise BackendUnavailableError(f"no back end runs {wanted} on {device}: {'; '.join(passed_over)}")


def describe(device: torch.device) -> list[Description]:
    """Every back end, best first, with whether it can run float32 on `device`."""
    preferred = _preferred(device)
    rows: list[Description] = []
    chosen: str | None = None
    for name in (*preferred, *(n for n in _BACKENDS if n not in preferred)):
        found = get_backend(name).availability(device, torch.float32)
        if found.ok and chosen is None and name in preferred:
            chosen = name
        rows.append(Description(name, found.ok, found.reason, found.remedy, name == chosen))
    return rows


def _preferred(device: torch.device) -> tuple[str, ...]:
    return _PREFERENCE.get(device.type, _PREFERENCE_ELSEWHERE)


def _availability(backend: Backend, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Availability:
    """Why the first of these dtypes cannot run, or that all of them can."""
    found = [backend.availability(device, dtype) for dtype in dtypes or (torch.float32,)]
    return next((x for x in found if not x.ok), found[0])
