"""Progress of a benchmark as a live table, on a terminal only; elsewhere it is logged."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

__all__ = ["LiveTable"]

_log = logging.getLogger(__name__)


class LiveTable:
    """`with LiveTable("demo", names) as live:` and then `live.update(side, state)`."""

    def __init__(self, title: str, sides: list[str], console: Console | None = None) -> None:
        self._title = title
        self._states = dict.fromkeys(sides, "waiting")
        console = console or Console(file=sys.stderr)
        self._live = Live(self._table(), console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, side: str, state: str) -> None:
        """Show the state of a side."""
        _log.info("%s, %s: %s", self._title, side, state)
        self._states[side] = state
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(title=self._title, title_justify="left")
        table.add_column("side")
        table.add_column("state")
        for side, state in self._states.items():
            table.add_row(side, state)
        return table
