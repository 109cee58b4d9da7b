"""A pytest plugin: notes the tests that passed in a file, and leaves out those that a file names.

    python -m pytest -p latentrt.bench.passed --note-passed NOW --skip-passed BEFORE [--note-printed FILE] ...

A run that is stopped goes on where it was: a test is noted when it is over. What tests print is noted too if asked,
whether they pass or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "read", "read_printed"]


def read(file: Path) -> dict[str, float]:
    """Seconds of each test in a file, by its id; a last line that was cut off does not count."""
    return {name: float(seconds) for name, seconds in _rows(file)}


def read_printed(file: Path) -> dict[str, str]:
    """What each test printed the last time, by its id."""
    return {name: str(text) for name, text in _rows(file)}


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            name, value = json.loads(line)
        except ValueError:
            continue
        yield name, value


def _add(file: Path, name: str, value: float | str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([name, value]) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--note-passed", type=Path, metavar="FILE", help="append tests that pass")
    parser.addoption("--note-printed", type=Path, metavar="FILE", help="append what tests print")
    parser.addoption("--skip-passed", type=Path, metavar="FILE", help="leave out tests that are in it")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--note-passed")
    # Of a run on several processes the first only: the others have a `workerinput`.
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Notes(file, config.getoption("--note-printed")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--skip-passed")
    known = {} if file is None else read(file)
    passed = [item for item in items if item.nodeid in known]
    if passed:
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if item.nodeid not in known]


class _Notes:
    """Writes a line for each test of which every phase passed, and elsewhere one for each that printed."""

    def __init__(self, file: Path, printed: Path | None) -> None:
        self._file, self._printed = file, printed
        self._seconds: dict[str, float] = {}
        self._bad: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self._seconds[name] = self._seconds.get(name, 0.0) + report.duration
        if report.outcome != "passed":
            self._bad.add(name)
        if report.when != "teardown":
            return
        if name not in self._bad:
            _add(self._file, name, round(self._seconds[name], 3))
        if self._printed is not None and report.capstdout:
            _add(self._printed, name, report.capstdout)
