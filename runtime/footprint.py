"""What a network takes, found by following one forward: its work, and the memory that is live at once.

On the meta device a forward computes nothing, so a network of any size is followed in a second, without a GPU
and without weights. Every tensor that is made is followed to the end of its storage's life. An operator of
`latentrt.kernels` counts as its Triton kernels: its results, and the workspace it plans for an architecture.
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
from .arena import Event, room_for
from .graph import expect_modes

__all__ = ["Footprint", "Tracker", "follow", "measure"]

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@dataclass(frozen=True)
class Footprint:
    """One forward of one network; without one, its weights only.

    Attributes:
        parameters: how many numbers its weights are.
        weight_bytes: of its weights, in their dtype.
        held_bytes: of its weights as they lie on the device: laid out anew they may be more.
        flops: of matrix products, convolutions and attention, two for a multiply and add.
        activation_bytes: the most that is live at once of what the forward makes; weights and inputs are not.
        scratch_bytes: the largest workspace that one of the project's kernels takes beside its results.
        pool_bytes: of the piece of memory that PyTorch's allocator can serve the forward from: see `arena`.
        input_bytes, output_bytes: of what goes in and comes out.
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
    """While entered, adds up the work of every operation and follows the storages they make.

    Attributes:
        flops: so far.
        live: bytes of the storages made meanwhile that still exist.
        peak: the most `live` has been.
        scratch: the largest workspace of one operator.
        events: what came and went, workspaces too, for `arena.room_for`.
    """

    def __init__(self, arch: int | None = None) -> None:
        """`arch`, such as 90: operators of `latentrt.kernels` are planned for it, not run; run where None."""
        expect_modes()
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.live = self.peak = self.scratch = 0
        self.events: list[Event] = []
        self._arch = arch
        self._count = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._specs = {spec.name: spec for spec in specs()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        fused = func is torch.ops.aten.scaled_dot_product_attention.default and args[0].is_meta
        if not fused and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            with self:  # run its parts under this mode: without gradients PyTorch leaves decomposing to modes
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        for storage in _storages((args, kwargs)):
            self._follow(storage, 0)  # made before, so not the forward's: unless it is known already
        workspace = 0
        if self._arch is not None and func.namespace == "latentrt" and not func._schema.is_mutable:
            out, workspace = _planned(self._specs[_operator(func)], self._arch, args, kwargs)
        elif fused:  # on a device it is; on meta PyTorch would make all scores
            out = torch.empty_like(args[0])
        else:
            out = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and out.is_meta:
            # It forgets the layout there, and what follows would copy.
            out = out.to(memory_format=_layout(*args[:2]))
        for storage in _storages(out):
            self._follow(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        self.scratch = max(self.scratch, workspace)
        if workspace:
            number = self._number()
            self.events += [(number, workspace), (number, 0)]
        self.flops += _flops(func, args, kwargs, out)
        return out

    def _follow(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        number = self._number()

        def ended(_: object) -> None:
            del self._known[key]
            self.live -= nbytes
            if nbytes:
                self.events.append((number, 0))

        self._known[key] = weakref.ref(storage, ended)
        self.live += nbytes
        if nbytes:
            self.events.append((number, nbytes))

    def _number(self) -> int:
        self._count += 1
        return self._count

    @property
    def room(self) -> int:
        """Bytes of the piece of memory that serves all this."""
        return room_for(self.events)


def follow(work: Callable[[], object], arch: int) -> Tracker:
    """Do `work`, of tensors on the meta device, and say what it took.

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
    """Follow one forward.

    Args:
        module: on the meta device, in the dtype and memory format it is to run in.
        inputs: of its forward, on the meta device.
        arch: as in `follow`.
        run: the forward as a back end does it, whose memory is told; the module's own by default.
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
        pool_bytes=memory.room,
        input_bytes=sum(t.nbytes for t in inputs),
        output_bytes=sum(t.nbytes for t in outputs),
    )


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of what a convolution gives: channels last where its image or its weight are."""
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
    """An operator's results, and the bytes of what its steps read or write besides them and its arguments."""
    out, steps = spec.plan(*args, **kwargs, arch=arch)
    own = {storage._cdata for storage in _storages((args, kwargs, out))}
    used = [value for step in steps for value in step.args.values()]
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
