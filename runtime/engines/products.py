"""The two TensorRT products behind one face: found lazily, their versions held, their logs turned into errors.

TensorRT compiles for the GPU it builds on; TensorRT for RTX compiles for named architectures, without a GPU,
and finishes on the GPU when an engine is loaded. Their Python API is the same but for what is noted where it is
used. Nothing here imports torch: the process that builds engines needs its memory for something else.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import BackendUnavailableError, UnknownBackendError

__all__ = [
    "Product",
    "architectures",
    "driver_class",
    "has_plugin_library",
    "load",
    "logger",
    "make",
    "plugin_library",
    "product",
]

_log = logging.getLogger(__name__)

_RTX_LIBRARY = "libtensorrt_rtx.so"


@dataclass(frozen=True)
class Product:
    """One of them.

    Attributes:
        name: as in `--engine` and `--backend`.
        title: as its maker writes it.
        modules: names it may be imported by, best first.
        oldest: the first version that reads the exported models: TensorRT's parser has Attention since 10.14.
        newest: the last major version whose API is the one used here.
        install: what to run where it is missing.
        needs_gpu: whether building takes a GPU.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    oldest: tuple[int, int]
    newest: int
    install: str
    needs_gpu: bool


_PRODUCTS = {
    product.name: product
    for product in (
        Product("tensorrt", "TensorRT", ("tensorrt",), (10, 14), 11, 'pip install "latentrt[gpu]"', True),
        Product(
            "tensorrt-rtx",
            "TensorRT for RTX",
            # The second is there without the meta package, whose name the first is.
            ("tensorrt_rtx", "tensorrt_rtx_bindings"),
            (1, 7),
            1,
            'pip install "latentrt[rtx]"',
            False,
        ),
    )
}


def product(name: str) -> Product:
    """The product of that name.

    Raises:
        UnknownBackendError: there is none.
    """
    if name not in _PRODUCTS:
        raise UnknownBackendError(f"no engine {name!r}; there are {', '.join(_PRODUCTS)}")
    return _PRODUCTS[name]


@cache
def load(product: Product) -> Any:
    """The product's module.

    Raises:
        BackendUnavailableError: it is not installed, cannot be imported, or is too old or too new.
    """
    name = next((m for m in product.modules if util.find_spec(m) is not None), None)
    if name is None:
        raise BackendUnavailableError(f"{product.title} is not installed; {product.install}")
    try:
        module = import_module(name)
    except Exception as error:  # a missing library, or a package that is not what its name says
        raise BackendUnavailableError(
            f"{product.title} is installed but cannot be imported ({error}); {product.install}"
        ) from error
    version = str(getattr(module, "__version__", "of no version"))
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not (product.oldest <= found and found[0] <= product.newest):
        oldest = ".".join(map(str, product.oldest))
        raise BackendUnavailableError(
            f"{product.title} {version} is installed, and latentrt drives {oldest} to {product.newest}.x; "
            f"{product.install}"
        )
    return module


def architectures(trt: Any) -> tuple[int, ...]:
    """Compute capabilities, such as 89, that TensorRT for RTX builds for; none for TensorRT, which takes the GPU's."""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", ())
    return tuple(sorted(int(n.removeprefix("SM")) for n in names if n.startswith("SM")))


def driver_class(product: Product) -> str:
    """What an engine of this product asks of the driver: the CUDA major it was tuned under, or "any".

    Raises:
        BackendUnavailableError: there is no driver, and the product needs one.
    """
    if not product.needs_gpu:
        return "any"
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError as error:
        raise BackendUnavailableError(
            f"{product.title} builds on the GPU it is for, and there is no NVIDIA driver ({error}); build with "
            "tensorrt-rtx, which takes no GPU, or on the machine that will run it"
        ) from error
    return f"cuda-{version.value // 1000}"


def has_plugin_library(product: Product) -> bool:
    """Whether the parser of TensorRT for RTX would find the library that it opens when it meets a plugin."""
    if product.needs_gpu:
        return True
    try:
        ctypes.CDLL(_RTX_LIBRARY)
    except OSError:
        return False
    return True


@contextmanager
def plugin_library(product: Product) -> Iterator[dict[str, str]]:
    """Environment for a process in which `has_plugin_library` is true, as long as this lasts.

    The parser asks for the library without the version that its wheel has in the file's name.
    """
    wheel = util.find_spec("tensorrt_rtx_libs")
    libraries = [] if wheel is None else list(wheel.submodule_search_locations or ())
    found = [file for folder in libraries for file in Path(folder).glob(f"{_RTX_LIBRARY}.*")]
    if has_plugin_library(product) or not found:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _RTX_LIBRARY).symlink_to(found[0])
        paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        yield {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


def make(factory: Callable[[Any], Any], log: Any) -> Any:
    """A builder or a runtime; None where it cannot start, and the log says why."""
    try:
        return factory(log)
    except TypeError:  # the binding's way to say so: "factory function returned nullptr"
        return None


class _Said(NamedTuple):
    number: int
    thread: int
    text: str


@cache
def logger(trt: Any) -> Any:
    """The one logger of all of a product's objects, which TensorRT goes on using when the first of them is gone.

    What went wrong in the calling thread since it called `clear()` is in `errors`, and where nothing did, what went
    wrong meanwhile in others, of which TensorRT has its own; the thread's warnings are in `warnings`.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: deque[_Said] = deque(maxlen=256)
            self._warnings: deque[_Said] = deque(maxlen=256)
            self._count = itertools.count()
            self._cleared: dict[int, int] = {}  # by thread, when

        def log(self, severity: Any, message: str) -> None:
            said = _Said(next(self._count), threading.get_ident(), " ".join(message.split()))
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._errors.append(said)
                return
            if severity == trt.ILogger.WARNING:
                self._warnings.append(said)
            _log.debug("%s", message)

        def clear(self) -> None:
            self._cleared[threading.get_ident()] = next(self._count)

        @property
        def errors(self) -> list[str]:
            return self._since(self._errors) or self._since(self._errors, of_others=True)

        @property
        def warnings(self) -> list[str]:
            return self._since(self._warnings)

        def _since(self, said: deque[_Said], *, of_others: bool = False) -> list[str]:
            me = threading.get_ident()
            cleared = self._cleared.get(me, -1)
            return [x.text for x in tuple(said) if x.number > cleared and (x.thread != me) == of_others]

        def why(self) -> str:
            """The errors in one line, each once."""
            # Without a driver every object complains of that as it is made, and works all the same.
            errors = self.errors
            telling = [e for e in errors if "cudaError 35" not in e] or errors
            return "; ".join(dict.fromkeys(telling)) or "it does not say why"

    return Log()
