"""What memory a build takes and what there is, before it starts."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "estimated_bytes"]

# Peaks of builds by TensorRT for RTX 1.7, resident: 3.8 times the weights for SDXL's base UNet (5.1 GB), 3.4 times
# for the refiner's (4.5 GB), 0.6 GB for networks of a few megabytes.
_PER_WEIGHT_BYTE = 3.7
_ALWAYS = 600 << 20

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def estimated_bytes(model: Path) -> int:
    """Peak memory of building the ONNX model at `model`, whose weights lie beside it."""
    weights = sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*"))
    return int(_PER_WEIGHT_BYTE * weights) + _ALWAYS


def available_bytes() -> int | None:
    """Memory that can be had without swapping, within the limits of a container; None where nobody says (not Linux)."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return None
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        # Cached files count as used, and go when their memory is wanted.
        cached = next(
            int(line.split()[1])
            for line in (_CGROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, StopIteration):
        return free  # no container, or one of the older kind of groups
    return free if limit == "max" else min(free, int(limit) - int(used) + cached)
