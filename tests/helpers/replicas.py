"""Replicas that are applications in this process, lost on command, and the ingress before them. No Ray."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx2 as httpx
from latentrt.errors import QueueFullError
from latentrt.runtime.serve.hosted import Deployed, Forwarded, Head, HostedModel
from latentrt.runtime.serve.ingress import Ingress
from latentrt.runtime.serve.retries import ReplicaLostError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from helpers.fake_runner import in_loop

IMAGES = "/v1/images/generations"
LOST = ReplicaLostError("the replica was lost")
FULL = QueueFullError("all replicas are busy; try again in 2 s", 2.0)
DEPLOYED = Deployed.of(
    {
        "models": [
            {"id": "cat", "source": "helpers.ray_runner:quick"},
            {"id": "dog", "source": "helpers.ray_runner:quick"},
        ]
    }
)


class Replicas:
    """`losses`: of each try to come, the parts of the answer that arrive before the replica dies; None for no death.

    Attributes:
        sent: (model, request) of each try.
    """

    def __init__(self, *losses: int | None) -> None:
        self.losses = list(losses)
        self.sent: list[tuple[str, Forwarded]] = []
        self.hosted: dict[str, HostedModel] = {}

    async def __aenter__(self) -> Replicas:
        for settings in DEPLOYED.models:
            self.hosted[settings.id] = HostedModel(settings, DEPLOYED, ())
            await self.hosted[settings.id].start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for hosted in self.hosted.values():
            await hosted.stop()

    async def send(self, model: str, request: Forwarded) -> AsyncIterator[Head | bytes]:
        self.sent.append((model, request))
        left = self.losses.pop(0) if self.losses else None
        async with aclosing(self.hosted[model].answer(request)) as parts:
            async for part in parts:
                if left == 0:
                    raise ReplicaLostError(str(LOST))
                yield part
                left = None if left is None else left - 1
            if left is not None:
                raise ReplicaLostError(str(LOST))

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.body) for _, request in self.sent]


@asynccontextmanager
async def client_of(ingress: Ingress) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose requests the ingress answers, without a socket."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await (await ingress.answer(Request(scope, receive)))(scope, receive, send)

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client


def with_ingress(
    replicas: Replicas,
    test: Callable[[httpx.AsyncClient], Awaitable[None]],
    **options: Any,
) -> None:
    """Run a test against an ingress over these replicas."""

    async def run() -> None:
        async with replicas:
            ingress = Ingress(["cat", "dog"], replicas.send, **{"pause": 0.001, **options})
            async with client_of(ingress) as client:
                await test(client)

    in_loop(run())


def body(**fields: Any) -> dict[str, Any]:
    """The body of a request for an image; `fields` are added."""
    return {"prompt": "x", "steps": 3, **fields}
