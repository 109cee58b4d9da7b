"""Compiles the stand-in for CUDA's libraries against the headers that come with PyTorch."""

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
_NOT_REPLACED = re.compile(r"cuFile|cudnnGet(Last)?ErrorString|cublasLtGetVersion")
"""Functions that the real libraries answer without a device, or that nobody calls."""


def build(folder: Path) -> Path:
    """Build the library in `folder`, under the file name of CUDA's driver.

    Raises:
        BackendUnavailableError: PyTorch is not a CUDA build.
        OSError: gcc or nm is not installed.
    """
    packages = Path(sysconfig.get_path("purelib"))
    nvidia = packages / "triton" / "backends" / "nvidia"
    # PyTorch's headers first, since the sizes of structures must be those of its version. Triton's, of another version,
    # have what these include.
    headers = [*sorted((packages / "nvidia").glob("cu*/include")), nvidia / "include"]
    libraries = sorted((packages / "torch" / "lib").glob("*.so"))
    if not any(path.name == "libtorch_cuda.so" for path in libraries) or not nvidia.is_dir():
        raise BackendUnavailableError(f"no CUDA build of PyTorch lies in {packages}: see CONTRIBUTING.md")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, libraries)], check=True, capture_output=True, text=True
    )
    # Triton compiles its launcher against the driver when it first runs.
    loader = (nvidia / "driver.c").read_text("utf-8")
    return compiled(folder, {*_NAMES.findall(symbols.stdout), *_CALLS.findall(loader)}, headers)


def compiled(folder: Path, names: Iterable[str], headers: Iterable[Path]) -> Path:
    """Compile the library, with a stub that does nothing for each of `names` that the source does not define."""
    folder.mkdir(parents=True, exist_ok=True)
    # All words of the source, which are more than its functions.
    defined = set(re.findall(r"\w+", _SOURCE.read_text("utf-8")))
    missing = sorted(name for name in set(names) - defined if not _NOT_REPLACED.match(name))
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
    """The environment variables with which a process has the device.

    Args:
        settings: of `driver.c`, such as `bytes` for NULL_CUDA_BYTES.
    """
    folder = str(library.parent)
    variables = {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        # Not the usual cache, whose launchers are linked with the real driver.
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
    }
    return variables | {f"NULL_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
