"""The life of `latentrt serve --ray`, told by signals, over a stand-in for Ray."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from helpers.waiting import until
from latentrt.runtime.serve.hosted import Deployed

DEPLOYED = Deployed.of({"models": [{"id": "cat"}], "min_replicas": 2, "max_replicas": 2, "gpus": 1})
OURS = [f"latentrt.runtime.serve.{name}" for name in ("ray_app", "ray_local")]
"""What imports Ray."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`ray.serve.run` returns at once, and `ray.up` says so."""
    fake = MagicMock()
    fake.up = threading.Event()
    fake.serve.run.side_effect = lambda *_, **__: fake.up.set()
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")
    errors = MagicMock()
    modules = {"ray": fake, "ray.serve": fake.serve, "ray.exceptions": errors, "ray.serve.exceptions": errors}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
    told = [(one.handlers, one.propagate, one.level) for one in loggers]
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield fake
    for name in OURS:
        sys.modules.pop(name, None)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)
    for one, (one.handlers, one.propagate, level) in zip(loggers, told, strict=True):
        one.setLevel(level)


@pytest.fixture
def module(ray: Any) -> ModuleType:
    return import_module(OURS[1])


def signalled(number: int, when: Callable[[], object]) -> None:
    """Send this process a signal, as soon as that is so."""

    def send() -> None:
        until(when, 20)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_it_though_its_replicas_never_come_up(
    number: int,
    ray: Any,
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "_LONG", 0.01)
    never = threading.Event()

    def hang(*_: object, **__: object) -> None:
        ray.up.set()
        never.wait(20)

    ray.serve.run.side_effect = hang
    signalled(number, lambda: ray.up.is_set() and caplog.records)
    module.run(DEPLOYED, host="127.0.0.1", port=0)
    ray.shutdown.assert_called_once_with()
    assert [record.getMessage() for record in caplog.records] == [
        "not all replicas are up after 0.01 s: each of 2 waits for 1 CPUs and 1 GPUs, and loads its model"
    ]


def test_the_first_signal_drains(ray: Any, module: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    signalled(signal.SIGTERM, lambda: "listening" in caplog.text)
    module.run(DEPLOYED, host="127.0.0.1", port=0)
    ray.serve.get_app_handle().drain.remote.assert_called_once_with(60.0)
    ray.serve.delete.assert_called_once_with("latentrt")
    ray.shutdown.assert_called_once_with()
    assert "not all replicas are up" not in caplog.text


def test_the_second_signal_ends_the_draining(
    ray: Any, module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    never = threading.Event()
    ray.serve.get_app_handle().drain.remote().result.side_effect = lambda: never.wait(20)
    signalled(signal.SIGTERM, lambda: "listening" in caplog.text)
    signalled(signal.SIGINT, lambda: "draining" in caplog.text)
    with pytest.raises(KeyboardInterrupt):
        module.run(DEPLOYED, host="127.0.0.1", port=0)
    ray.serve.delete.assert_not_called()
    ray.shutdown.assert_called_once_with()
