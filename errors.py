"""Every exception latentrt raises on purpose, as one tree.

LatentRTError
├── RequestError                 what was asked for cannot be made (also a ValueError)
│   ├── EngineSizeError          no engine was built for such sizes, or for so many images at once
│   └── MemoryPlanError          by plan it needs more device memory than is available
├── KernelArgumentError          an operator got a tensor it cannot take (also a ValueError)
├── CheckpointError              a checkpoint is missing, damaged or not understood
│   ├── CheckpointNotFoundError  no such folder, file or hub id
│   ├── UnsafeWeightsError       pickled weights, which can run code, are refused
│   ├── WeightsMismatchError     keys or shapes differ from the model's
│   └── UnsupportedConfigError   a configuration field asks for what latentrt lacks
├── BackendError                 a back end could not prepare or run a network
│   ├── UnknownBackendError      no back end of that name
│   ├── OutOfMemoryError         the device ran out of memory while it ran
│   ├── BackendUnavailableError  known, but it cannot run on this machine
│   └── CaptureError             its work could not be captured as a CUDA graph
├── ExportError                  a component could not be written as ONNX, or its check failed
├── BuildError                   an exported component could not be compiled to an engine
├── ServiceError                 a service could not serve a valid request
│   ├── QueueFullError           refused for now; `retry_after` says when to try again
│   ├── DeadlineError            the request's timeout has passed
│   ├── DrainingError            the service is shutting down
│   └── StoppedError             a fault has ended the service
├── CacheError                   the store of exported models cannot be read or written
└── BenchmarkError               a benchmark could not be run, read or compared, or found a regression

A message names the value that was refused and what to do instead.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BenchmarkError",
    "BuildError",
    "CacheError",
    "CaptureError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "DeadlineError",
    "DrainingError",
    "EngineSizeError",
    "ExportError",
    "KernelArgumentError",
    "LatentRTError",
    "MemoryPlanError",
    "OutOfMemoryError",
    "QueueFullError",
    "RequestError",
    "ServiceError",
    "StoppedError",
    "UnknownBackendError",
    "UnsafeWeightsError",
    "UnsupportedConfigError",
    "WeightsMismatchError",
]


class LatentRTError(Exception):
    """Base of every error that latentrt raises on purpose."""


class RequestError(LatentRTError, ValueError):
    """What was asked for cannot be made: a size, step count, prompt, seed or sampler."""


class EngineSizeError(RequestError):
    """No engine was built for such sizes, or for so many images at once; those it takes are listed."""


class MemoryPlanError(RequestError):
    """What was asked for needs more device memory than there is; refused before any is allocated."""


class KernelArgumentError(LatentRTError, ValueError):
    """An operator got a tensor of a shape, dtype or device it cannot take."""


class CheckpointError(LatentRTError):
    """A checkpoint is missing, damaged or not understood."""


class CheckpointNotFoundError(CheckpointError):
    """No folder, file or hub id of that name."""


class UnsafeWeightsError(CheckpointError):
    """Only pickled weights were found; unpickling can run code, so they are refused."""


class WeightsMismatchError(CheckpointError):
    """The checkpoint's keys or shapes differ from the model's; all of them are listed."""


class UnsupportedConfigError(CheckpointError):
    """A configuration field asks for something latentrt does not implement."""


class BackendError(LatentRTError):
    """A back end failed while it prepared or ran a component."""


class UnknownBackendError(BackendError):
    """No back end has that name."""


class OutOfMemoryError(BackendError):
    """A device had too little memory for what was asked of it."""


class BackendUnavailableError(BackendError):
    """The back end exists but cannot run on this machine."""


class CaptureError(BackendError):
    """Work could not be captured as a CUDA graph; the message names the operation."""


class ExportError(LatentRTError):
    """A component could not be written as ONNX, or what was written computes something else."""


class BuildError(LatentRTError):
    """An exported component could not be compiled to an engine; names the component, the node and the remedy."""


class ServiceError(LatentRTError):
    """A service did not make what was asked for, for no fault of the request."""


class QueueFullError(ServiceError):
    """As many requests wait as may, or this one could not be done in its time.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        """For copies and other processes: by default an exception is made again from its message alone."""
        return type(self), (str(self), self.retry_after), self.__dict__


class DeadlineError(ServiceError):
    """A request's time ran out before its image was made."""


class DrainingError(ServiceError):
    """The service is shutting down: it finishes what it has and takes nothing new."""


class StoppedError(ServiceError):
    """The service has ended through a fault of its own, and must be started again."""


class CacheError(LatentRTError):
    """The store of exported models cannot be read or written."""


class BenchmarkError(LatentRTError):
    """A side could not be measured, results cannot be read or compared, or they are worse than the earlier ones."""
