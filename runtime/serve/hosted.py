"""The HTTP application without a socket: requests come as data, answers leave as data. What a replica runs."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.types import ASGIApp, Message

from ...errors import RequestError
from ..commands import load
from ..memory import Policy
from ..pipeline import Pipeline
from ..place import release_memory
from .app import TAKEN_BEFORE, create_app
from .engine import AsyncEngine
from .metrics import Metrics
from .requests import CheckedRequest, ImageRequest, ImageResult
from .runner import OnStep, PipelineRunner, Runner
from .service import Service

__all__ = ["Deployed", "Forwarded", "Head", "HostedModel", "ModelSettings", "call"]


@dataclass(frozen=True)
class Forwarded:
    """A request on its way to a replica; `path` is decoded, `query` is not.

    Attributes:
        again: a replica that had taken it was lost.
    """

    method: str
    path: str
    query: str = ""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    again: bool = False


@dataclass(frozen=True)
class Head:
    """How an answer begins; its body follows in pieces."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def header(self, name: str) -> str:
        """Its first value; empty where there is none."""
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), "")


class ModelSettings(BaseModel):
    """One model: its id in requests, and what `Pipeline.from_pretrained` is given.

    Attributes:
        source: a function to call instead, as `module:name`; it gives a `Pipeline` or a `Runner`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    id: str = Field(min_length=1, max_length=256)
    model: str = "demo"
    refiner: str | None = None
    backend: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    variant: str | None = None
    device: str | None = None
    graphs: bool | None = None
    memory: Policy = "resident"
    memory_limit: int | str | None = None
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    source: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")

    def load(self) -> Pipeline | Runner:
        """Build it; weights come when it is warmed up."""
        if self.source is not None:
            module, _, name = self.source.partition(":")
            made: Pipeline | Runner = getattr(import_module(module), name)()
            return made
        pipe = load(Namespace(**self.model_dump()))
        pipe.set_progress_bar_config(disable=True)
        return pipe


class Deployed(BaseModel):
    """What is deployed: `args` of the configuration file. ray.md says how to choose.

    Attributes:
        models: by id; the first is taken where a request names none.
        models_per_replica: kept loaded at once; the one used longest ago leaves.
        min_replicas, max_replicas: of them, each with `gpus` and `cpus` of its own.
        target_ongoing: requests a replica should have before there are more of them.
        max_batch, max_queue: images in a call, and waiting, of a model in a replica.
        drain_seconds: for a replica that leaves to finish what it has.
        hosts: names one of which must be asked for; none for no such check.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    models: tuple[ModelSettings, ...] = Field(min_length=1)
    models_per_replica: int = Field(default=1, ge=1)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    gpus: float = Field(default=0.0, ge=0)
    cpus: float = Field(default=1.0, ge=0)
    target_ongoing: float = Field(default=8.0, gt=0)
    max_batch: int = Field(default=8, ge=1)
    max_queue: int = Field(default=64, ge=1)
    drain_seconds: float = Field(default=60.0, ge=0, le=1_000_000)
    hosts: tuple[str, ...] = ()
    api_key_file: Path | None = None

    @field_validator("models")
    @classmethod
    def _distinct(cls, models: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
        ids = [model.id for model in models]
        if len(set(ids)) < len(ids):
            raise ValueError(f"ids must differ; these are {', '.join(ids)}")
        return models

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Deployed:
        """From a configuration file.

        Raises:
            RequestError: with the first field that is wrong.
        """
        try:
            made = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"{where}: {first['msg']}; see runtime/serve/ray.md") from error
        if made.max_replicas < made.min_replicas:
            raise RequestError(
                f"max_replicas is {made.max_replicas}, fewer than min_replicas, {made.min_replicas}"
            )
        return made

    @property
    def ids(self) -> list[str]:
        return [model.id for model in self.models]


class HostedModel:
    """One model with the whole application around it: queue, batches, limits, keys, page."""

    def __init__(self, model: ModelSettings, deployed: Deployed, api_keys: tuple[str, ...]) -> None:
        metrics = Metrics()
        self._held = _Held(model)
        self.service = Service(
            model.id,
            lambda: AsyncEngine(
                self._held.loaded(),
                max_batch=deployed.max_batch,
                max_waiting=deployed.max_queue,
                on_batch=metrics.batch,
            ),
        )
        self._app = create_app(
            self.service,
            metrics=metrics,
            hosts=deployed.hosts,
            api_keys=api_keys,
            drain_seconds=deployed.drain_seconds,
        )
        self._life = AsyncExitStack()
        self._was_ready = False

    async def start(self) -> None:
        """Load it, and return when it is ready or cannot be; `/ready` says which."""
        await self._life.enter_async_context(self._app.router.lifespan_context(self._app))
        await self._loaded()

    async def load_again(self) -> None:
        """As `start`, after that did not load it."""
        self.service.begin()
        await self._loaded()

    async def _loaded(self) -> None:
        await self.service.loaded()
        self._was_ready = self.service.reason is None

    @property
    def fault(self) -> str | None:
        """Why it serves no more, though it did; None for one that is well, or never was."""
        return self.service.reason if self._was_ready else None

    def answer(self, request: Forwarded) -> AsyncIterator[Head | bytes]:
        return call(self._app, request)

    async def stop(self) -> None:
        """Finish what was taken, and free the model's memory."""
        self._was_ready = False
        await self._life.aclose()
        await asyncio.to_thread(self._held.free)


class _Held:
    """A runner to let go of: FastAPI keeps the functions of every application for good, and with them its engine."""

    def __init__(self, model: ModelSettings) -> None:
        self._model = model
        self._runner: Runner | None = None
        self._left = False

    def loaded(self) -> Runner:
        """Load it, in place of what an earlier try left."""
        self._drop()
        made = self._model.load()
        self._runner = PipelineRunner(made) if isinstance(made, Pipeline) else made
        if self._left:  # meanwhile, in another thread
            self._runner = None
        return self

    def free(self) -> None:
        """For good, even while it is being loaded."""
        self._left = True
        self._drop()

    def _drop(self) -> None:
        self._runner = None
        release_memory()  # an error's frames may hold it

    @property
    def _there(self) -> Runner:
        if self._runner is None:
            raise AssertionError("an engine that has stopped makes nothing")
        return self._runner

    def check(self, request: ImageRequest) -> CheckedRequest:
        return self._there.check(request)

    @property
    def captures(self) -> bool:
        return self._there.captures

    def warm_up(self, batches: Sequence[int] = (1,)) -> None:
        self._there.warm_up(batches)

    def run(self, requests: Sequence[CheckedRequest], on_step: OnStep) -> list[ImageResult]:
        return self._there.run(requests, on_step)


async def call(app: ASGIApp, request: Forwarded) -> AsyncIterator[Head | bytes]:
    """An ASGI application's answer: its head, then pieces of the body. Closing the iterator is a client that left."""
    parts: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await asyncio.Event().wait()  # who leaves cancels
        raise AssertionError("an event that nobody sets")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            parts.put_nowait(Head(message["status"], tuple(message.get("headers", ()))))
        elif body := message.get("body", b""):
            parts.put_nowait(body)

    async def run() -> None:
        try:
            await app(_scope(request), receive, send)
        finally:
            parts.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (part := await parts.get()) is not None:
            yield part
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _scope(request: Forwarded) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": quote(request.path).encode(),
        "query_string": request.query.encode("latin-1"),
        "root_path": "",
        "headers": list(request.headers),
        TAKEN_BEFORE: request.again,
        "client": None,
        "server": None,
        "state": {},
    }
