"""Where and in what precision a pipeline runs, from what a caller wrote."""

from __future__ import annotations

import torch

from ..errors import BackendUnavailableError, RequestError

__all__ = ["device_named", "dtype_named"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_named(value: torch.dtype | str) -> torch.dtype:
    """A dtype from itself or its name.

    Raises:
        RequestError: the project has no models of it.
    """
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise RequestError(f"dtype is {value!r}; it can be {', '.join(_DTYPES)}")
    return _DTYPES[name]


def device_named(value: torch.device | str | None) -> torch.device:
    """A device from itself or its name; by default the GPU where there is one.

    Raises:
        RequestError: the project does not run on such a device.
        BackendUnavailableError: there is none here.
    """
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise RequestError(f"device is {value!r}; it can be 'cpu', 'cuda' or 'cuda:1' and so on") from error
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {value!r}; latentrt runs on 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"device is {str(value)!r}, and PyTorch {torch.__version__} sees no CUDA device"
        )
    return device
