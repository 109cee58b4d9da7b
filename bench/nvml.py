"""Memory, energy and clocks of one GPU, from NVIDIA's management library (NVML) if it is installed.

Inside a container the driver lists processes by ids of the host, which the container does not know. `GpuShare` then
counts by turns. Only one side runs at a time, so any change of the device's memory during its turn is that side's, as
long as nobody else uses the GPU.
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
        unsupported: functions, with their arguments, that this GPU or driver turned out not to support.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        self._nvml = library
        self._handle = handle
        self.unsupported: set[tuple[Any, ...]] = set()

    def process_bytes(self) -> int | None:
        """Memory of this process on the GPU, whichever library allocated it. None if the driver does not list this
        process, as in some containers."""
        rows = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        own = [row.usedGpuMemory for row in rows if row.pid == os.getpid()]
        return int(own[0]) if own and own[0] is not None else None

    def device_bytes(self) -> int | None:
        """Memory in use on the GPU by all processes."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def joules(self) -> float | None:
        """Energy used since the driver was loaded."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def state(self) -> dict[str, float]:
        """Present clocks in MHz, power and power limit in W, and temperature in degrees Celsius."""
        n = self._nvml
        queries = {
            "sm_mhz": ("nvmlDeviceGetClockInfo", n.NVML_CLOCK_SM, 1.0),
            "memory_mhz": ("nvmlDeviceGetClockInfo", n.NVML_CLOCK_MEM, 1.0),
            "power_w": ("nvmlDeviceGetPowerUsage", None, 1e-3),
            "power_limit_w": ("nvmlDeviceGetEnforcedPowerLimit", None, 1e-3),
            "temperature_c": ("nvmlDeviceGetTemperature", n.NVML_TEMPERATURE_GPU, 1.0),
        }
        values = {}
        for name, (function, argument, unit) in queries.items():
            value = self._ask(function, *(() if argument is None else (argument,)))
            if value is not None:
                values[name] = value * unit
        return values

    def driver(self) -> str:
        """The driver's version."""
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Call a function of NVML; None if it fails. An unsupported one is not called again; other errors may be
        temporary."""
        if (function, *arguments) in self.unsupported:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_NOT_SUPPORTED:
                self.unsupported.add((function, *arguments))
            return None


class GpuShare:
    """This process's share of a GPU's memory. Has to be created before the process uses the GPU.

    Attributes:
        series: the kind of memory in `monitor.Series`: `gpu` if the driver reports it for this process, `gpu by turns`
            if it is the change of the device's memory during this process's turns.
    """

    def __init__(self, nvml: Nvml) -> None:
        self._nvml = nvml
        self._own = 0
        self._before: int | None = None
        self.series = "gpu by turns"

    def begin(self) -> None:
        """Begin this process's turn."""
        self._before = self._nvml.device_bytes()

    def end(self) -> None:
        """End the turn. What the process still holds on the device stays its own."""
        self._own = self.used() or 0
        self._before = None

    def used(self) -> int | None:
        """Bytes in use now; None outside a turn, or if the driver does not even report the device's memory."""
        own = self._nvml.process_bytes()
        if own is not None:
            self.series = "gpu"
            return own
        now = self._nvml.device_bytes()
        return None if now is None or self._before is None else max(0, self._own + now - self._before)


def open_nvml(device: torch.device) -> Nvml | None:
    """NVML for a CUDA device. None for other devices, and if the library or the driver is missing."""
    if device.type != "cuda":
        return None
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        # By UUID: NVML numbers all GPUs, PyTorch only those that are visible to it.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        return Nvml(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError:
        return None
