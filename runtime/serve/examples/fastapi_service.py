"""A FastAPI service of your own with images in it: one engine for the process, one route of many.

uvicorn latentrt.runtime.serve.examples.fastapi_service:app
curl '127.0.0.1:8000/cards/7?motif=a+red+circle' -o card.png
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from latentrt import AsyncEngine, ImageRequest, Pipeline
from latentrt.errors import (
    DeadlineError,
    DrainingError,
    QueueFullError,
    RequestError,
    StoppedError,
)
from latentrt.runtime.image import png_bytes


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
    async def card(request: Request, number: int, motif: str) -> Response:
        """The card of this number is always the same picture. Requests that come together share a batch."""
        engine: AsyncEngine = app.state.engine
        making = asyncio.ensure_future(
            engine.generate(ImageRequest(motif, seed=number, steps=20), timeout=60)
        )
        leaving = asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait([making, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                return Response(status_code=499)  # nobody reads it
            result = making.result()
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except QueueFullError as error:
            retry = str(math.ceil(error.retry_after))
            raise HTTPException(429, str(error), {"Retry-After": retry}) from error
        except DeadlineError as error:
            raise HTTPException(504, str(error)) from error
        except (DrainingError, StoppedError) as error:
            raise HTTPException(503, str(error)) from error
        finally:
            making.cancel()  # which frees the device; nothing, once it is made
            leaving.cancel()
        png = await asyncio.to_thread(png_bytes, result.image, result.parameters)
        return Response(png, media_type="image/png")

    return app


async def gone(request: Request) -> None:
    """Wait until the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


app = create_app()
