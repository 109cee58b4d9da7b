"""Device memory that a request needs, by stage and by policy, and the least time it can take there.

A policy says which weights are on the device in which stage, and how much of the forwards' memory is kept:

    resident   everything stays; all stages are captured, and their graphs share one pool
    balanced   text encoders are offloaded after the text; only denoising is captured, so its pool is kept, and what
               text and pixels take is freed
    low        one network at a time, and nothing is kept; weights are copied in through pinned host memory

A graph's pool is taken to be one block that one forward fits into (`arena`). `planner` makes plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import MemoryPlanError
from ..kernels.roofline import Gpu, Limit, floor_ms
from .checks import check_choice

if TYPE_CHECKING:
    from .footprint import Footprint

__all__ = [
    "POLICIES",
    "RESERVE",
    "STAGING",
    "Kind",
    "Network",
    "Plan",
    "PlannedStage",
    "Policy",
    "check_policy",
    "format_bytes",
    "kind_of",
    "stays",
]

Policy = Literal["resident", "balanced", "low"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

Kind = Literal["text", "pixels", "denoise"]
"""What a stage does, and the networks that run in it are for; "pixels" is the VAE."""

RESERVE = 256 << 20
"""Bytes left free for what no plan sees: workspaces of cuBLAS (32 MiB on Hopper) and cuDNN. Chosen, not
measured. The CUDA context is not in it: free memory is queried once the context exists."""

STAGING = 2 * (64 << 20)
"""Bytes of pinned host memory through which weights are copied to a GPU: a double buffer, used by every policy."""


@dataclass(frozen=True)
class Network:
    """One forward of one network of a model.

    Attributes:
        dtype: of weights and activations, such as "float16".
        rows: of the batch that one forward takes.
        footprint: what it takes.
    """

    dtype: str
    rows: int
    footprint: Footprint


@dataclass(frozen=True)
class PlannedStage:
    """A part of a request.

    Attributes:
        name: text, encode, base, refiner or decode, in the order in which they run.
        kind: of the networks.
        calls: how often each network runs, by its name.
        extra_bytes: temporaries beside the network's own memory: images, or what a loop makes as it prepares a
            request.
    """

    name: str
    kind: Kind
    calls: Mapping[str, int]
    extra_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """The memory and work of one request.

    Attributes:
        subject: model, size, batch and dtype, for messages.
        networks: every network of the models, by name; one that no stage runs is not loaded.
        stages: in the order in which they run.
        buffers: bytes of the tensors that live from the first step to the last, by name.
        staying: by policy, bytes of the networks that are on the device already and are not offloaded for this request.
    """

    subject: str
    networks: Mapping[str, Network]
    stages: tuple[PlannedStage, ...]
    buffers: Mapping[str, int]
    staying: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers.values())

    def used(self, *kinds: str) -> set[str]:
        """Names of the networks that run in stages of these kinds, or in any."""
        return {name for stage in self.stages if not kinds or stage.kind in kinds for name in stage.calls}

    def pool_bytes(self, names: Iterable[str]) -> int:
        """Bytes of a pool that these networks share, one after the other."""
        return max((self.networks[name].footprint.pool_bytes for name in names), default=0)

    def graph_bytes(self, policy: str, limit: int) -> int:
        """Bytes of the pool that captured graphs share.

        Args:
            limit: bytes of a call's inputs and outputs up to which it is captured; loops are in any case.
        """
        captured = self.used("denoise")
        if policy == "resident":
            called = {name: self.networks[name].footprint for name in self.used()}
            captured |= {name for name, f in called.items() if f.input_bytes + f.output_bytes <= limit}
        return self.pool_bytes(captured)

    def need(self, policy: str) -> dict[str, int]:
        """Device bytes that each stage needs, `RESERVE` included.

        Raises:
            RequestError: there is no such policy.
        """
        checked = check_policy(policy)
        return {stage.name: self._need(checked, stage) for stage in self.stages}

    def _need(self, policy: Policy, stage: PlannedStage) -> int:
        always = RESERVE + self.buffer_bytes + stage.extra_bytes
        if not stays(policy, stage.kind, stage.kind):  # one network at a time, and no pool is kept
            return always + max(
                self._weights(policy, {name}) + self.pool_bytes({name}) for name in stage.calls
            )
        kinds = {other.kind for other in self.stages if stays(policy, other.kind, stage.kind)}
        kept = self.used() if policy == "resident" else self.used("denoise")
        pools = self.pool_bytes(kept) + self.pool_bytes(self.used(stage.kind) - kept)
        return always + self._weights(policy, self.used(*kinds)) + pools

    def _weights(self, policy: str, names: set[str]) -> int:
        """Bytes of these networks' weights, and of what stays beside them."""
        beside = sum(nbytes for name, nbytes in self.staying.get(policy, {}).items() if name not in names)
        return beside + sum(self.networks[name].footprint.held_bytes for name in names)

    def peak(self, policy: str) -> int:
        """Device bytes of the stage that needs most."""
        return max(self.need(policy).values())

    def require_fit(self, available: int, policy: str, remedy: str = "take a GPU with more memory") -> None:
        """Refuse what cannot fit.

        Args:
            available: device bytes that are free, or held by what this plan counts.
            remedy: where no request at all would fit.

        Raises:
            MemoryPlanError: the need of every stage, and what would fit.
            RequestError: there is no such policy.
        """
        need = self.need(policy)
        if max(need.values()) <= available:
            return
        raise MemoryPlanError(
            f"{self.describe(policy)}, and {format_bytes(available)} are available; {self._remedy(available, remedy)}"
        )

    def describe(self, policy: str) -> str:
        """What it needs, stage by stage, for messages."""
        need = self.need(policy)
        stages = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in need.items())
        unused = sorted(self.staying.get(policy, {}).keys() - self.used())
        beside = f", besides {', '.join(unused)}, which stays there" if unused else ""
        return (
            f"{self.subject} needs {format_bytes(max(need.values()))} of device memory with memory={policy!r} "
            f"({stages}{beside})"
        )

    def _remedy(self, available: int, otherwise: str) -> str:
        fitting = [
            f"memory={p!r} ({format_bytes(self.peak(p))})" for p in POLICIES if self.peak(p) <= available
        ]
        if fitting:
            smaller = ", or a smaller size or batch" if self.pool_bytes(self.used()) else ""
            return f"use {' or '.join(fitting)}{smaller}"
        least = min(POLICIES, key=self.peak)
        name = max(self.used(), key=lambda name: self.networks[name].footprint.held_bytes)
        weights = self.networks[name].footprint.held_bytes
        if weights + RESERVE > available:
            return (
                f"the weights of {name} alone are {format_bytes(weights)}, and {format_bytes(RESERVE)} are kept "
                f"free for libraries: {otherwise}"
            )
        return (
            f"no policy fits, memory={least!r} still needs {format_bytes(self.peak(least))}: use a smaller size or "
            "batch"
        )

    def floor_ms(self, stage: PlannedStage, gpu: Gpu) -> tuple[float, Limit]:
        """The least milliseconds that a stage takes, and which limit accounts for most of them. Of each network it is
        the longer of its matmuls at the GPU's matrix rate, and its weights, inputs and outputs, once each, at the
        memory bandwidth."""
        times: dict[Limit, float] = {"matmul": 0.0, "copy": 0.0}
        for name, calls in stage.calls.items():
            f = self.networks[name].footprint
            traffic = f.weight_bytes + f.input_bytes + f.output_bytes
            ms, limit = floor_ms(calls * f.flops, calls * traffic, gpu)
            times[limit] += ms
        return sum(times.values()), max(times, key=lambda limit: times[limit])

    def flops(self, stage: PlannedStage) -> int:
        """FLOPs of all forwards of a stage."""
        return sum(calls * self.networks[name].footprint.flops for name, calls in stage.calls.items())

    def as_json(self, gpu: Gpu) -> dict[str, Any]:
        """Every figure, with the floors of a GPU."""
        stages = []
        for stage in self.stages:
            ms, limit = self.floor_ms(stage, gpu)
            work = {"flops": self.flops(stage), "floor_ms": ms, "limit": limit}
            stages.append({**asdict(stage), **work})
        policies = {
            policy: {
                "need_bytes": self.need(policy),
                "peak_bytes": self.peak(policy),
                "pinned_host_bytes": STAGING,
            }
            for policy in POLICIES
        }
        return {
            "subject": self.subject,
            "gpu": {"name": gpu.name, "ceilings": gpu.source},
            "networks": {name: asdict(network) for name, network in self.networks.items()},
            "stages": stages,
            "buffers": dict(self.buffers),
            "reserve_bytes": RESERVE,
            "policies": policies,
        }


def check_policy(policy: str) -> Policy:
    """The policy of that name.

    Raises:
        RequestError: there is none.
    """
    return check_choice("memory policy", policy, POLICIES)


def kind_of(component: str) -> Kind:
    """The kind of a component, from its name."""
    if component.startswith("text_encoder"):
        return "text"
    return "denoise" if component == "unet" else "pixels"


def stays(policy: Policy, kind: Kind, running: Kind) -> bool:
    """Whether a network of `kind` may stay on the device while another one, of the kind `running`, runs there."""
    if policy == "balanced":
        return kind != "text" or running == "text"
    return policy == "resident"


def format_bytes(nbytes: int) -> str:
    """Such as 5.13 GB, 3.6 MB or 12 kB."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} kB"
