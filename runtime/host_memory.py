"""The host's available memory, and this process's peak, as Linux reports them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "forget_peak", "peak_bytes"]

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available_bytes() -> int | None:
    """Bytes that can be allocated without swapping, within a container's limit; None if unknown (not Linux)."""
    free = _field(_MEMINFO, "MemAvailable:")
    if free is None:
        return None
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free * 1024  # no container, or cgroup v1
    if limit == "max":
        return free * 1024
    # Cached files count as used, but are evicted when memory is short.
    cached = _field(_CGROUP / "memory.stat", "inactive_file") or 0
    return min(free * 1024, int(limit) - int(used) + cached)


def peak_bytes() -> int | None:
    """Bytes of this process's peak resident memory, pages of mapped files included; None if unknown (not Linux).

    `getrusage` would include the parent's, from before this program was executed.
    """
    peak = _field(_STATUS, "VmHWM:")
    return None if peak is None else peak * 1024


def forget_peak() -> None:
    """Reset `peak_bytes` to the memory that the process has now.

    Raises:
        OSError: it is not counted here (not Linux).
    """
    _CLEAR.write_text("5")


def _field(file: Path, name: str) -> int | None:
    """The number after a name, where a line of one of the kernel's files begins with it."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
