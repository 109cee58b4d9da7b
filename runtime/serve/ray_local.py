"""Ray Serve on this machine alone: what `latentrt serve --ray` runs.

All of it listens at 127.0.0.1, but for a gRPC port that Ray opens for each replica at every address.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

# Ray reads both as it is imported: to tell nobody that it is used, and to listen at 127.0.0.1 (the name is of the
# systems where that is the rule).
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

import ray
from ray import serve

from .hosted import Deployed
from .ray_app import bound
from .server import listen

__all__ = ["run"]

_NAME = "latentrt"
_log = logging.getLogger(__name__)


def run(deployed: Deployed, *, host: str, port: int) -> None:
    """A cluster of this machine alone, until SIGTERM or SIGINT; then what was taken is finished.

    Args:
        port: 0 for any that is free.

    Raises:
        OSError: the address is taken.
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
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: told.set())
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port, "request_timeout_s": None},
            logging_config={"encoding": "JSON", "enable_access_log": False},
        )
        for name in ("ray", "ray.serve"):  # on stderr as JSON, with ours
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.WARNING)
        serve.run(bound(deployed), name=_NAME)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _log.info("listening at %s", url, extra={"fields": {"url": url}})
        told.wait()
        _log.info("draining")
        # Ray alone would answer 404 from here on; the ingress says 503, and when all that was taken is answered.
        drained = serve.get_app_handle(_NAME).drain.remote(deployed.drain_seconds)
        if drained.result():
            serve.delete(_NAME)
            serve.shutdown()
    finally:
        ray.shutdown()
