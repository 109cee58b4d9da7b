"""Devices, dtypes and amounts of memory, parsed from what a caller wrote; and the memory that a device has."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import BackendUnavailableError, RequestError
from .checks import shown

__all__ = [
    "CPU_FLOAT32",
    "dtype_name",
    "free_memory",
    "memory_ran_out",
    "parse_bytes",
    "parse_device",
    "parse_dtype",
    "release_memory",
]

CPU_FLOAT32: Mapping[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Arguments for tables made by torch, which must not follow a program's torch.set_default_dtype or _device."""

_UNITS = {"": 1} | {x + i: base**k for i, base in (("", 1000), ("I", 1024)) for k, x in enumerate("KMGT", 1)}
_NO_MEMORY = (
    *("out of memory", "outofmemory", "allocate memory", "bad_alloc", "enough free memory"),
    # PyTorch's convolutions, if no cuDNN engine's workspace fits.
    *("unable to find an engine to execute this computation", "unable to find a valid cudnn algorithm"),
    "cublas_status_alloc_failed",
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_dtype(value: torch.dtype | str) -> torch.dtype:
    """A dtype from itself or its name.

    Raises:
        RequestError: it is not float32, float16 or bfloat16.
    """
    name = dtype_name(value) if isinstance(value, (torch.dtype, str)) else ""
    if name not in _DTYPES:
        raise RequestError(f"dtype is {shown(value)}; it can be {', '.join(_DTYPES)}")
    return _DTYPES[name]


def parse_device(value: torch.device | str | None) -> torch.device:
    """A device from itself or its name; None for the GPU if there is one, else the CPU. "cuda" becomes the calling
    thread's current one by its number, since another thread's current one may differ.

    Raises:
        RequestError: it is neither the CPU nor a CUDA device that there is.
        BackendUnavailableError: PyTorch sees no CUDA device.
    """
    if value is None:
        value = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RequestError(
            f"device is {shown(value)}; it can be 'cpu', 'cuda' or 'cuda:1' and so on"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {shown(value)}; latentrt runs on 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device is {shown(str(value))}, and PyTorch {torch.__version__} sees no CUDA device: {_why_no_cuda()}"
        )
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= (count := torch.cuda.device_count()):
        raise RequestError(
            f"device is {shown(str(value))}; PyTorch sees {count} of CUDA, the last of them 'cuda:{count - 1}'"
        )
    return device


def _why_no_cuda() -> str:
    """Why PyTorch sees no CUDA device, and the remedy."""
    if torch.version.cuda is None:
        return "it is built for the CPU; install a CUDA build of PyTorch, or use device 'cpu'"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = " ".join(str(error).split(". ")[0].split()).rstrip(".")
        remedy = "update it" if "driver" in why and "too old" in why else "see whether nvidia-smi lists a GPU"
        return f"{why}; {remedy} (it is built for CUDA {torch.version.cuda}), or use device 'cpu'"
    return (
        f"it is built for CUDA {torch.version.cuda}; see whether nvidia-smi lists a GPU, or use device 'cpu'"
    )


def parse_bytes(value: int | str | None, name: str) -> int | None:
    """Bytes from a number of them, or from `20GB`, `500M`, `8GiB` or `1e9`: units of 1000, but KiB and so on of 1024.
    None stays None.

    Args:
        name: of the argument, for messages.

    Raises:
        RequestError: it is no amount of memory.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _parse_amount(value, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f'{name} is {shown(value)}; give a number of bytes, or such as "8GB"')
    return value


def _parse_amount(text: str, name: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*((?:[KMGT]i?)?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise RequestError(f"{name}: {shown(text)} is no amount of memory; write such as 20GB or 500MB")
    amount = float(found[1]) * _UNITS[found[2].upper()]
    if not math.isfinite(amount):
        raise RequestError(f"{name}: {shown(text)} is more memory than there is; write such as 20GB or 500MB")
    return int(amount)


def free_memory(device: torch.device) -> int | None:
    """Bytes that PyTorch could still allocate on a GPU; None on the CPU, whose memory is not bounded."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error of PyTorch, its libraries, ONNX Runtime or TensorRT means that memory ran out.

    PyTorch has an error class for it on CUDA only, and only for what it allocates itself.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in _NO_MEMORY)


def dtype_name(dtype: torch.dtype | str) -> str:
    """A dtype's name without "torch.", such as "float16"."""
    return str(dtype).removeprefix("torch.")


def release_memory() -> None:
    """Collect garbage, and return to the driver the GPU memory of freed tensors, which PyTorch otherwise caches."""
    gc.collect()
    torch.cuda.empty_cache()
