"""What memory the host has left, and the most that this process has had of it, as Linux tells them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "forget_peak", "peak_bytes"]

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


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
    """The most memory this process has had, pages of mapped files included; None where nobody says.

    `getrusage` would count its parent's too, from before this program began.
    """
    peak = _field(_STATUS, "VmHWM:")
    return None if peak is None else peak * 1024


def forget_peak() -> None:
    """From here on `peak_bytes` counts from what the process has now.

    Raises:
        OSError: nobody counts it here (not Linux).
    """
    _CLEAR.write_text("5")


def _field(file: Path, name: str) -> int | None:
    """The number after a name, at the beginning of a line of a file of the kernel's."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
