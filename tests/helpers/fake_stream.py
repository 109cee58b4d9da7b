"""A device that does nothing until it is waited for or told to: what runs beside its main stream runs late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from latentrt.runtime.streams import Event


@dataclass
class FakeEvent:
    stream: FakeStream
    place: int

    def query(self) -> bool:
        return self.place <= self.stream.done

    def synchronize(self) -> None:
        self.stream.log.append(f"wait {self.place}")
        self.stream.get_to(self.place)

    def elapsed_time(self, end_event: Event) -> float:
        assert isinstance(end_event, FakeEvent)
        assert self.query()
        assert end_event.query()
        return 1000.0 * (end_event.place - self.place)


@dataclass
class FakeStream:
    """A device's stream: work is done when the host waits for it, or when a test calls `get_to`.

    Attributes:
        log: what the host did, in order; tests add their own lines.
        places: so far; each record, and each work on the side stream, is one.
        done: the place the device has got to.
    """

    log: list[str] = field(default_factory=list)
    places: int = 0
    done: int = 0
    _side: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)

    def record_event(self, *, timed: bool = False) -> Event:
        self.places += 1
        self.log.append(f"record {self.places}")
        return FakeEvent(self, self.places)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        self.log.append(f"order after {event.place}")

    def on_side_stream(self, work: Callable[[], None]) -> Event:
        self.places += 1
        self.log.append(f"side {self.places}")
        self._side.append((self.places, work))
        return FakeEvent(self, self.places)

    def get_to(self, place: int) -> None:
        """Do the work that was put on the side stream up to a place."""
        while self._side and self._side[0][0] <= place:
            self._side.popleft()[1]()
        self.done = max(self.done, place)
