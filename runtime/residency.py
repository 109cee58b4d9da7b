"""Which engines' weights are on the device when, by a policy of `memory`.

Before an engine runs, those that may not be on the device with it are offloaded. `offload.py` moves the weights of
PyTorch networks; engines that cannot be moved are closed, and loaded again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ..errors import RequestError
from .memory import Kind, Policy, kind_of, stays

if TYPE_CHECKING:
    from .engines.lazy import LazyEngine

__all__ = ["Residency", "residencies_held", "shared_residency"]


class Residency:
    """Keeps on each device what a policy allows there: of one pipeline's engines, or of several that share parts.

    Attributes:
        policy: decides which engines are offloaded.
        offloads: whether any is.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.offloads = policy != "resident"
        self._lock: AbstractContextManager[object] = threading.RLock() if self.offloads else nullcontext()
        self._loaded: list[weakref.ref[LazyEngine]] = []  # weak: their owners decide when they are freed

    @property
    def loaded(self) -> list[LazyEngine]:
        """Those on a device, in the order in which they were loaded."""
        return [engine for there in self._loaded if (engine := there()) is not None]

    def held(self) -> AbstractContextManager[object]:
        """Hold this while any of the engines is used, from the first call to the last: two users at once would offload
        each other's. Where all may stay it excludes nobody."""
        return self._lock

    def together(self, kind: Kind) -> bool:
        """Whether networks of this kind may be on the device at the same time."""
        return stays(self.policy, kind, kind)

    def enter(self, engine: LazyEngine) -> None:
        """Before it is loaded or onloaded: offload what may not stay with it.

        Raises:
            RequestError: one of those is in the midst of a loop, and a callback of that loop asks for this engine.
        """
        if not self.offloads:
            return
        running = kind_of(engine.component.name)
        leaving = [
            other
            for other in self.loaded
            if other is not engine
            and other.device == engine.device
            and not stays(self.policy, kind_of(other.component.name), running)
        ]
        for other in leaving:
            if other.looping:  # its next steps need its weights
                raise RequestError(
                    f"a callback asks for {engine.component.name} while the {other.component.name} takes its steps, "
                    f"and by memory={self.policy!r} they are not on the device together: load the pipeline with "
                    "memory='balanced', or do it after the call; for previews of its steps call fit_previewer before it"
                )
        for other in leaving:
            other.offload()
        others = [weakref.ref(other) for other in self.loaded if other is not engine]
        self._loaded = [*others, weakref.ref(engine)]

    def forget(self, engine: LazyEngine) -> None:
        """It is no longer on the device, for whatever reason."""
        self._loaded = [weakref.ref(other) for other in self.loaded if other is not engine]


def shared_residency(policy: Policy, lent: Iterable[LazyEngine]) -> Residency | None:
    """That of a pipeline with this policy to which others lend these engines; None if it has one of its own."""
    return next((x.residency for x in lent if x.residency.policy == policy), None)


@contextmanager
def residencies_held(engines: Iterable[LazyEngine]) -> Iterator[None]:
    """Hold the locks of these engines' residencies: no other thread offloads or uses them meanwhile."""
    found = {id(x.residency): x.residency for x in engines}
    with ExitStack() as stack:
        for _, residency in sorted(found.items()):  # in one order, so that no two threads deadlock
            stack.enter_context(residency.held())
        yield
