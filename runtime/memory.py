"""What a request takes of a device's memory, stage by stage and policy by policy, and its least time there.

A policy says which weights are on the device in which stage, and what is kept of the memory that forwards need:

    resident   everything stays; all stages are captured, and their graphs share one pool
    balanced   text encoders come for the text and leave; only denoising is captured, so its pool is kept, and what
               text and pixels take is given back
    low        one network at a time, and nothing is kept; weights stream in through pinned host memory

A graph's pool is taken to be one piece of memory that one forward fits into (`arena`). `planner` makes plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import MemoryPlanError, RequestError
from ..kernels.roofline import Gpu, Limit, floor_ms

if TYPE_CHECKING:
    from .footprint import Footprint

__all__ = [
    "POLICIES",
    "RESERVE",
    "STAGING",
    "Kind",
    "Network",
    "Plan",
    "Policy",
    "Stage",
    "check_policy",
    "format_bytes",
    "kind_of",
    "stays",
]

Policy = Literal["resident", "balanced", "low"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

Kind = Literal["text", "pixels", "denoise"]
"""Of a stage, and of the networks that run in it; pixels are the VAE's."""

RESERVE = 256 << 20
"""Bytes left free for what no plan sees: workspaces of cuBLAS (32 MiB on Hopper) and cuDNN. Chosen, not
measured. The CUDA context is not in it: free memory is asked for once that is there."""

STAGING = 2 * (64 << 20)
"""Bytes of pinned host memory through which weights stream to a GPU, by any policy when they are loaded: two buffers
that take turns."""


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
class Stage:
    """A part of a request.

    Attributes:
        name: text, encode, base, refiner or decode, in the order in which they run.
        kind: of the networks.
        calls: how often each network runs, by its name.
        extra_bytes: of what it holds for a time beside the network's own memory: images, or what a loop makes as it
            takes up a request.
    """

    name: str
    kind: Kind
    calls: Mapping[str, int]
    extra_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What one request takes.

    Attributes:
        subject: model, size, batch and dtype, for messages.
        networks: all that the models have, by name; those of no stage are not loaded.
        stages: in the order in which they run.
        buffers: bytes of the tensors that live from the first step to the last, by name.
        staying: by policy, bytes of the networks that are on the device already and do not leave it for this request.
    """

    subject: str
    networks: Mapping[str, Network]
    stages: tuple[Stage, ...]
    buffers: Mapping[str, int]
    staying: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers.values())

    def pool_bytes(self, *kinds: str) -> int:
        """What a pool needs that stages of these kinds, or all, share one after the other."""
        return max((self.networks[name].footprint.pool_bytes for name in self.used(*kinds)), default=0)

    def graph_bytes(self, policy: str, limit: int) -> int:
        """What the memory needs that recordings share.

        Args:
            limit: bytes of a call's inputs and outputs up to which it is recorded; loops are in any case.
        """
        recorded = self.used("denoise")
        if policy == "resident":
            called = {name: self.networks[name].footprint for name in self.used()}
            recorded |= {name for name, f in called.items() if f.input_bytes + f.output_bytes <= limit}
        return max((self.networks[name].footprint.pool_bytes for name in recorded), default=0)

    def used(self, *kinds: str) -> set[str]:
        """Names of the networks that run in stages of these kinds, or in any."""
        return {name for stage in self.stages if not kinds or stage.kind in kinds for name in stage.calls}

    def need(self, policy: str) -> dict[str, int]:
        """Device bytes that each stage needs, `RESERVE` included.

        Raises:
            RequestError: there is no such policy.
        """
        check_policy(policy)
        return {stage.name: self._need(policy, stage) for stage in self.stages}

    def _need(self, policy: str, stage: Stage) -> int:
        always = RESERVE + self.buffer_bytes + stage.extra_bytes
        if policy == "resident":
            return always + self._weights(policy, self.used()) + self.pool_bytes()
        if policy == "balanced":
            there = self.used() if stage.kind == "text" else self.used("denoise", "pixels")
            given_back = 0 if stage.kind == "denoise" else self.pool_bytes(stage.kind)
            return always + self._weights(policy, there) + self.pool_bytes("denoise") + given_back
        return always + max(
            self._weights(policy, {name}) + self.networks[name].footprint.pool_bytes for name in stage.calls
        )

    def _weights(self, policy: str, names: set[str]) -> int:
        """Bytes of these networks' weights, and of what stays beside them."""
        beside = sum(nbytes for name, nbytes in self.staying.get(policy, {}).items() if name not in names)
        return beside + sum(self.networks[name].footprint.held_bytes for name in names)

    def peak(self, policy: str) -> int:
        """Device bytes that the hungriest stage needs."""
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
            f"{self.told(policy)}, and there are {format_bytes(available)}; {self._remedy(available, remedy)}"
        )

    def told(self, policy: str) -> str:
        """What it needs and in which stage, for messages."""
        need = self.need(policy)
        stages = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in need.items())
        unused = sorted(self.staying.get(policy, {}).keys() - self.used())
        beside = f", beside {', '.join(unused)} that stays there" if unused else ""
        return (
            f"{self.subject} needs {format_bytes(max(need.values()))} of device memory by policy {policy!r} "
            f"({stages}{beside})"
        )

    def _remedy(self, available: int, otherwise: str) -> str:
        fitting = [f"{p!r} ({format_bytes(self.peak(p))})" for p in POLICIES if self.peak(p) <= available]
        if fitting:
            smaller = ", or a smaller size or batch" if self.pool_bytes() else ""
            return f"take policy {' or '.join(fitting)}{smaller}"
        least = min(POLICIES, key=self.peak)
        name = max(self.used(), key=lambda name: self.networks[name].footprint.held_bytes)
        weights = self.networks[name].footprint.held_bytes
        if weights + RESERVE > available:
            return (
                f"the weights of {name} alone are {format_bytes(weights)}, and {format_bytes(RESERVE)} are kept "
                f"free for libraries: {otherwise}"
            )
        return (
            f"no policy fits, {least!r} needs {format_bytes(self.peak(least))}: take a smaller size or batch"
        )

    def floor_ms(self, stage: Stage, gpu: Gpu) -> tuple[float, Limit]:
        """The least milliseconds a stage takes: products at the matrix rate, or weights, inputs and outputs once
        each at the memory bandwidth, whichever is longer; and which of them it is for the most part."""
        times: dict[Limit, float] = {"matmul": 0.0, "copy": 0.0}
        for name, calls in stage.calls.items():
            f = self.networks[name].footprint
            traffic = f.weight_bytes + f.input_bytes + f.output_bytes
            ms, limit = floor_ms(calls * f.flops, calls * traffic, gpu)
            times[limit] += ms
        return sum(times.values()), max(times, key=lambda limit: times[limit])

    def flops(self, stage: Stage) -> int:
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
    if policy not in POLICIES:
        raise RequestError(f"there is no memory policy {policy!r}; there are {', '.join(POLICIES)}")
    return policy


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
