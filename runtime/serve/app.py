"""The HTTP interface: OpenAI's images API over one engine, and what operators need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ... import __version__
from ...errors import LatentRTError
from ..image import png_bytes
from .answers import (
    completed_event,
    error_response,
    images_json,
    partial_event,
    refusal,
    server_timing,
    sse,
)
from .description import Model, Models, Readiness, describe, errors, images
from .hosts import Hosts
from .jobs import Job
from .keys import Keys
from .metrics import Metrics
from .middleware import RequestMiddleware
from .requests import Finished, ImageResult, Progress
from .schema import FieldError, GenerationBody, Limits, image_requests
from .service import Service

__all__ = ["TAKEN_BEFORE", "create_app", "preview_is_due"]

_log = logging.getLogger(__name__)

TAKEN_BEFORE = "latentrt.taken_before"
"""In a request's scope, where no client can write: whether a replica that had taken it was lost."""
_HEARTBEAT = 15.0
"""Seconds without news after which a stream says that it lives: proxies hang up on silence."""


def create_app(
    service: Service,
    *,
    metrics: Metrics,
    limits: Limits | None = None,
    hosts: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    drain_seconds: float = 60.0,
) -> FastAPI:
    """An ASGI application that loads the service when it starts and drains it when it ends.

    Args:
        metrics: the same that the engine's `on_batch` tells.
        hosts: one of these names must be asked for; none for no such check.
        api_keys: one of them must come as bearer token; none for no such check.
        drain_seconds: how long to finish what was taken.
    """
    bounds = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.begin()
        yield
        await service.drain(drain_seconds)

    app = FastAPI(
        title="latentrt",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to the Host header's name, whatever that is
        responses=errors(403) if hosts else None,  # everywhere
    )
    metrics.watch(service)
    app.add_middleware(
        RequestMiddleware, limits=bounds, metrics=metrics, hosts=Hosts(hosts), keys=Keys(api_keys)
    )
    _handle_errors(app, metrics)

    @app.post("/v1/images/generations", responses=images(), tags=["OpenAI"])
    async def generate(request: Request, body: GenerationBody) -> Response:
        """Make images. `stream` answers with server-sent events, `Accept: image/png` with the picture itself."""
        as_png = _wants_png(request)
        if as_png and (body.stream or (body.n or 1) > 1):
            field = "stream" if body.stream else "n"
            raise FieldError(
                field, f"{field} does not go with Accept: image/png, whose answer is one picture"
            )
        requests = image_requests(body, service.model, bounds)
        streamed = bool(body.stream)
        jobs = service.engine.submit(
            *requests,
            timeout=body.timeout or bounds.timeout,
            previews=streamed and body.partial_images != 0,
            again=bool(request.scope.get(TAKEN_BEFORE)),
        )
        request.state.log.update(images=len(jobs), steps=requests[0].steps, stream=streamed)
        if streamed:
            return _EventStream(_events(request, jobs, body.partial_images, metrics), jobs)
        try:
            results = await _all(request, jobs)
        except Exception as error:  # not left to the framework, which would close the connection as well
            return _refused(metrics, request, error)
        if results is None:
            return Response(status_code=499)  # nobody reads it; the log does
        metrics.memory(results[0].peak_memory)
        return await _answer(results, as_png)

    @app.get("/v1/models", responses=errors(401), tags=["OpenAI"])
    async def models() -> Models:
        return Models(object="list", data=[_model(service)])

    @app.get("/v1/models/{model:path}", responses=errors(401, 404), tags=["OpenAI"])
    async def model(model: str) -> Model:
        if model != service.model:
            raise FieldError(
                "model", f"there is no model {model[:80]!r} here; this server has {service.model!r}"
            )
        return _model(service)

    _add_operators_routes(app, service, metrics)

    @cache
    def description() -> dict[str, Any]:
        return describe(app, model=service.model, limits=bounds, keyed=bool(api_keys))

    app.openapi = description  # type: ignore[method-assign]
    return app


def _add_operators_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Health, readiness and metrics, and the page for trying it out."""

    @app.get("/health", responses={503: {"description": "To be started anew."}}, tags=["operators"])
    async def health(answer: Response) -> dict[str, str]:
        """The process answers, and a fault has not ended its engine for good."""
        answer.status_code = 503 if service.stopped else 200
        return {"status": "stopped" if service.stopped else "ok"}

    @app.get(
        "/ready", responses={503: {"model": Readiness, "description": "With the reason."}}, tags=["operators"]
    )
    async def ready(answer: Response) -> Readiness:
        """Whether requests are taken: the model is loaded, and has made an image."""
        reason = service.reason
        answer.status_code = 200 if reason is None else 503
        return Readiness(ready=reason is None, reason=reason)

    @app.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses=errors(401),
        tags=["operators"],
    )
    async def exposition() -> Response:
        """In Prometheus' format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})


