"""The HTTP server over Ray Serve: replicas that batch, an ingress before them. See ray.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import Any

# Ray reads it as it starts; nothing is told to anybody unless somebody asks for it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import Request
from starlette.responses import Response

from ...errors import QueueFullError
from .hosted import Deployed, Forwarded, Head, HostedModel
from .ingress import Ingress
from .keys import keys_of
from .logs import log_as_json
from .retries import NotServingError, ReplicaLostError
from .service import NotReadyError

__all__ = ["application", "bound"]

_LOST = (
    RayActorError, NodeDiedError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError, TaskCancelledError
)  # fmt: skip
_INGRESS_REQUESTS = 10_000  # they wait for others; what they hold is bounded by the replicas' queues
_RETRY_LOAD = 30.0
"""Seconds in which a model that did not load is not tried again: a try may take another model's place."""
_REFUSAL = 1.0
"""Seconds that a refusal takes: Ray prefers the replica with the fewest requests, and who refuses at once has none."""


class Replica:
    """A process with a GPU, or a share of the CPU, of its own."""

    async def __init__(self, deployed: Deployed) -> None:  # type: ignore[misc]  # Ray awaits it
        log_as_json()
        self._deployed = deployed
        self._keys = () if deployed.api_key_file is None else tuple(keys_of(deployed.api_key_file))
        self._hosted: dict[str, HostedModel] = {}
        self._failed: dict[str, tuple[float, str]] = {}  # when, and why
        self._started = False

        # Ray keeps what it knows of the models at a function, not a method.
        async def load(model: str) -> _Slot:
            return await self._load(model)

        self._model = serve.multiplexed(max_num_models_per_replica=deployed.models_per_replica)(load)
        first = await self._model(deployed.models[0].id)  # it is sent nothing before
        self._started = True
        self._retrying = asyncio.create_task(self._retry(first))
        self.__del__ = self._leave

    async def forward(self, request: Forwarded) -> AsyncIterator[Head | bytes]:
        """An answer of the model that the ingress chose.

        Raises:
            NotReadyError: it does not load.
            NotServingError: it did not load at the start, or its engine had stopped before.
        """
        model = serve.get_multiplexed_model_id() or self._deployed.models[0].id
        if (refusal := self._refusal(model)) is not None:
            await asyncio.sleep(_REFUSAL)
            raise refusal
        # Who leaves while it loads does not end that: others wait for it, and half a model would stay.
        taking = asyncio.ensure_future(self._take(model))
        try:
            slot = await asyncio.shield(taking)
            reason = slot.hosted.service.reason
            async for part in slot.hosted.answer(request):
                refused = isinstance(part, Head) and part.status == 503
                if refused and reason is not None and request.method == "POST":
                    await asyncio.sleep(_REFUSAL)
                    raise NotServingError(f"not ready: {reason}")
                yield part
        finally:
            taking.add_done_callback(_give_back)

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        for hosted in self._hosted.values():
            if hosted.fault is not None:
                raise RuntimeError(hosted.fault)

    async def _take(self, model: str) -> _Slot:
        """The place of a model, which stays in it until it is given back. It is taken in the step in which Ray gives
        it: in the next one it may be another model's."""
        slot: _Slot = await self._model(model)
        slot.take()
        return slot

    async def _retry(self, first: _Slot) -> None:
        """Load the first model until it does, unless another one gets its place: it has that, loaded or not, for
        `/ready` to say why."""
        while first.hosted.service.reason is not None:
            await asyncio.sleep(_RETRY_LOAD)
            if first.hosted not in self._hosted.values():
                return
            first.take()
            try:
                await first.hosted.load_again()
            finally:
                first.give_back()

    async def _leave(self) -> None:
        self._retrying.cancel()
        for hosted in list(self._hosted.values()):  # each goes as it stops
            await hosted.stop()

    def _refusal(self, model: str) -> NotReadyError | None:
        """The error for a model that is not tried again yet; None where it may be."""
        failed, why = self._failed.get(model, (-_RETRY_LOAD, ""))
        return NotReadyError(why) if time.monotonic() < failed + _RETRY_LOAD else None

    async def _load(self, model: str) -> _Slot:
        if (refusal := self._refusal(model)) is not None:  # it failed while this request waited for its turn
            raise refusal
        (settings,) = (one for one in self._deployed.models if one.id == model)
        hosted = HostedModel(settings, self._deployed, self._keys)
        await hosted.start()
        reason = hosted.service.reason
        if reason is not None and self._started:  # at the start it stays, for /ready to say why
            await hosted.stop()
            self._failed[model] = time.monotonic(), f"not ready: {reason}"
            raise NotReadyError(f"not ready: {reason}")
        self._hosted[model] = hosted
        return _Slot(self._hosted, model, self._deployed.drain_seconds)


