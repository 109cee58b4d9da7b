"""The HTTP server over Ray Serve: replicas that batch, an ingress before them. See ray.md."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

# Ray reads it as it starts; nothing is told to anybody unless somebody asks for it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import Request
from starlette.responses import Response

from ...errors import QueueFullError
from .commands import keys_of
from .hosted import Deployed, Forwarded, Head, HostedModel
from .ingress import Ingress, ReplicaLostError
from .logs import log_as_json

__all__ = ["application", "bound"]

_LOST = (
    RayActorError, NodeDiedError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError
)  # fmt: skip
_INGRESS_REQUESTS = 10_000  # they wait for others; what they hold is bounded by the replicas' queues


class Replica:
    """A process with a GPU, or a share of the CPU, of its own."""

    async def __init__(self, deployed: Deployed) -> None:  # type: ignore[misc]  # Ray awaits it
        log_as_json()
        self._deployed = deployed
        self._keys = () if deployed.api_key_file is None else tuple(keys_of(deployed.api_key_file))
        self._hosted: dict[str, HostedModel] = {}

        async def load(
            model: str,
        ) -> _Slot:  # Ray keeps what it knows of the models at a function, not a method
            return await self._load(model)

        self._model = serve.multiplexed(max_num_models_per_replica=deployed.models_per_replica)(load)
        await self._model(deployed.models[0].id)  # it is sent nothing before
        self.__del__ = self._leave

    async def forward(self, request: Forwarded) -> AsyncIterator[Head | bytes]:
        """An answer of the model that the ingress chose."""
        model = await self._model(serve.get_multiplexed_model_id() or self._deployed.models[0].id)
        async for part in model.hosted.answer(request):
            yield part

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        for hosted in self._hosted.values():
            if hosted.fault is not None:
                raise RuntimeError(hosted.fault)

    async def _leave(self) -> None:
        for hosted in self._hosted.values():
            await hosted.stop()

    async def _load(self, model: str) -> _Slot:
        (settings,) = (one for one in self._deployed.models if one.id == model)
        hosted = HostedModel(settings, self._deployed, self._keys)
        self._hosted[model] = hosted
        await hosted.start()
        return _Slot(self._hosted, model)


class _Slot:
    """What Ray keeps of a loaded model."""

    def __init__(self, hosted: dict[str, HostedModel], model: str) -> None:
        self.hosted = hosted[model]
        self._all = hosted
        self._id = model
        # Ray awaits it when another model needs the place; of the object's own, not the class's, for Python calls
        # the class's as well and awaits nothing.
        self.__del__ = self._leave

    async def _leave(self) -> None:
        self._all.pop(self._id, None)
        await self.hosted.stop()


class Front:
    """The ingress as a deployment."""

    def __init__(self, replicas: Any, deployed: Deployed) -> None:
        log_as_json()
        self._handle = replicas
        self._ingress = Ingress(deployed.ids, self._send)

    async def __call__(self, request: Request) -> Response:
        return await self._ingress.answer(request)

    async def _send(self, model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        handle = self._handle.options(method_name="forward", stream=True, multiplexed_model_id=model)
        response = handle.remote(request)
        try:
            async for part in response:
                yield part
        except _LOST as error:
            raise ReplicaLostError(f"the replica was lost: {type(error).__name__}") from error
        except DeploymentUnavailableError as error:
            raise ReplicaLostError("there is no replica") from error
        except BackPressureError as error:
            raise QueueFullError(
                f"all replicas are busy, and many wait ({error}); try again in 2 s", 2.0
            ) from error
        finally:
            response.cancel()  # nothing, once it is whole


def application(args: dict[str, Any]) -> Any:
    """`import_path` of a configuration file for `serve deploy`; `args` are the fields of `hosted.Deployed`.

    Raises:
        RequestError: a field is wrong.
    """
    return bound(Deployed.of(args))


def bound(deployed: Deployed) -> Any:
    """For `serve.run`."""
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
