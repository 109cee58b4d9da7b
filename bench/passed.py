"""A pytest plugin: notes the tests that passed in a file, and leaves out those that a file names.

    python -m pytest -p latentrt.bench.passed --note-passed NOW --skip-passed BEFORE ...

A run that is stopped goes on where it was: a test is noted when it is over.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "read"]


def read(file: Path) -> dict[str, float]:
    """Seconds of each test in a file, by its id; a last line that was cut off does not count."""
    found: dict[str, float] = {}
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            name, seconds = json.loads(line)
        except ValueError:
            continue
        found[name] = seconds
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--note-passed", type=Path, metavar="FILE", help="append tests that pass")
    parser.addoption("--skip-passed", type=Path, metavar="FILE", help="leave out tests that are in it")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--note-passed")
    if file is not None and not hasattr(
        config, "workerinput"
    ):  # of a run on several processes the first only
        config.pluginmanager.register(_Notes(file))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--skip-passed")
    known = {} if file is None else read(file)
    passed = [item for item in items if item.nodeid in known]
    if passed:
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if item.nodeid not in known]


class _Notes:
    """Writes a line for each test of which every phase passed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = {}
        self._bad: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self._seconds[name] = self._seconds.get(name, 0.0) + report.duration
        if report.outcome != "passed":
            self._bad.add(name)
        if report.when == "teardown" and name not in self._bad:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, round(self._seconds[name], 3)]) + "\n")