class _Slot:
    """What Ray keeps of a loaded model."""

    def __init__(self, hosted: dict[str, HostedModel], model: str, drain_seconds: float) -> None:
        self.hosted = hosted[model]
        self._all = hosted
        self._id = model
        self._drain_seconds = drain_seconds
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        # Ray awaits it when another model needs the place; of the object's own, not the class's, for Python calls
        # the class's as well and awaits nothing.
        self.__del__ = self._leave

    def take(self) -> None:
        """From here on it stays, until it is given back as often."""
        self._users += 1
        self._unused.clear()

    def give_back(self) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()

    async def _leave(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                await self._unused.wait()
        # Nothing breaks a load off: the next model would be loaded beside it.
        await self.hosted.service.loaded()
        await self._all.pop(self._id).stop()


def _give_back(taking: asyncio.Future[_Slot]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        taking.result().give_back()


class Front:
    """The ingress as a deployment."""

    def __init__(self, replicas: Any, deployed: Deployed) -> None:
        log_as_json()
        self._handle = replicas
        self._ingress = Ingress(deployed.ids, self._send, hosts=deployed.hosts)

    async def __call__(self, request: Request) -> Response:
        return await self._ingress.answer(request)

    async def drain(self, timeout: float) -> bool:
        """`Ingress.drain`."""
        return await self._ingress.drain(timeout)

    async def _send(self, model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        handle = self._handle.options(method_name="forward", stream=True, multiplexed_model_id=model)
        response = handle.remote(request)
        try:
            async for part in response:
                yield part
        except GeneratorExit:
            response.cancel()
            raise
        except asyncio.CancelledError as error:
            response.cancel()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ReplicaLostError("the replica broke off") from error
        except Exception as error:
            meaning = _meaning(error)
            if meaning is error:
                raise
            raise meaning from error


def _meaning(error: Exception) -> Exception:
    """What an error of Ray's is to the ingress; itself where it is a fault."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, _LOST):
        return ReplicaLostError(f"the replica was lost: {type(cause).__name__}")
    if isinstance(cause, DeploymentUnavailableError):
        return ReplicaLostError("there is no replica")
    if isinstance(cause, BackPressureError):
        return QueueFullError(f"all replicas are busy, and many wait ({cause}); try again in 2 s", 2.0)
    return cause if isinstance(cause, NotReadyError | NotServingError) else error


def application(args: dict[str, Any]) -> Any:
    """`import_path` of a configuration file for `serve deploy`; `args` are the fields of `hosted.Deployed`.

    Raises:
        RequestError: a field is wrong.
    """
    return bound(Deployed.of(args))


def bound(deployed: Deployed) -> Any:
    """The application for `serve.run`: the ingress over its replicas."""
    per_replica = deployed.models_per_replica * (deployed.max_queue + deployed.max_batch)
    replicas = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": deployed.cpus, "num_gpus": deployed.gpus},
        max_ongoing_requests=per_replica,
        max_queued_requests=deployed.max_queue,
        autoscaling_config={
            "min_replicas": deployed.min_replicas,
            "max_replicas": deployed.max_replicas,
            "target_ongoing_requests": deployed.target_ongoing,
        },
        graceful_shutdown_timeout_s=deployed.drain_seconds + 10,
        health_check_period_s=5,
        health_check_timeout_s=60,
    )(Replica)
    front = serve.deployment(
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=deployed.drain_seconds + 20,
    )(Front)
    return front.bind(replicas.bind(deployed), deployed)
