"""Answers in OpenAI's forms: errors, images, events."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from ...errors import (
    DeadlineError,
    DrainingError,
    LatentRTError,
    QueueFullError,
    RequestError,
    StoppedError,
)
from ..image import png_bytes
from .requests import ImageResult, Progress
from .runner import is_out_of_memory
from .schema import field_of
from .service import NotReadyError

__all__ = [
    "Refusal",
    "completed_event",
    "error_body",
    "error_response",
    "images_json",
    "partial_event",
    "refusal",
    "server_timing",
    "sse",
]

_ONCE = {"x-should-retry": "false"}
"""To OpenAI's clients, which otherwise ask twice more after any 5xx: it would be the same again."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error as OpenAI's clients read it; `status` decides its `type`."""
    return {
        "error": {
            "message": message,
            "type": _TYPES.get(status, "server_error"),
            "param": param,
            "code": code,
        }
    }


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as OpenAI's clients read it; `param` names the field at fault."""
    return JSONResponse(error_body(status, message, param, code), status, headers)


class Refusal(NamedTuple):
    """An error as a client is told of it.

    Attributes:
        param: the field at fault.
    """

    status: int
    message: str
    param: str | None
    code: str
    headers: Mapping[str, str] = MappingProxyType({})

    def response(self) -> JSONResponse:
        """The whole answer."""
        return error_response(*self)

    def event(self, image: int | None = None) -> str:
        """In a stream, which has begun with status 200: its last event, or of one image where the others go on."""
        body = error_body(self.status, self.message, self.param, self.code)
        if image is not None:
            body["error"]["image"] = image
        return sse("error", body)


def refusal(error: BaseException) -> Refusal:
    """How a client is told what an engine raises; the details of internal errors stay hidden."""
    if isinstance(error, QueueFullError):
        return Refusal(
            429, str(error), None, "queue_full", {"Retry-After": str(math.ceil(error.retry_after))}
        )
    if isinstance(error, DeadlineError):
        return Refusal(504, str(error), "timeout", "deadline_exceeded", _ONCE)
    if isinstance(error, NotReadyError):
        return Refusal(503, str(error), None, "not_ready", {"Retry-After": "5"})
    if isinstance(error, DrainingError):
        return Refusal(503, str(error), None, "draining", {"Retry-After": "5"})
    if isinstance(error, StoppedError):
        return Refusal(503, str(error), None, "stopped", _ONCE)
    if is_out_of_memory(error):  # how much there is of it is not the client's business
        message = "memory does not suffice for an image of this size; ask for a smaller one"
        return Refusal(422, message, "size", "out_of_memory")
    if isinstance(error, RequestError):
        return Refusal(422, str(error), field_of(error), "invalid_value")
    if isinstance(error, LatentRTError):
        return Refusal(500, "the image could not be made; the server's log says why", None, "failed", _ONCE)
    message = "an internal error; the server's log has more under this request's id"
    return Refusal(500, message, None, "internal")


def images_json(results: Sequence[ImageResult], pngs: Sequence[bytes]) -> dict[str, Any]:
    """OpenAI's answer, and what each image took."""
    size = "{}x{}".format(*results[0].image.size)
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": "png",
        "size": size,
        "data": [
            {
                "b64_json": base64.b64encode(png).decode(),
                "seed": result.parameters["seed"],
                "parameters": dict(result.parameters),
                "timings": _rounded(result.timings),
                "batch": result.batch,
            }
            for result, png in zip(results, pngs, strict=True)
        ],
        "peak_memory_bytes": max(result.peak_memory for result in results),
    }


def partial_event(progress: Progress, image: int, part: int) -> dict[str, Any]:
    """OpenAI's event of a preview; `image` counts within the request, `part` the previews."""
    if progress.preview is None:
        raise AssertionError("a partial event has a preview")
    return {
        "type": "image_generation.partial_image",
        "partial_image_index": part,
        **_common(progress.preview.size),
        "b64_json": base64.b64encode(png_bytes(progress.preview)).decode(),
        "image": image,
        "step": progress.step,
        "steps": progress.steps,
    }


def completed_event(result: ImageResult, png: bytes, image: int) -> dict[str, Any]:
    """OpenAI's last event of an image."""
    return {
        "type": "image_generation.completed",
        **_common(result.image.size),
        "b64_json": base64.b64encode(png).decode(),
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens": 0,
            "total_tokens": 0,
        },
        "image": image,
        "seed": result.parameters["seed"],
        "parameters": dict(result.parameters),
        "timings": _rounded(result.timings),
        "batch": result.batch,
        "peak_memory_bytes": result.peak_memory,
    }


def sse(event: str, data: Mapping[str, Any]) -> str:
    """One server-sent event, in ASCII: many a client takes U+2028 for the end of a line."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def server_timing(timings: Mapping[str, float]) -> str:
    """The header that browsers show."""
    return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in timings.items())


def _common(size: tuple[int, int]) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "size": f"{size[0]}x{size[1]}",
        "quality": "auto",
        "background": "opaque",
        "output_format": "png",
    }


def _rounded(timings: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(seconds, 6) for stage, seconds in timings.items()}
