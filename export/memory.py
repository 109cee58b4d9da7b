"""What memory a build takes and what there is, before it starts."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "build_bytes", "estimated_bytes", "peak_bytes"]

# Peaks of builds by TensorRT for RTX 1.7, resident: 3.8 times the weights for SDXL's base UNet (5.1 GB), 3.4 times
# for the refiner's (4.5 GB), 0.6 GB for networks of a few megabytes.
_PER_WEIGHT_BYTE = 3.7
_ALWAYS = 600 << 20

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")


def estimated_bytes(model: Path) -> int:
    """Peak memory of building the ONNX model at `model`, whose weights lie beside it."""
    return build_bytes(sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*")))


def build_bytes(weights: int) -> int:
    """Peak memory of building a model of so many bytes of weights."""
    return int(_PER_WEIGHT_BYTE * weights) + _ALWAYS


def available_bytes() -> int | None:
    """Memory that can be had without swapping, within the limits of a container; None where nobody says (not Linux)."""
    free = _field(_MEMINFO, "MemAvailable:")
    if free is None:
        return None
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free * 1024  # no container, or one of the older kind of groups
    if limit == "max":
        return free * 1024
    # Cached files count as used, and go when their memory is wanted.
    cached = _field(_CGROUP / "memory.stat", "inactive_file") or 0
    return min(free * 1024, int(limit) - int(used) + cached)


def peak_bytes() -> int | None:
    """The most memory this process has had; None where nobody says. (`getrusage` would count its parent's too.)"""
    peak = _field(_STATUS, "VmHWM:")
    return None if peak is None else peak * 1024


def _field(file: Path, name: str) -> int | None:
    """The number after a name, at the beginning of a line of a file of the kernel's."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
