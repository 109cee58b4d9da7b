"""A stand-in for what a replica takes of Ray Serve: models that take turns in its places, and a request's model."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from latentrt.runtime.serve.hosted import Deployed, Forwarded, Head

_MODEL: ContextVar[str] = ContextVar("model", default="")


def _multiplexed(*, max_num_models_per_replica: int) -> Callable[[Callable[[str], Awaitable[Any]]], Any]:
    """As Ray's: one model is loaded at a time, the one used longest ago leaves before, and no turn of the loop is
    between a model's being there and the end of the call."""

    def decorate(load: Callable[[str], Awaitable[Any]]) -> Callable[[str], Awaitable[Any]]:
        models: OrderedDict[str, Any] = OrderedDict()
        turn = asyncio.Lock()

        async def get(model: str) -> Any:
            if model in models:
                models.move_to_end(model)
                return models[model]
            async with turn:
                if model in models:
                    return models[model]
                if len(models) >= max_num_models_per_replica:
                    _, old = models.popitem(last=False)
                    await old.__del__()
                models[model] = await load(model)
                return models[model]

        return get

    return decorate


def ray_app(patch: pytest.MonkeyPatch) -> ModuleType:
    """The module of that name, imported over the stand-in; for the test alone."""
    errors = {
        "ray.exceptions": [
            *("NodeDiedError", "ObjectLostError", "RayActorError"),
            *("RayTaskError", "TaskCancelledError", "WorkerCrashedError"),
        ],
        "ray.serve.exceptions": [
            *("BackPressureError", "DeploymentUnavailableError", "ReplicaUnavailableError"),
        ],
    }
    ray = MagicMock()
    ray.serve.multiplexed, ray.serve.get_multiplexed_model_id = _multiplexed, _MODEL.get
    modules = {"ray": ray, "ray.serve": ray.serve}
    for name, classes in errors.items():
        modules[name] = MagicMock(**{one: type(one, (Exception,), {}) for one in classes})
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    name = "latentrt.runtime.serve.ray_app"
    patch.setitem(sys.modules, name, None)  # what was there, or nothing, is put back
    del sys.modules[name]
    found = import_module(name)
    patch.setattr(found, "log_as_json", lambda: None)
    return found


async def started(module: ModuleType, deployed: Deployed) -> Any:
    """A replica, as Ray makes one."""
    replica = module.Replica.__new__(module.Replica)
    await replica.__init__(deployed)
    return replica


async def forwarded(replica: Any, model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
    """Its answer to a request for a model."""
    _MODEL.set(model)
    async with aclosing(replica.forward(request)) as parts:
        async for part in parts:
            yield part
