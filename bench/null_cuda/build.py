"""Compile the stand-in for CUDA's libraries against the headers that come with PyTorch."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import BackendUnavailableError

__all__ = ["build", "compiled", "environment"]

_SOURCE = Path(__file__).with_name("driver.c")
_NAMES = re.compile(r" U ((?:cublas|cudnn|cuda|cu)[A-Z]\w*|__cuda\w+)")
_CALLS = re.compile(r"\b(cu[A-Z]\w+)\(")
_KEPT = re.compile(r"cuFile|cudnnGet(Last)?ErrorString|cublasLtGetVersion")
"""What real libraries answer without a device, or nobody calls."""


def build(folder: Path) -> Path:
    """The library, in `folder`, under the name by which the driver is looked for.

    Raises:
        BackendUnavailableError: PyTorch is not a CUDA build.
        OSError: there is no gcc, or no nm.
    """
    packages = Path(sysconfig.get_path("purelib"))
    nvidia = packages / "triton" / "backends" / "nvidia"
    # Those of PyTorch's version, since they say how large its structures are; what they include, Triton has of another.
    headers = [*sorted((packages / "nvidia").glob("cu*/include")), nvidia / "include"]
    libraries = sorted((packages / "torch" / "lib").glob("*.so"))
    if not any(path.name == "libtorch_cuda.so" for path in libraries) or not nvidia.is_dir():
        raise BackendUnavailableError(f"no CUDA build of PyTorch lies in {packages}: see CONTRIBUTING.md")
    told = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, libraries)], check=True, capture_output=True, text=True
    )
    # Triton compiles what loads its kernels against the driver when it first does.
    loader = (nvidia / "driver.c").read_text("utf-8")
    return compiled(folder, {*_NAMES.findall(told.stdout), *_CALLS.findall(loader)}, headers)


def compiled(folder: Path, names: Iterable[str], headers: Iterable[Path]) -> Path:
    """The library, with a function that does nothing for each of `names` that the source has not."""
    folder.mkdir(parents=True, exist_ok=True)
    there = set(re.findall(r"\w+", _SOURCE.read_text("utf-8")))  # more than are defined there does no harm
    missing = sorted(name for name in set(names) - there if not _KEPT.match(name))
    stubs, library = folder / "stubs.c", folder / "libcuda.so.1"
    lines = (f'__attribute__((visibility("default"))) int {name}(void) {{ return 0; }}' for name in missing)
    stubs.write_text("\n".join(lines) + "\n", "utf-8")
    command = ["gcc", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-w", f"-Wl,-soname,{library.name}"]
    command += [
        *(f"-I{path}" for path in headers),
        str(_SOURCE),
        str(stubs),
        "-o",
        str(library),
        "-lpthread",
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return library


def environment(library: Path, **settings: object) -> Mapping[str, str]:
    """What a process needs in its environment to have the device; `settings` are those of `driver.c`."""
    folder = str(library.parent)
    found = {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        # What was linked with a real driver is not to be used.
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
    }
    return found | {f"NULL_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
