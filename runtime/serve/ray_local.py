"""Ray Serve on this machine alone: what `latentrt serve --ray` runs.

All of it listens at 127.0.0.1, but for a gRPC port that Ray opens for each replica at every address.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

# Ray reads both as it is imported: to tell nobody that it is used, and to listen at 127.0.0.1 (the name is of the
# systems where that is the rule).
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import ray
from ray import serve

from .hosted import Deployed
from .ray_app import bound
from .server import listen, url_of

__all__ = ["run"]

_NAME = "latentrt"
_log = logging.getLogger(__name__)
_LONG = 30.0
"""Seconds after which it is told what the start waits for."""


def run(deployed: Deployed, *, host: str, port: int) -> None:
    """A cluster of this machine alone, until SIGTERM or SIGINT; then what was taken is finished.

    A signal before its replicas are up ends it at once.

    Args:
        port: 0 for any that is free.

    Raises:
        OSError: the address is taken.
        KeyboardInterrupt: a second signal came before that was finished.
    """
    with listen(host, port) as held:  # Ray says nothing where it is taken
        port = held.getsockname()[1]
    told = threading.Event()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(os.cpu_count() or 1, 2),
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        try:
            _on_signals(signal.default_int_handler)
            _start(deployed, host, port)
            _on_signals(lambda *_: told.set())
        except KeyboardInterrupt:  # there is nothing to finish yet
            return
        url = url_of(host, port)
        _log.info("listening at %s", url, extra={"fields": {"url": url}})
        told.wait()
        _on_signals(signal.default_int_handler)
        _log.info("draining")
        # Ray alone would answer 404 from here on; the ingress says 503, and when all that was taken is answered.
        drained = serve.get_app_handle(_NAME).drain.remote(deployed.drain_seconds)
        if drained.result():
            serve.delete(_NAME)
            serve.shutdown()
    finally:
        ray.shutdown()


def _start(deployed: Deployed, host: str, port: int) -> None:
    """Return when the replicas are up."""
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port, "request_timeout_s": None},
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    for name in ("ray", "ray.serve"):  # on stderr as JSON, with ours
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.WARNING)
    needs = (_LONG, deployed.min_replicas, deployed.cpus, deployed.gpus)
    what = "not all replicas are up after %g s: each of %d waits for %g CPUs and %g GPUs, and loads its model"
    telling = threading.Timer(_LONG, _log.warning, (what, *needs))
    telling.daemon = True
    telling.start()
    try:
        serve.run(bound(deployed), name=_NAME)
    finally:
        telling.cancel()


def _on_signals(act: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, act)
