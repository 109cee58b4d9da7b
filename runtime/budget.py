"""A pipeline's memory budget: checked before each request, and again when memory ran out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from ..kernels._dispatch import arch_of
from .engines.lazy import LazyEngine
from .graph import Graphs, empty_cache
from .graph_cache import DEFAULT_LIMIT
from .memory import POLICIES, Plan, format_bytes, kind_of, stays
from .parts import Parts
from .place import free_memory
from .planner import Planner, PlanSize
from .request import GenerationRequest
from .residency import shared_residency
from .stages import Stage

__all__ = ["Admission", "Budget", "without_frames"]

_log = logging.getLogger(__name__)

_OF_PYTORCH = ("triton", "eager")
"""Back ends whose work takes its memory from PyTorch's allocator, tensor by tensor."""

_Error = TypeVar("_Error", bound=Exception)


@dataclass(frozen=True)
class Admission:
    """A request that fits.

    Attributes:
        request: decoded in tiles also where a whole image would not fit.
        plan: what it takes; None where nothing bounds the memory, and so nothing was planned.
        graph_memory: bytes that it leaves for captured graphs, those of its own loops included; None likewise.
    """

    request: GenerationRequest
    plan: Plan | None
    graph_memory: int | None


class Budget:
    """Compares what requests take by plan with what there is.

    A plan of a new kind takes up to a second, one of a kind that was asked for before microseconds. Where nothing
    bounds the memory, as on the CPU unless `limit` is given, nothing is planned.

    Plans count what a GPU takes. For back ends whose engines are not PyTorch's they are an estimate: the weights and
    activations of the PyTorch modules.
    """

    def __init__(self, parts: Parts) -> None:
        """`parts`: the pipeline's. Without a `memory_limit` it may take all that is free. Without `loop_memory` graphs
        may be kept in what a request's plan leaves free, and in `graph_cache.DEFAULT_LIMIT` where nothing bounds it.

        Raises:
            MemoryPlanError: the weights cannot fit.
        """
        self._parts = parts
        self._loader = loader = parts.loader
        self._policy = policy = loader.residency.policy
        self._limit = parts.memory_limit
        self._loop_memory = parts.loop_memory
        self._planners: dict[tuple[str, int], Planner] = {}
        self._free_when_idle: tuple[torch.device, int] | None = None
        if self._loop_memory is not None:
            loader.graph_cache.limit = self._loop_memory
        available = self.available()
        if available is not None:
            weights = self._with_staying(self.planner.of_weights())
            if weights.peak(policy) > available:
                available = self._available_after_collecting(available)
            weights.require_fit(available, policy, self._remedy(available))

    @property
    def planner(self) -> Planner:
        """For the back end and device as they are now."""
        backend: Literal["triton", "eager"] = "triton" if self._loader.backend.name == "triton" else "eager"
        key = (backend, arch_of(self._loader.device))
        if key not in self._planners:
            self._planners[key] = Planner(self._parts, backend=backend, arch=key[1])
        return self._planners[key]

    def plan(self, request: GenerationRequest, stages: Sequence[Stage]) -> Plan:
        """What a request takes."""
        plan = self.planner.of_stages(stages, PlanSize.of(request), guided=request.guided)
        return self._with_staying(plan)

    def _with_staying(self, plan: Plan) -> Plan:
        """The plan plus the weights that stay on the device whatever this request does: networks of other requests, and
        those lent by pipelines that do not offload them for this one, as it is or as it would be with another policy.
        """
        loader = self._loader
        lent = [x for x in self.planner.engines().values() if not loader.owns(x)]
        residencies = {policy: shared_residency(policy, lent) for policy in POLICIES}
        residencies[self._policy] = loader.residency
        staying: dict[str, dict[str, int]] = {
            policy: {
                name: x.held_bytes
                for name, x in self._present().items()
                if (x in lent and x.residency is not residencies[policy])
                or stays(policy, kind_of(x.component.name), "denoise")
            }
            for policy in POLICIES
        }
        return replace(plan, staying=staying)

    def _present(self) -> dict[str, LazyEngine]:
        """The pipeline's engines whose weights are on its device, by the names of their networks."""
        engines = self.planner.engines().items()
        return {name: x for name, x in engines if x.present and x.device == self._loader.device}

    def held(self) -> dict[str, int]:
        """Bytes that the pipeline holds on its device between requests: weights by network, and `recorded`. With policy
        "low" also other pipelines' networks, which are offloaded to make room for its own."""
        own, residency = self.planner.engines(), self._loader.residency
        held = {name: x.held_bytes for name, x in self._present().items()}
        held["recorded"] = self._loader.graph_cache.nbytes
        if residency.policy == "low":
            for x in residency.loaded:
                if x.present and x.device == self._loader.device and x not in own.values():
                    held[f"another {x.component.name}"] = x.held_bytes + x.graph_cache.nbytes
        return held

    def available(self, *, idle: bool = True) -> int | None:
        """Bytes of the device that are free or held by this pipeline; None where nothing bounds them.

        Args:
            idle: no call of this pipeline is running. While one is, its memory cannot be told from that of other
                programs, and the last figure is returned.
        """
        device = self._loader.device
        free = None
        if not idle and self._free_when_idle is not None and self._free_when_idle[0] == device:
            free = self._free_when_idle[1]
        elif (found := free_memory(device)) is not None:
            free = found + sum(self.held().values())
            self._free_when_idle = (device, free)
        return min((n for n in (self._limit, free) if n is not None), default=None)

    def _available_after_collecting(self, available: int) -> int:
        """`available` again, after freeing what waits for the garbage collector (perhaps a pipeline that was part of a
        reference cycle) and cuBLAS's workspaces of earlier calls, which plans count in `RESERVE`."""
        if available == self._limit:
            return available
        gc.collect()
        if self._loader.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()
        return self.available() or 0

    def _remedy(self, available: int) -> str:
        """What to do if that is too little for any request."""
        if available == self._limit:
            return "give a larger memory_limit"
        return "end what else is on the GPU, or take one with more memory"

    def require(self, request: GenerationRequest, stages: Sequence[Stage], *, idle: bool) -> Admission:
        """Refuse what cannot fit, before anything is allocated. An image that would not fit whole is decoded in tiles.

        Args:
            idle: as for `available`.

        Raises:
            MemoryPlanError: what each stage needs, what there is, and what would fit.
        """
        available = self.available(idle=idle)
        if available is None:
            return Admission(request, None, None)
        plan = self.plan(request, stages)
        if plan.peak(self._policy) > available and idle:
            # Before tiles are taken, which make another image.
            available = self._available_after_collecting(available)
        if plan.peak(self._policy) > available and not request.tiled_vae:
            tiled = replace(request, tiled_vae=True)
            if (tiled_plan := self.plan(tiled, stages)).peak(self._policy) <= available:
                request, plan = tiled, tiled_plan
        plan.require_fit(available, self._policy, self._remedy(available))
        return Admission(request, plan, available - plan.peak(self._policy) + plan.buffer_bytes)

    def admit(self, request: GenerationRequest, stages: Sequence[Stage], *, idle: bool) -> Admission:
        """As `require`; and make room for the request among the captured graphs of earlier ones."""
        admission = self.require(request, stages, idle=idle)
        if admission.request.tiled_vae and not request.tiled_vae:
            _log.warning(
                "decoding in tiles, since by plan the whole picture does not fit in memory; it differs slightly at the "
                "edges of tiles"
            )
        cache, graphs = self._loader.graph_cache, self._loader.graphs
        if self._loop_memory is None:
            cache.limit = DEFAULT_LIMIT if admission.graph_memory is None else admission.graph_memory
        if admission.graph_memory is not None:
            cache.shrink(min(admission.graph_memory, cache.limit))
        if admission.plan is not None and graphs is not None and self._loader.backend.name in _OF_PYTORCH:
            graphs.first_block = admission.plan.graph_bytes(self._policy, cache.limit)
            if idle and self._might_outgrow(admission, graphs):
                # With its last graph the pool goes, and the next capture begins one of `first_block`.
                cache.drop()
        return admission

    def _might_outgrow(self, admission: Admission, graphs: Graphs) -> bool:
        """Whether the graphs' pool began smaller than this request needs, and there is no room for what it may become.

        It would grow tensor by tensor, to half as much again as one block would be (`arena`), and what it began with
        is not part of that.
        """
        plan, graph_memory, begun_with = admission.plan, admission.graph_memory, graphs.pool_began_with
        if plan is None or graph_memory is None or begun_with is None or begun_with >= graphs.first_block:
            return False
        spare = graph_memory - plan.buffer_bytes - self._loader.graph_cache.nbytes
        return spare < begun_with + graphs.first_block // 2

    def warn_of_evictions(self, before: int) -> None:
        """Warn if a warm-up evicted graphs of its own; `before` is the cache's `evicted` when it began."""
        cache = self._loader.graph_cache
        if cache.evicted > before:
            _log.warning(
                "warmup captured more than fits: %d graphs were evicted again (%s stored, limit %s); warm up fewer "
                "sizes or batches, or raise loop_memory=",
                cache.evicted - before,
                format_bytes(cache.nbytes),
                format_bytes(cache.limit),
            )

    def free_unused(self) -> int:
        """Free what no call uses; returns its bytes."""
        device = self._loader.device
        freed = self._loader.graph_cache.drop()
        gc.collect()
        if device.type == "cuda":
            reserved = torch.cuda.memory_reserved(device)
            empty_cache(device)
            freed = max(freed, reserved - torch.cuda.memory_reserved(device))
        return freed


def without_frames(error: _Error) -> _Error:
    """The error, with the tracebacks of it and its causes removed: their frames hold tensors."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        if link.__cause__ is not None:
            link.__context__ = None
        link = link.__cause__ or link.__context__
    return error
