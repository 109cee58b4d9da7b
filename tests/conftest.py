"""Shared set-up: no network, few threads, a cache of its own for each test run."""

from __future__ import annotations

import gc
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Imports and collection leave a million objects that live as long as the process. The garbage collector would walk them
# all, while they come and again and again while tests run: a tenth of the time of all tests.
gc.disable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    gc.freeze()
    gc.enable()
    try:
        return (yield)
    finally:
        gc.unfreeze()  # libraries tell at the end what was not collected


# Triton reads this once, when it is first imported, and other libraries may import it: so it is set before any
# test module is. Where there is a GPU the kernels' tests run compiled on it instead.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from or written to the user's own cache."""
    os.environ["LATENTRT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache_dir() -> Path:
    return Path(os.environ["LATENTRT_CACHE"])


@pytest.fixture(scope="session")
def shared_export_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all worker processes of a run share, so that each component is exported once; don't damage it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("sdxl")` is the folder of a tiny random checkpoint, written once a session; don't change it.

    Takes the arguments of `tiny_checkpoints.save_tiny` but the path.
    """
    folders: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, **options: Any) -> Path:
        from helpers.tiny_checkpoints import save_tiny

        key = (kind, *sorted(options.items()))
        if key not in folders:
            with redirect_stderr(io.StringIO()):  # its progress bars are not what a test reads
                folders[key] = save_tiny(kind, tmp_path_factory.mktemp(kind), **options)
        return folders[key]

    return make


# What a test may need that a machine may lack, by marker: why it skips there.
_MISSING = {
    "gpu": None if torch.cuda.is_available() else "needs a CUDA GPU",
    "browser": None if shutil.which("chromium") else "needs Chromium on the path: apt-get install chromium",
    "ray": None if importlib.util.find_spec("ray") else 'needs Ray: pip install "latentrt[ray]"',
}
# Where the checks of a change run only a GPU may be wanting.
_MAY_SKIP_FOR = ("gpu",) if os.environ.get("LATENTRT_SKIP_ONLY_GPU") else tuple(_MISSING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs what is not here skips, and says what that is."""
    for item in items:
        for marker, reason in _MISSING.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip hides a test; only what its marker says it needs may do that."""
    report = yield
    excused = any(item.get_closest_marker(marker) for marker in _MAY_SKIP_FOR)
    if report.skipped and not hasattr(report, "wasxfail") and not excused:
        report.outcome = "failed"
        report.longrepr = f"skipped, and not for want of {' or '.join(_MAY_SKIP_FOR)}: {report.longrepr}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After an illegal memory access all that follows would fail in the same process. A worker has sent the report by
    now and ends; xdist starts another one, which goes on with the next test."""
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        from latentrt.bench.kernel_timing import gpu_is_alive

        if not gpu_is_alive(torch.device("cuda")):
            os._exit(1)


# Three minutes are the most that the demo's exports and builds may take on two cores, where a change is checked;
# elsewhere the figure is only shown. It is the time that processors worked, all worker processes and their children
# together: clocks go on while other programs run.
_DEMO = ("tests/export/test_export_demo.py", "tests/export/test_demo_engines.py")
_DEMO_SECONDS = 2 * 180
_HOLD_DEMO_TIME = bool(os.environ.get("LATENTRT_HOLD_DEMO_TIME"))
_WORKED = "processor seconds"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    begun = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        if item.nodeid.startswith(_DEMO) and not item.get_closest_marker("full"):
            item.user_properties.append((_WORKED, sum(os.times()[:4]) - begun))


def _demo_seconds(config: pytest.Config) -> float:
    """Processor seconds of all tests of `_DEMO` that have run."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    reports = [] if reporter is None else [report for found in reporter.stats.values() for report in found]
    ended = [report for report in reports if getattr(report, "when", None) == "call"]
    return sum(dict(report.user_properties).get(_WORKED, 0.0) for report in ended)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    late = _HOLD_DEMO_TIME and _demo_seconds(session.config) > _DEMO_SECONDS
    if late and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    seconds = _demo_seconds(terminalreporter.config)
    if seconds:
        beyond = "FAILED: beyond" if _HOLD_DEMO_TIME else "beyond"
        state = "within" if seconds <= _DEMO_SECONDS else beyond
        terminalreporter.write_line(
            f"the demo's exports and builds: {seconds:.0f} s of processor time, {state} the {_DEMO_SECONDS} s that "
            "two cores have in three minutes"
        )


# What a process decides or says once, by module: functions with a cache.
_ONCE = {
    "latentrt.kernels._dispatch": ("_say_once", "_triton_missing"),
    "latentrt.kernels._triton": ("specializes_wide_sums",),
    "latentrt.kernels.tuning": ("_with_data", "architectures", "load"),
    "latentrt.runtime.engines.plugin_code": ("driver",),
    "latentrt.runtime.engines.plugins": ("_digest",),
    "latentrt.runtime.engines.products": ("load",),
    "latentrt.bench.full": ("_package_digest",),
}


def _forget() -> None:
    for name, functions in _ONCE.items():
        if (module := sys.modules.get(name)) is not None:
            for function in functions:
                getattr(module, function).cache_clear()


@pytest.fixture(autouse=True)
def _once_a_test() -> Iterator[None]:
    """What is decided or said once a process is so once a test: neither what ran before it nor what it plants stays."""
    _forget()
    yield
    _forget()


@pytest.fixture
def untuned(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels run as if none had been tuned on a GPU: by plain rows, heads wider than a block by PyTorch's libraries.
    The folder that has these block sizes, which tests may change."""
    from latentrt.kernels import tuning

    folder = tmp_path_factory.mktemp("tuned")
    for path in tuning.FOLDER.iterdir():
        data = json.loads(path.read_text(encoding="utf-8"))
        data["measured_on"] = {}
        for table, rows in data["tables"].items():
            for key in [key for key in rows if not key.endswith(tuning.PLAIN)]:
                rows[key] = plain = rows.pop(f"{key}{tuning.PLAIN}", rows[key])
                if table == "attention_wide" and key.endswith("/any"):
                    rows |= {key: dict(tuning.LIBRARY), f"{key}{tuning.PLAIN}": plain}
        (folder / path.name).write_text(json.dumps(data), encoding="utf-8")
    monkeypatch.setattr(tuning, "FOLDER", folder)
    return folder


@pytest.fixture(autouse=True)
def _own_log_levels() -> Iterator[None]:
    """The command line sets levels for its process; a test that runs it leaves none behind."""
    loggers = [logging.getLogger(name) for name in ("latentrt", "latentrt.runtime.prepare")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def run_cli(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`run_cli("info", "x.png")` in an empty folder -> (exit code, stdout, stderr)."""
    from latentrt.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call
