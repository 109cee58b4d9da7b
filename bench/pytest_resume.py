"""A pytest plugin that records which tests passed, and skips those that an earlier run recorded.

    python -m pytest -p latentrt.bench.pytest_resume --note-passed NOW --skip-passed BEFORE [--note-printed FILE] ...

Each test is recorded as soon as it has finished, so a run that was stopped resumes where it was. With --note-printed
the output of the tests is recorded too, whether they pass or fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "read_passed",
    "read_printed",
]


def read_passed(file: Path) -> dict[str, float]:
    """Test id -> seconds. A truncated last line is ignored."""
    return {name: float(seconds) for name, seconds in _rows(file)}


def read_printed(file: Path) -> dict[str, str]:
    """Test id -> what it printed in its last run."""
    return {name: str(text) for name, text in _rows(file)}


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            name, value = json.loads(line)
        except ValueError:
            continue
        yield name, value


def _append(file: Path, name: str, value: float | str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps([name, value]) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--note-passed", type=Path, metavar="FILE", help="append tests that pass")
    parser.addoption("--note-printed", type=Path, metavar="FILE", help="append what tests print")
    parser.addoption("--skip-passed", type=Path, metavar="FILE", help="skip tests that are in it")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--note-passed")
    # In a distributed run only the controller records: workers have a `workerinput`.
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(file, config.getoption("--note-printed")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--skip-passed")
    passed = {} if file is None else read_passed(file)
    skipped = [item for item in items if item.nodeid in passed]
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item.nodeid not in passed]


class _Recorder:
    """Writes one line for each test whose setup, call and teardown all passed, and one for each test that printed."""

    def __init__(self, passed_file: Path, printed_file: Path | None) -> None:
        self._passed_file, self._printed_file = passed_file, printed_file
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self._seconds[name] = self._seconds.get(name, 0.0) + report.duration
        if report.outcome != "passed":
            self._failed.add(name)
        if report.when != "teardown":
            return
        if name not in self._failed:
            _append(self._passed_file, name, round(self._seconds[name], 3))
        if self._printed_file is not None and report.capstdout:
            _append(self._printed_file, name, report.capstdout)
