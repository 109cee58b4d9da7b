"""The tensors of one component: where each lies, and how they get into a module.

Safetensors files are mapped into memory, so a weight that is wanted in the dtype it is stored in is never
copied: the module's parameters are views of the file, read when first touched and shared between processes.
Such a file must stay as it is while the module lives. Where the dtype differs, tensors are converted one by
one and the mapping is dropped every few megabytes, so that the file's own pages never add up: either way the
peak is the weights in their target dtype, plus one tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, WeightsMismatchError
from .digests import DigestMemory, combined

__all__ = ["TensorRef", "UnreadWeights", "WeightSet", "read_header"]

_REMAP_AFTER = 16 << 20  # bytes converted before the file's mapping is dropped
_LISTED = 20  # keys of one fault that an error spells out

# Buffers of older transformers releases: 0, 1, ... 76, which no model reads from its file any more.
_HARMLESS = ("position_ids",)

_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class TensorRef:
    """One tensor, not read yet.

    Attributes:
        file, key: the safetensors file and the tensor's name in it.
        shape: as it is handed out, after the steps below.
        dtype: as the file names it, such as "F16".
        part: (i, n): the i-th of n equal parts along the first dimension; None takes all of it.
        transpose: a matrix is stored the other way round.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    part: tuple[int, int] | None = None
    transpose: bool = False

    def take(self, stored: Tensor) -> Tensor:
        """What this refers to within the stored tensor; a view where it can be one."""
        if self.part is not None:
            index, parts = self.part
            stored = stored.chunk(parts)[index]
        if self.transpose:
            stored = stored.T.contiguous()
        return stored.reshape(self.shape)


def read_header(file: Path) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file by its name, without reading any.

    Raises:
        CheckpointError: the file is truncated or is not safetensors.
    """
    with _opened(file) as handle:
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a mapping)
        return {
            key: TensorRef(file, key, tuple(part.get_shape()), str(part.get_dtype()))
            for key, part in slices.items()
        }


class WeightSet:
    """The weights of one component of a checkpoint.

    Attributes:
        name: of the component and its checkpoint, for messages.
        files: the safetensors files that hold them.
        tensors: every tensor by its name.
    """

    def __init__(self, name: str, tensors: Mapping[str, TensorRef], memory: DigestMemory) -> None:
        self.name = name
        self.tensors = dict(tensors)
        self.files = tuple(sorted({ref.file for ref in tensors.values()}))
        self._memory = memory

    def digest(self) -> str:
        """SHA-256, in hex, over the contents of the files; remembered while a file's stat stays the same."""
        return combined(self._memory.digest(file) for file in self.files)

    def load_into(
        self, module: nn.Module, dtype: torch.dtype, *, rename: Callable[[str], str | None] | None = None
    ) -> None:
        """Give a module, usually built on the meta device, its weights on the CPU, in place.

        Args:
            module: all of its parameters must be in this set; they no longer require gradients afterwards.
            dtype: of the parameters.
            rename: a stored name -> the module's name, or None for what the module does not take.

        Shapes may differ by trailing dimensions of 1: a 1x1 convolution and a linear layer are the same.

        Raises:
            WeightsMismatchError: every missing, surplus, misshapen and quantised key, at once; the module is unchanged.
            CheckpointError: a file cannot be read, or two tensors claim one name.
        """
        wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        taken = self._match(wanted, rename)
        state: dict[str, Tensor] = {}
        for key, tensor in _read({key: taken[key] for key in wanted}, dtype):
            state[key] = tensor.reshape(wanted[key])
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False)
        unloaded = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
        assert not unloaded, (
            f"{type(module).__name__} keeps {unloaded} out of its state dict: they stay on meta"
        )

    def _match(
        self, wanted: Mapping[str, tuple[int, ...]], rename: Callable[[str], str | None] | None
    ) -> dict[str, TensorRef]:
        taken: dict[str, TensorRef] = {}
        for stored, ref in self.tensors.items():
            key = rename(stored) if rename else stored
            if key is None or (key not in wanted and key.endswith(_HARMLESS)):
                continue
            if key in taken:
                raise CheckpointError(f"{self.name}: {taken[key].key!r} and {ref.key!r} are both {key!r}")
            taken[key] = ref
        misshapen = [
            f"{key} has {list(taken[key].shape)}, expected {list(shape)}"
            for key, shape in wanted.items()
            if key in taken and _stripped(taken[key].shape) != _stripped(shape)
        ]
        # A number that was quantised means nothing without its scale.
        quantised = [
            f"{key} is {taken[key].dtype}"
            for key in wanted
            if key in taken and taken[key].dtype not in _FLOATING
        ]
        missing = [key for key in wanted if key not in taken]
        surplus = [key for key in taken if key not in wanted]
        if missing or surplus or misshapen or quantised:
            listed = [
                _listed("missing", missing),
                _listed("surplus", surplus),
                _listed("misshapen", misshapen),
                _listed("of no floating dtype", quantised),
            ]
            raise WeightsMismatchError(
                f"the weights of {self.name} ({', '.join(file.name for file in self.files)}) do not fit its "
                "configuration:\n" + "\n".join(line for line in listed if line) + "\n"
                "Check that config.json belongs to these weights."
            )
        return taken


class UnreadWeights(WeightSet):
    """The same tensors, of which no number is ever read: a module keeps its parameters on the meta device.

    Without tensors, any module gets what it asks for.
    """

    def digest(self) -> str:
        """A digest of names, shapes, dtypes and file sizes: equal contents have equal ones, and so may others."""
        headers = sorted((key, ref.shape, ref.dtype) for key, ref in self.tensors.items())
        sizes = [file.stat().st_size for file in self.files]
        return hashlib.sha256(f"{headers} {sizes}".encode()).hexdigest()

    def load_into(
        self, module: nn.Module, dtype: torch.dtype, *, rename: Callable[[str], str | None] | None = None
    ) -> None:
        """Give a module on the meta device its dtype, once names and shapes are seen to fit.

        Raises:
            WeightsMismatchError: as in `WeightSet.load_into`.
        """
        if self.tensors:
            self._match({key: tuple(value.shape) for key, value in module.state_dict().items()}, rename)
        module.to(dtype).requires_grad_(False)


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing ones."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _listed(fault: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"  {len(keys)} {fault}: {', '.join(keys[:_LISTED])}{more}"


def _read(refs: Mapping[str, TensorRef], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors in `dtype`, file by file, in the order they were put there."""
    by_file: dict[Path, list[tuple[str, TensorRef]]] = {}
    for key, ref in refs.items():
        by_file.setdefault(ref.file, []).append((key, ref))
    for file, entries in by_file.items():
        pending = list(reversed(entries))
        while pending:
            yield from _read_one_mapping(file, pending, dtype)


def _read_one_mapping(
    file: Path, pending: list[tuple[str, TensorRef]], dtype: torch.dtype
) -> Iterable[tuple[str, Tensor]]:
    """Pop and read until so much was converted that the mapping had better be dropped."""
    converted = 0
    with _opened(file) as handle:
        while pending and converted < _REMAP_AFTER:
            key, ref = pending.pop()
            stored = handle.get_tensor(ref.key)
            askew = stored.data_ptr() % stored.itemsize != 0  # which no reader of numbers has to bear
            if askew:
                stored = stored.clone()
            if askew or stored.dtype != dtype:
                converted += stored.nbytes
            yield key, ref.take(stored).to(dtype)
            del stored


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete: fetch it again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or is not a safetensors file ({error}); fetch it again"
        ) from error
