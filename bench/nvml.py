"""What NVIDIA's management library tells of one GPU: memory, energy, clocks. Where it is absent there is nothing."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch

__all__ = ["Nvml", "open_nvml"]


class Nvml:
    """One GPU by its handle.

    Attributes:
        unreadable: what this GPU or driver does not tell, found out by asking.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._nvml = library
        self._handle = handle
        self.unreadable: set[str] = set()

    def process_bytes(self) -> int | None:
        """Memory of this process on the GPU, whoever allocated it. None where the driver does not tell processes
        apart (in some containers)."""
        rows = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        mine = [row.usedGpuMemory for row in rows if row.pid == os.getpid()]
        return int(mine[0]) if mine and mine[0] is not None else None

    def device_bytes(self) -> int | None:
        """Memory in use on the GPU, by every process."""
        found = self._ask("nvmlDeviceGetMemoryInfo")
        return None if found is None else int(found.used)

    def joules(self) -> float | None:
        """Energy since the driver was loaded."""
        found = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None else found / 1e3

    def state(self) -> dict[str, float]:
        """Clocks in MHz, power in W, temperature in degrees Celsius, as they are now."""
        n = self._nvml
        asked = {
            "sm_mhz": ("nvmlDeviceGetClockInfo", n.NVML_CLOCK_SM, 1.0),
            "memory_mhz": ("nvmlDeviceGetClockInfo", n.NVML_CLOCK_MEM, 1.0),
            "power_w": ("nvmlDeviceGetPowerUsage", None, 1e-3),
            "temperature_c": ("nvmlDeviceGetTemperature", n.NVML_TEMPERATURE_GPU, 1.0),
        }
        found = {}
        for name, (function, argument, unit) in asked.items():
            value = self._ask(function, *(() if argument is None else (argument,)))
            if value is not None:
                found[name] = value * unit
        return found

    def driver(self) -> str:
        """The driver's version."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def _ask(self, function: str, *arguments: Any) -> Any:
        if function in self.unreadable:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:
            self.unreadable.add(function)
            return None


def open_nvml(device: torch.device) -> Nvml | None:
    """Of a CUDA device; None for others, and where the library or its driver is not there."""
    if device.type != "cuda":
        return None
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        # NVML counts all GPUs, PyTorch those it was shown.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        return Nvml(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError:
        return None
