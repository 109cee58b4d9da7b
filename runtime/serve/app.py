"""The HTTP interface: OpenAI's images API over one engine, and what operators need."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
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
from .doors import Doors
from .jobs import Job
from .metrics import Metrics
from .requests import Finished, ImageResult
from .schema import FieldError, GenerationBody, Limits, image_requests
from .service import Service

__all__ = ["create_app", "preview_is_due"]

_log = logging.getLogger(__name__)


def create_app(
    service: Service,
    *,
    metrics: Metrics,
    limits: Limits | None = None,
    api_keys: Sequence[str] = (),
    drain_seconds: float = 60.0,
) -> FastAPI:
    """An ASGI application that loads the service when it starts and drains it when it ends.

    Args:
        metrics: the same that the engine's `on_batch` tells.
        api_keys: one of them must come as bearer token; none for no such check.
        drain_seconds: how long to finish what was taken.
    """
    bounds = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.begin()
        yield
        await service.drain(drain_seconds)

    app = FastAPI(title="latentrt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics.watch(service)
    app.add_middleware(Doors, limits=bounds, metrics=metrics)
    _handle_errors(app, metrics)
    keyed = [Depends(_KeyCheck(api_keys))]

    @app.post("/v1/images/generations", dependencies=keyed, responses=images(), tags=["OpenAI"])
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
        )
        request.state.log = {"images": len(jobs), "steps": requests[0].steps, "stream": streamed}
        if streamed:
            return _EventStream(_events(jobs, body.partial_images, metrics, request.state.request_id), jobs)
        try:
            results = await _all(request, jobs)
        except Exception as error:  # not left to the framework, which would close the connection as well
            return _refused(metrics, request, error)
        if results is None:
            return Response(status_code=499)  # nobody reads it; the log does
        pngs = await asyncio.to_thread(lambda: [png_bytes(r.image, r.parameters) for r in results])
        metrics.memory(results[0].peak_memory)
        timing = {"Server-Timing": server_timing(results[0].timings)}
        if as_png:
            return Response(
                pngs[0],
                media_type="image/png",
                headers={**timing, "X-Seed": str(results[0].parameters["seed"])},
            )
        return JSONResponse(images_json(results, pngs), headers=timing)

    @app.get("/v1/models", dependencies=keyed, responses=errors(401), tags=["OpenAI"])
    async def models() -> Models:
        return Models(object="list", data=[_model(service)])

    @app.get("/v1/models/{model:path}", dependencies=keyed, responses=errors(401, 404), tags=["OpenAI"])
    async def model(model: str) -> Model:
        if model != service.model:
            raise FieldError(
                "model", f"there is no model {model[:80]!r} here; this server has {service.model!r}"
            )
        return _model(service)

    @app.get("/health", tags=["operators"])
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

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
        dependencies=keyed,
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

    @cache
    def description() -> dict[str, Any]:
        return describe(app, model=service.model, limits=bounds, keyed=bool(api_keys))

    app.openapi = description  # type: ignore[method-assign]
    return app


class _KeyCheck:
    """Bearer token, compared in constant time, byte by byte as it came."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Clients send what ASCII lacks as UTF-8 or, where it goes, as Latin-1."""
        self._keys = [key.encode() for key in keys]
        self._keys += [key.encode("latin-1") for key in keys if not key.isascii() and _is_latin(key)]

    def __call__(self, request: Request) -> None:
        if not self._keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip(" \t").encode("latin-1")
        # All are compared, whichever fits.
        fits = sum(hmac.compare_digest(given, key) for key in self._keys)
        if scheme.lower() != "bearer" or not fits:
            raise HTTPException(
                401,
                "the API key is missing or wrong; send Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )


def _is_latin(text: str) -> bool:
    return all(ord(character) < 256 for character in text)


class _EventStream(StreamingResponse):
    """Server-sent events whose jobs leave with their reader."""

    def __init__(self, events: AsyncIterator[str], jobs: Sequence[Job]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self._jobs:
                job.cancel()


async def _events(
    jobs: Sequence[Job], partial_images: int | None, metrics: Metrics, request_id: str
) -> AsyncIterator[str]:
    """Progress of every image as it comes, and each image when it is made."""
    queue: asyncio.Queue[str | None] = asyncio.Queue(maxsize=1)  # who reads slowly misses previews

    async def follow(image: int, job: Job) -> None:
        part = 0
        try:
            async for event in job.events():
                if isinstance(event, Finished):
                    png = await asyncio.to_thread(png_bytes, event.result.image, event.result.parameters)
                    metrics.memory(event.result.peak_memory)
                    await queue.put(
                        sse("image_generation.completed", completed_event(event.result, png, image))
                    )
                elif event.preview is not None and preview_is_due(
                    event.step, event.steps, partial_images, part
                ):
                    preview = await asyncio.to_thread(partial_event, event, image, part)
                    await queue.put(sse("image_generation.partial_image", preview))
                    part += 1
        except Exception as error:
            status, message, param, code, _ = refusal(error)
            _note(metrics, code, error, status, request_id)
            body = {"message": message, "param": param, "code": code, "type": "server_error", "image": image}
            await queue.put(sse("error", {"error": body}))
        await queue.put(None)

    followers = [asyncio.create_task(follow(k, job)) for k, job in enumerate(jobs)]
    try:
        ended = 0
        while ended < len(jobs):
            event = await queue.get()
            if event is None:
                ended += 1
            else:
                yield event
        yield "data: [DONE]\n\n"
    finally:
        for follower in followers:
            follower.cancel()


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
    accepted = [
        part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")
    ]
    return "image/png" in accepted and "application/json" not in accepted


def _model(service: Service) -> Model:
    return Model(id=service.model, object="model", created=service.created, owned_by="latentrt")


def _note(metrics: Metrics, code: str, error: BaseException, status: int, request_id: str) -> None:
    metrics.error(code)
    if status == 500:
        _log.error("a request failed", exc_info=error, extra={"fields": {"request_id": request_id}})


def _refused(metrics: Metrics, request: Request, error: Exception) -> Response:
    status, message, param, code, headers = refusal(error)
    if isinstance(error, FieldError) and error.field == "model":
        status, code = 404, "model_not_found"
    _note(metrics, code, error, status, request.state.request_id)
    return error_response(status, message, param, code, headers)


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    async def engine_error(request: Request, error: Exception) -> Response:
        return _refused(metrics, request, error)

    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # What came is not repeated: it may be long, or no text at all.
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        status = 400 if first["type"] == "json_invalid" else 422
        field = None if status == 400 else ".".join(where)[:80] or None
        message = f"{field}: {first['msg']}" if field else f"the body: {first['msg']}"
        metrics.error("invalid_json" if status == 400 else "invalid_value")
        return error_response(status, _printable(message), field and _printable(field), "invalid_value")

    async def http_error(_: Request, error: HTTPException) -> Response:
        metrics.error(f"http_{error.status_code}")
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(LatentRTError, engine_error)
    app.add_exception_handler(Exception, engine_error)


def _printable(text: str) -> str:
    """Without halves of characters, which JSON can send and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()