class _EventStream(StreamingResponse):
    """Server-sent events whose jobs leave with their reader."""

    def __init__(self, events: AsyncIterator[str], jobs: Sequence[Job]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold them back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self._jobs:
                job.cancel()


async def _answer(results: Sequence[ImageResult], as_png: bool) -> Response:
    """Off the event loop: images become many megabytes of text. Each takes a core for a while, so they share them."""
    first = results[0]
    headers = {"Server-Timing": server_timing(first.timings)}
    pngs = await asyncio.gather(
        *(asyncio.to_thread(png_bytes, result.image, result.parameters) for result in results)
    )
    if as_png:
        headers["X-Seed"] = str(first.parameters["seed"])
        return Response(pngs[0], media_type="image/png", headers=headers)
    return await asyncio.to_thread(lambda: JSONResponse(images_json(results, pngs), headers=headers))


async def _events(
    request: Request, jobs: Sequence[Job], partial_images: int | None, metrics: Metrics
) -> AsyncIterator[str]:
    """Progress of every image as it comes, and each image when it is made."""
    queue: asyncio.Queue[str | None] = asyncio.Queue(maxsize=1)  # who reads slowly misses previews

    async def follow(image: int, job: Job) -> None:
        part = 0
        try:
            async for event in job.events():
                if isinstance(event, Finished):
                    metrics.memory(event.result.peak_memory)
                    await queue.put(await asyncio.to_thread(_completed, event.result, image))
                elif event.preview is not None and preview_is_due(
                    event.step, event.steps, partial_images, part
                ):
                    await queue.put(await asyncio.to_thread(_partial, event, image, part))
                    part += 1
        except Exception as error:
            refused = refusal(error)
            _note(metrics, request, refused.code, error, refused.status)
            await queue.put(refused.event(image))
        await queue.put(None)

    followers = [asyncio.create_task(follow(k, job)) for k, job in enumerate(jobs)]
    try:
        ended = 0
        while ended < len(jobs):
            try:
                async with asyncio.timeout(_HEARTBEAT):
                    event = await queue.get()
            except TimeoutError:
                event = ": it is still on its way\n\n"
            if event is None:
                ended += 1
            else:
                yield event
        yield "data: [DONE]\n\n"
    finally:
        for follower in followers:
            follower.cancel()


def _completed(result: ImageResult, image: int) -> str:
    png = png_bytes(result.image, result.parameters)
    return sse("image_generation.completed", completed_event(result, png, image))


def _partial(progress: Progress, image: int, part: int) -> str:
    return sse("image_generation.partial_image", partial_event(progress, image, part))


def preview_is_due(step: int, steps: int, wanted: int | None, sent: int) -> bool:
    """Whether a preview of this step is sent: `wanted` of them, evenly over the steps; None for each."""
    return wanted is None or (sent < wanted and step * (wanted + 1) >= (sent + 1) * steps)


async def _all(request: Request, jobs: Sequence[Job]) -> list[ImageResult] | None:
    """Every result; None when the client hung up. When one cannot be made the others are not either."""
    results = asyncio.create_task(_gathered(jobs))
    leaving = asyncio.create_task(_hang_up(request))
    try:
        await asyncio.wait([results, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not results.done():
            return None
        return await results
    finally:
        leaving.cancel()
        results.cancel()
        for job in jobs:
            job.cancel()


async def _gathered(jobs: Sequence[Job]) -> list[ImageResult]:
    return await asyncio.gather(*(job.result() for job in jobs))


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _wants_png(request: Request) -> bool:
    """Whether Accept prefers a picture to JSON, as RFC 9110, section 12.5.1, weighs them."""
    weights: dict[str, float] = {}
    for part in request.headers.get("accept", "").lower().split(","):
        media_type, *options = (word.strip() for word in part.split(";"))
        given = [option.removeprefix("q=") for option in options if option.startswith("q=")]
        try:
            weights[media_type] = float(given[0]) if given else 1.0
        except ValueError:
            weights[media_type] = 0.0

    def weight(*media_types: str) -> float:
        return next((weights[x] for x in media_types if x in weights), 0.0)

    return weight("image/png", "image/*", "*/*") > weight("application/json", "application/*", "*/*")


def _model(service: Service) -> Model:
    return Model(id=service.model, object="model", created=service.created, owned_by="latentrt")


def _note(metrics: Metrics, request: Request, code: str, error: BaseException, status: int) -> None:
    """Count an error, and have the request's line in the log tell it."""
    metrics.error(code)
    request.state.log["error"] = code
    if status == 500:
        fields = {"request_id": request.state.request_id}
        _log.error("a request failed", exc_info=error, extra={"fields": fields})


def _refused(metrics: Metrics, request: Request, error: Exception) -> Response:
    refused = refusal(error)
    if isinstance(error, FieldError) and error.field == "model":
        refused = refused._replace(status=404, code="model_not_found")
    _note(metrics, request, refused.code, error, refused.status)
    return refused.response()


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    async def engine_error(request: Request, error: Exception) -> Response:
        return _refused(metrics, request, error)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # What came is not repeated: it may be long, or no text at all.
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        status = 400 if first["type"] == "json_invalid" else 422
        field = None if status == 400 else ".".join(where)[:80] or None
        message = f"{field}: {first['msg']}" if field else f"the body: {first['msg']}"
        _note(metrics, request, "invalid_json" if status == 400 else "invalid_value", error, status)
        return error_response(status, _printable(message), field and _printable(field), "invalid_value")

    async def http_error(request: Request, error: HTTPException) -> Response:
        _note(metrics, request, f"http_{error.status_code}", error, error.status_code)
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(LatentRTError, engine_error)
    app.add_exception_handler(Exception, engine_error)


def _printable(text: str) -> str:
    """Without halves of characters, which JSON can send and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
