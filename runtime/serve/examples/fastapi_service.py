"""A FastAPI service of your own with images in it: one engine for the process, one route of many.

uvicorn latentrt.runtime.serve.examples.fastapi_service:app
curl '127.0.0.1:8000/cards/7?motif=a+red+circle' -o card.png
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from latentrt import Pipeline
from latentrt.errors import QueueFullError, RequestError
from latentrt.runtime.image import png_bytes
from latentrt.runtime.serve.engine import AsyncEngine
from latentrt.runtime.serve.requests import ImageRequest


def demo() -> Any:
    """The shipped model; take your own here."""
    return Pipeline.from_pretrained("demo", refiner="demo")


def create_app(load: Callable[[], Any] = demo) -> FastAPI:
    """The service; `load` gives the pipeline."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncEngine(load(), max_batch=8) as engine:  # warm on entry, drained on exit
            app.state.engine = engine
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/cards/{number}")
    async def card(number: int, motif: str) -> Response:
        """The card of this number is always the same picture. Requests that come together share a batch."""
        engine: AsyncEngine = app.state.engine
        try:
            result = await engine.generate(ImageRequest(motif, seed=number, steps=20), timeout=60)
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(round(error.retry_after))}) from error
        return Response(png_bytes(result.image, result.parameters), media_type="image/png")

    return app


app = create_app()
