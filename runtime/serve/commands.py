"""The body of `latentrt serve`."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import logging
import os
from collections.abc import Iterator
from socket import getaddrinfo

from ...errors import BackendUnavailableError
from ..checks import check_integer, check_number
from .keys import keys_of

__all__ = ["serve"]

_log = logging.getLogger(__name__)


def serve(args: argparse.Namespace) -> Iterator[str]:
    """Serve until told to stop. Everything is said in the log, as JSON on stderr."""
    keys = [] if args.api_key_file is None else keys_of(args.api_key_file)
    check_integer("--port", args.port, 0, 65_535)
    check_integer("--max-queue", args.max_queue, 1, None)
    check_integer("--max-batch", args.max_batch, 1, None)
    check_number("--drain-seconds", args.drain_seconds, 0, 1_000_000)
    if args.ray:
        _serve_by_ray(args)
        return
    try:
        from .app import create_app
        from .server import Server, allow_files, listen
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f'the server needs {error.name}, which is not installed; pip install "latentrt[serve]"'
        ) from error
    from ..commands import load
    from ..weights import public_name
    from .engine import AsyncEngine
    from .logs import log_as_json
    from .metrics import Metrics
    from .schema import Limits
    from .service import Service

    metrics = Metrics()
    limits = Limits(images=min(Limits.images, args.max_queue))

    def engine() -> AsyncEngine:
        pipe = load(args)
        pipe.set_progress_bar_config(disable=True)
        return AsyncEngine(pipe, max_batch=args.max_batch, max_waiting=args.max_queue, on_batch=metrics.batch)

    service = Service(public_name(args.model), engine, on_ready=_leave_to_stay)
    app = create_app(
        service,
        metrics=metrics,
        limits=limits,
        hosts=_hosts(args),
        api_keys=keys,
        drain_seconds=args.drain_seconds,
    )
    with listen(args.host, args.port) as socket:
        log_as_json()
        allow_files()
        if not keys and not _is_local(args.host):
            _log.warning(
                "listening on %s without an API key: anyone who can connect can use this server; see --api-key-file",
                args.host,
            )
        Server(app, service, metrics=metrics, drain_seconds=args.drain_seconds, limits=limits).run([socket])
    gc.unfreeze()  # Python frees it all as it ends; else Triton says on stderr what it misses
    if service.at_work:
        # The interpreter would wait for the thread: for a model that is being loaded, or a step on the device.
        logging.shutdown()
        os._exit(0)
    yield from ()


def _leave_to_stay() -> None:
    """Have the collector pass over what there is: PyTorch's modules and the one model stay as long as the process. A
    full collection looks through them all, and holds up the device's thread for a tenth of a second.

    Not in a replica of Ray's, whose models come and go: a cycle that has been passed over is never freed.
    """
    gc.collect()
    gc.freeze()


def _serve_by_ray(args: argparse.Namespace) -> None:
    try:
        from .hosted import Deployed
        from .ray_local import run
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f'--ray needs {error.name}, which is not installed; pip install "latentrt[ray]"'
        ) from error
    from ..place import parse_device
    from ..weights import public_name
    from .logs import log_as_json

    least, most = args.replicas
    from_pretrained = [
        "model",
        "refiner",
        "backend",
        "dtype",
        "variant",
        "device",
        "graphs",
        "memory",
        "memory_limit",
        "timestep_spacing",
    ]
    deployed = Deployed.of(
        {
            "models": [
                {"id": public_name(args.model), **{name: getattr(args, name) for name in from_pretrained}}
            ],
            "min_replicas": least,
            "max_replicas": most,
            "gpus": 1 if parse_device(args.device).type == "cuda" else 0,
            "cpus": args.cpus,
            "max_batch": args.max_batch,
            "max_queue": args.max_queue,
            "drain_seconds": args.drain_seconds,
            "hosts": _hosts(args),
            "api_key_file": args.api_key_file and args.api_key_file.resolve(),
        }
    )
    log_as_json()
    run(deployed, host=args.host, port=args.port)


def _hosts(args: argparse.Namespace) -> tuple[str, ...]:
    """The names under which it is asked; none for any: where others reach it, names say nothing, and where there are
    keys, those say more."""
    if not args.allowed_host and (args.api_key_file is not None or not _is_local(args.host)):
        return ()
    return ("localhost", "127.0.0.1", "::1", args.host, *args.allowed_host)


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address, or a name's."""
    try:
        found = getaddrinfo(host, None)
    except (OSError, UnicodeError):  # there is none; to listen there says so
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)
