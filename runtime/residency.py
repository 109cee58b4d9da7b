"""Which networks' weights are on the device when, by a policy of `memory`; they come through pinned memory.

Weights never change, so the host's copy stays where it is: what leaves is only let go. They come back to other
addresses, so what was recorded over them (`graph.py`) is dropped when they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .memory import STAGING, Plan, check_policy

__all__ = ["Residency", "Staging", "allowed"]


def allowed(plan: Plan, policy: str, stage: str, network: str) -> frozenset[str]:
    """The networks whose weights may be on the device while `network` runs in `stage`.

    Raises:
        RequestError: there is no such policy.
    """
    check_policy(policy)
    if policy == "low":
        return frozenset({network})
    every = {name for each in plan.stages for name in each.calls}
    kinds = {each.name: each.kind for each in plan.stages}
    if policy == "balanced" and kinds[stage] != "text":
        every -= {name for each in plan.stages if each.kind == "text" for name in each.calls}
    return frozenset(every)


class Staging:
    """Copies host memory to a device through two pinned buffers that take turns: one is filled while the other's
    content is on its way."""

    def __init__(self, device: torch.device, nbytes: int = STAGING) -> None:
        """`nbytes`: of both buffers together."""
        self.device = device
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(nbytes // 2, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, host: torch.UntypedStorage) -> torch.UntypedStorage:
        """The same bytes on the device; work put on its current stream afterwards sees them."""
        source = torch.empty(0, dtype=torch.uint8).set_(host)
        target = torch.empty(len(source), dtype=torch.uint8, device=self.device)
        size = len(self._buffers[0])
        for begin in range(0, len(source), size):
            part = source[begin : begin + size]
            buffer, sent = self._buffers[self._turn][: len(part)], self._sent[self._turn]
            if sent is not None:
                sent.synchronize()
            buffer.copy_(part)
            target[begin : begin + size].copy_(buffer, non_blocking=True)
            if self.device.type == "cuda":
                self._sent[self._turn] = torch.cuda.current_stream(self.device).record_event()
            self._turn = 1 - self._turn
        return target.untyped_storage()


class Residency:
    """Keeps on the device what a policy allows there. For one thread at a time."""

    def __init__(
        self,
        networks: Mapping[str, Sequence[Tensor]],
        allowed: Callable[[str, str], frozenset[str]],
        staging: Staging,
        left: Callable[[str], None],
    ) -> None:
        """
        Args:
            networks: by name, every tensor that holds or views its weights (packed ones too), on the host.
            allowed: (stage, network) -> what may be there with it; see `allowed`.
            left: called with a network's name before it leaves: what was recorded over it must go.
        """
        self._homes = {name: [(x, x.detach()) for x in tensors] for name, tensors in networks.items()}
        self._allowed = allowed
        self._staging = staging
        self._left = left
        self.present: set[str] = set()

    def use(self, stage: str, network: str) -> None:
        """To be called before `network` runs in `stage`: what may not stay leaves, and then it comes."""
        for name in sorted(self.present - self._allowed(stage, network)):
            self._leave(name)
        if network in self.present:
            return
        copies: dict[int, torch.UntypedStorage] = {}
        for tensor, home in self._homes[network]:
            host = home.untyped_storage()
            if host._cdata not in copies:
                copies[host._cdata] = self._staging.copy(host)
            there = torch.empty(0, dtype=home.dtype, device=self._staging.device)
            there.set_(copies[host._cdata], home.storage_offset(), home.shape, home.stride())
            tensor.data = there
        self.present.add(network)

    def close(self) -> None:
        """Let everything leave."""
        for name in sorted(self.present):
            self._leave(name)

    def _leave(self, name: str) -> None:
        self._left(name)
        for tensor, home in self._homes[name]:
            tensor.data = home
        self.present.remove(name)
