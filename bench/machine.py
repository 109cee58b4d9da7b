"""Describes what a measurement was made on: processor, memory, GPU, versions and commit."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels import tuning
from ..runtime.sha256 import digest_of_files

__all__ = [
    "RESULTS",
    "ROOT",
    "command",
    "commit",
    "describe_machine",
    "installed_versions",
    "is_clean_commit",
    "module_command",
    "tuned_digest",
]

ROOT = Path(__file__).resolve().parents[1]
"""The repository's root, which is the package's folder."""
RESULTS = ROOT / "bench" / "results"
"""Published results."""
_PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "diffusers",
    "transformers",
    "triton",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13-libs",
    "tensorrt-rtx-cu13-bindings",
    "torchmetrics",
    "mlcommons-loadgen",
)
"""Distributions whose versions are reported; some libraries have several names."""


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Everything that one has to know about a machine to interpret a figure.

    Args:
        device: that was measured. If it is the CPU, no GPU is described; if None, the current GPU is, if there is one.
    """
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "commit": commit(),
    }
    if device is not None:
        machine["device"] = str(device)
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        machine["tuned"] = tuned_digest()
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def installed_versions() -> dict[str, str]:
    """Versions of the packages that figures depend on, and of the cuDNN that PyTorch runs."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return versions


def tuned_digest() -> str:
    """Digest of the kernels' block sizes, which `latentrt kernels --tune` changes without a commit."""
    return digest_of_files(sorted(tuning.FOLDER.glob("*.json")), tuning.FOLDER)[:16]


@functools.cache
def commit() -> str:
    """This project's commit, with a `+` if files were modified since. Results and tuned block sizes do not count.

    Without a repository it is the value of LATENTRT_COMMIT, or `unknown`.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!bench/results", ":!kernels/tuned")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LATENTRT_COMMIT", "").strip() or "unknown"


def command() -> str:
    """The command line of this process, quoted so that it can be run again."""
    return shlex.join(["latentrt", *sys.argv[1:]])


def module_command(module: str, arguments: Sequence[str] | None) -> str:
    """The command line of a module that is run with `python -m`.

    Args:
        module: its full name.
        arguments: the arguments of its `main`; those of this process if None.
    """
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def is_clean_commit(name: str) -> bool:
    """Whether a name that `commit` returned identifies the sources exactly."""
    return name != "unknown" and not name.endswith("+")
