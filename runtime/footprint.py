"""A network's footprint: FLOPs and live memory of one forward, traced on the meta device.

A forward computes nothing there, so a network of any size is traced in a second, without a GPU and without weights.
Every tensor that is made is followed until its storage is freed. An operator of `latentrt.kernels` counts as its Triton
kernels do: its results, and the workspace that it plans for an architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..kernels import as_nodes
from ..kernels._triton import Descriptor
from ..kernels.registry import OpSpec, specs
from .arena import AllocatorEvent, arena_bytes
from .graph import expect_modes

__all__ = ["Footprint", "Tracker", "follow", "measure"]

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True)
class Footprint:
    """One forward of one network; if none was traced, its weights only.

    Attributes:
        parameters: the number of weights.
        weight_bytes: of the weights, in their dtype.
        held_bytes: of the weights on the device: packed for a back end, they may be more.
        flops: of matmuls, convolutions and attention; a multiply-add is two.
        activation_bytes: peak of what the forward allocates; weights and inputs do not count.
        scratch_bytes: the largest workspace that one of the project's kernels takes beside its results.
        pool_bytes: of the arena from which PyTorch's allocator can serve the forward: see `arena`.
        input_bytes, output_bytes: of the forward's inputs and outputs.
    """

    parameters: int
    weight_bytes: int
    held_bytes: int
    flops: int = 0
    activation_bytes: int = 0
    scratch_bytes: int = 0
    pool_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0


class Tracker(TorchDispatchMode):
    """While entered, adds up the FLOPs of every operation and follows the storages that they make.

    Attributes:
        flops: so far.
        live: bytes of the storages made meanwhile that still exist.
        peak: the most `live` has been.
        scratch: bytes of the largest workspace of one operator.
        events: allocations and frees, workspaces' too, for `arena.arena_bytes`.
    """

    def __init__(self, arch: int | None = None) -> None:
        """`arch`, such as 90: operators of `latentrt.kernels` are planned for it, not run; if None they are run."""
        expect_modes()
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.live = self.peak = self.scratch = 0
        self.events: list[AllocatorEvent] = []
        self._arch = arch
        self._count = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._specs = {spec.name: spec for spec in specs()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
        if composite and not _is_fused(func, args):
            with self:  # run its parts under this mode: without gradients PyTorch leaves decomposing to modes
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        for storage in _storages((args, kwargs)):
            self._follow(storage, 0)  # unless known already, it was made before, not by what is traced
        out, workspace = self._run(func, args, kwargs)
        for storage in _storages(out):
            self._follow(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        self.scratch = max(self.scratch, workspace)
        if workspace:
            number = self._number()
            self.events += [(number, workspace), (number, 0)]
        self.flops += _flops(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, int]:
        """The operation's results as a device would have them, and the bytes of its workspace."""
        if self._arch is not None and func.namespace == "latentrt" and not func._schema.is_mutable:
            return _planned(self._specs[_operator(func)], self._arch, args, kwargs)
        if _is_fused(func, args):
            return torch.empty_like(args[0]), 0
        out = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and out.is_meta:
            # On meta it forgets the memory format, and what follows would copy.
            out = out.to(memory_format=_memory_format(*args[:2]))
        return out, 0

    def _follow(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        number = self._number()

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= nbytes
            if nbytes:
                self.events.append((number, 0))

        self._known[key] = weakref.ref(storage, freed)
        self.live += nbytes
        if nbytes:
            self.events.append((number, nbytes))

    def _number(self) -> int:
        self._count += 1
        return self._count

    @property
    def pool_bytes(self) -> int:
        """Bytes of the arena that serves all this."""
        return arena_bytes(self.events)


def follow(work: Callable[[], object], arch: int) -> Tracker:
    """Run `work`, of tensors on the meta device, under a `Tracker`.

    Args:
        arch: the architecture whose kernels are planned, such as 90.
    """
    tracker = Tracker(arch)
    with torch.no_grad(), as_nodes(), tracker:
        work()
    return tracker


def measure(
    module: nn.Module, inputs: Sequence[Tensor], arch: int, run: Callable[[], object] | None = None
) -> Footprint:
    """Trace one forward.

    Args:
        module: on the meta device, in the dtype and memory format it is to run in.
        inputs: of its forward, on the meta device.
        arch: as in `follow`.
        run: the forward as a back end runs it, for its memory; by default the module's own.
    """
    parameters = list(module.parameters())
    weight_bytes = sum(p.nbytes for p in parameters)
    outputs: list[Tensor] = []
    tracker = follow(lambda: outputs.extend(_tensors(module(*inputs))), arch)
    memory = tracker if run is None else follow(run, arch)
    return Footprint(
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=weight_bytes,
        held_bytes=weight_bytes,
        flops=tracker.flops,
        activation_bytes=memory.peak,
        scratch_bytes=memory.scratch,
        pool_bytes=memory.pool_bytes,
        input_bytes=sum(t.nbytes for t in inputs),
        output_bytes=sum(t.nbytes for t in outputs),
    )


def _is_fused(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is attention, which is one kernel on a device; on meta PyTorch would materialise the scores."""
    return bool(func is torch.ops.aten.scaled_dot_product_attention.default and args[0].is_meta)


def _memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of a convolution's result: channels last if its image or its weight is."""
    last = torch.channels_last
    either = x.is_contiguous(memory_format=last) or weight.is_contiguous(memory_format=last)
    return last if either and x.ndim == 4 else torch.contiguous_format


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
        elif isinstance(leaf, torch.UntypedStorage):
            yield leaf


def _planned(spec: OpSpec, arch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, int]:
    """An operator's results, and the bytes that its launches use besides those and its arguments."""
    out, launches = spec.plan(*args, **kwargs, arch=arch)
    own = {storage._cdata for storage in _storages((args, kwargs, out))}
    used = [value for launch in launches for value in launch.args.values()]
    tensors = [value.base if isinstance(value, Descriptor) else value for value in used]
    taken = {s._cdata: s.nbytes() for s in _storages(tensors) if s._cdata not in own}
    return out, sum(taken.values())


def _operator(func: Any) -> str:
    """`latentrt::attention.default` -> attention."""
    return str(func.__name__).partition(".")[0]


def _attention_flops(q: Tensor, k: Tensor, *_: Any) -> int:
    B, Sq, H, D = q.shape
    return 4 * B * H * Sq * k.shape[1] * D


def _linear_geglu_flops(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


_FLOPS: Mapping[str, Callable[..., int]] = {
    "attention": _attention_flops,
    "linear_geglu": _linear_geglu_flops,
}


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    if func.namespace == "latentrt":
        count = _FLOPS.get(_operator(func))
        return 0 if count is None else count(*args)
    if func is torch.ops.aten.scaled_dot_product_attention.default:
        return _attention_flops(*(x.transpose(1, 2) for x in args[:2]))
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
