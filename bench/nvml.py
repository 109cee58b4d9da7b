"""What NVIDIA's management library tells of one GPU: memory, energy, clocks. Where it is absent there is nothing.

Inside a container the driver lists processes by numbers that the container does not know. `GpuShare` then goes by
turns: sides wait for each other, so what the device's memory changes by while one is at work is that one's, as long as
nobody else uses the GPU.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch

__all__ = ["GpuShare", "Nvml", "open_nvml"]


class Nvml:
    """One GPU by its handle.

    Attributes:
        unsupported: functions, with their arguments, that this GPU or driver lacks, found out by asking.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._nvml = library
        self._handle = handle
        self.unsupported: set[tuple[Any, ...]] = set()

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
        """Clocks in MHz, power and its limit in W, temperature in degrees Celsius, as they are now."""
        n = self._nvml
        asked = {
            "sm_mhz": ("nvmlDeviceGetClockInfo", n.NVML_CLOCK_SM, 1.0),
            "memory_mhz": ("nvmlDeviceGetClockInfo", n.NVML_CLOCK_MEM, 1.0),
            "power_w": ("nvmlDeviceGetPowerUsage", None, 1e-3),
            "power_limit_w": ("nvmlDeviceGetEnforcedPowerLimit", None, 1e-3),
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
        """None where there is no answer. What is not supported is not asked again; any other error may pass."""
        if (function, *arguments) in self.unsupported:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_NOT_SUPPORTED:
                self.unsupported.add((function, *arguments))
            return None


class GpuShare:
    """How much of a GPU's memory is this process's; made before it uses the GPU.

    Attributes:
        series: what the figure is called: `gpu` where the driver tells it of this process, `gpu by turns` where it is
            what the device's use changed by during this process's turns.
    """

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._own = 0
        self._before: int | None = None
        self.series = "gpu by turns"

    def begin(self) -> None:
        """This process's turn begins."""
        self._before = self._nvml.device_bytes()

    def end(self) -> None:
        """The turn is over; what it left on the device stays this process's."""
        self._own = self.used() or 0
        self._before = None

    def used(self) -> int | None:
        """Bytes now, in a turn; None where the driver does not even tell the device's."""
        mine = self._nvml.process_bytes()
        if mine is not None:
            self.series = "gpu"
            return mine
        now = self._nvml.device_bytes()
        return None if now is None or self._before is None else max(0, self._own + now - self._before)


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
