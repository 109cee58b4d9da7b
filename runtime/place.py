"""Where, in what precision and in how much memory a pipeline runs, from what a caller wrote."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import BackendUnavailableError, RequestError

__all__ = [
    "HOST_FLOATS",
    "bytes_named",
    "device_named",
    "dtype_name",
    "dtype_named",
    "free_memory",
    "memory_ran_out",
    "parse_bytes",
    "release_memory",
]

HOST_FLOATS: Mapping[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""How tables are made, whatever a program has told PyTorch of the tensors that it makes itself."""

_UNITS = {"": 1} | {x + i: base**k for i, base in (("", 1000), ("I", 1024)) for k, x in enumerate("KMGT", 1)}
_NO_MEMORY = (
    *("out of memory", "outofmemory", "allocate memory", "bad_alloc", "enough free memory"),
    # Of PyTorch's convolutions: there was no room for the workspace of any of cuDNN's engines.
    *("unable to find an engine to execute this computation", "unable to find a valid cudnn algorithm"),
    "cublas_status_alloc_failed",
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_named(value: torch.dtype | str) -> torch.dtype:
    """A dtype from itself or its name.

    Raises:
        RequestError: the project has no models of it.
    """
    name = dtype_name(value)
    if name not in _DTYPES:
        raise RequestError(f"dtype is {value!r}; it can be {', '.join(_DTYPES)}")
    return _DTYPES[name]


def device_named(value: torch.device | str | None) -> torch.device:
    """A device from itself or its name; by default the GPU where there is one. "cuda" is the calling thread's current
    one, and said by its number: another thread's may be another.

    Raises:
        RequestError: the project does not run on such a device.
        BackendUnavailableError: there is none here.
    """
    if value is None:
        value = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"device is {value!r}; it can be 'cpu', 'cuda' or 'cuda:1' and so on") from error
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {value!r}; latentrt runs on 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device is {str(value)!r}, and PyTorch {torch.__version__} sees no CUDA device: {_why_no_cuda()}"
        )
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _why_no_cuda() -> str:
    """Why there is none, and what to do about it."""
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


def bytes_named(name: str, value: int | str | None) -> int | None:
    """Bytes from themselves or such as "8GB".

    Args:
        name: of the argument, for messages.

    Raises:
        RequestError: it is no amount of memory.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return parse_bytes(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f'{name} is {value!r}; give a number of bytes, or such as "8GB"')
    return value


def parse_bytes(text: str) -> int:
    """`20GB`, `500M`, `8GiB` or `1e9` -> bytes; units of a thousand, but KiB and so on of 1024.

    Raises:
        RequestError: it is no such thing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*((?:[KMGT]i?)?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise RequestError(f"{text!r} is no amount of memory; write such as 20GB or 500MB")
    amount = float(found[1]) * _UNITS[found[2].upper()]
    if not math.isfinite(amount):
        raise RequestError(f"{text!r} is more memory than there is; write such as 20GB or 500MB")
    return int(amount)


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be allocated on a GPU; None on the CPU, of which nobody asks for a bound."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def memory_ran_out(error: BaseException) -> bool:
    """Whether that is what PyTorch, its libraries, ONNX Runtime or TensorRT mean. PyTorch has an error for it only on
    CUDA, and only for what it allocates itself."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(words in text for words in _NO_MEMORY)


def dtype_name(dtype: torch.dtype | str) -> str:
    """Such as "float16", as it is written and read everywhere."""
    return str(dtype).removeprefix("torch.")


def release_memory() -> None:
    """Collect garbage, and give back to the GPUs what nothing refers to any more: PyTorch keeps the memory of freed
    tensors for itself."""
    gc.collect()
    torch.cuda.empty_cache()
