"""What the host has left, in a container too; and the peak of this process alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from latentrt.runtime import host_memory


@pytest.mark.parametrize(
    ("limit", "available"),
    [("max", 4_096_000), ("2000000", 2_000_000 - 1_500_000 + 400_000), (None, 4_096_000)],
)
def test_memory_within_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, available: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1500000\n")
        (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 400000\n")
    assert host_memory.available_bytes() == available


def test_without_proc_files_memory_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("_MEMINFO", "_STATUS", "_CLEAR"):
        monkeypatch.setattr(host_memory, file, tmp_path / "none" / "of it")
    assert host_memory.available_bytes() is None
    assert host_memory.peak_bytes() is None
    with pytest.raises(OSError, match="of it"):
        host_memory.forget_peak()


def test_the_peak_is_this_process_s_own() -> None:
    """Not that of its parent, whose memory a process has until its program begins."""
    told = "from latentrt.runtime.host_memory import peak_bytes; print(peak_bytes())"
    parent = (
        "import subprocess, sys; held = bytearray(b'1') * (1 << 29); subprocess.run(sys.argv[1:], check=True)"
    )
    command = [sys.executable, "-c", parent, sys.executable, "-c", told]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert 1e6 < int(found) < 2**28


def test_a_peak_is_forgotten() -> None:
    held = bytearray(b"1") * (1 << 28)
    peak = host_memory.peak_bytes()
    del held
    assert peak is not None
    host_memory.forget_peak()
    after = host_memory.peak_bytes()
    assert after is not None
    assert after < peak - 2**27
