"""The interface's OpenAPI document: every answer each address has, and this server's own limits in the fields."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

from .schema import GenerationBody, Limits

__all__ = ["ImagesAnswer", "Model", "Models", "Readiness", "describe", "errors", "images"]


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field it is about.")
    code: str | None


class ErrorAnswer(BaseModel):
    """As OpenAI's clients read it."""

    error: ErrorBody


class ImageAnswer(BaseModel):
    """One image."""

    b64_json: str = Field(description="A PNG with its parameters, in base 64.")
    seed: int
    parameters: dict[str, Any] = Field(description="What made it.")
    timings: dict[str, float] = Field(
        description="Seconds of each stage of the call, and of the wait before it."
    )
    batch: int = Field(description="Images made in that call.")


class ImagesAnswer(BaseModel):
    """OpenAI's answer, and what each image took."""

    created: int = Field(description="Seconds since 1970.")
    background: str
    output_format: str
    size: str
    data: list[ImageAnswer]
    peak_memory_bytes: int


class Model(BaseModel):
    """A model that can be asked for."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: str
    created: int = Field(description="Seconds since 1970.")
    owned_by: str


class Models(BaseModel):
    """All of them."""

    object: str
    data: list[Model]


class Readiness(BaseModel):
    """Whether requests are taken, and why not."""

    ready: bool
    reason: str | None


_ERRORS = {
    400: "The body is not JSON.",
    401: "The key is missing or wrong.",
    403: "The server is not known by the name in the Host header.",
    404: "There is no such model.",
    408: "The request was not complete in time.",
    413: "The body is too long.",
    422: "A field cannot be met; `error.param` names it.",
    429: "The queue is full, or the timeout too short for it; Retry-After says when to try again.",
    500: "An internal error; the server's log has it.",
    503: "Not ready, shutting down, or stopped; `error.message` says which.",
    504: "The image was not made within its timeout.",
}

_STREAM = (
    "Server-sent events: `image_generation.partial_image` with a small preview in `b64_json`, its `step` of `steps` "
    "and `partial_image_index`; `image_generation.completed` with each image and what it took; `error` with an `error` "
    "as in other answers. `image` counts the images of the request. `data: [DONE]` ends it."
)

_EVENT = {
    "type": "object",
    "description": _STREAM,
    "properties": {
        "event": {
            "description": "`message` is what the last line is, which names none.",
            "enum": ["image_generation.partial_image", "image_generation.completed", "error", "message"],
        },
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["data"],
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These answers, as FastAPI takes them."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": ErrorAnswer, "description": _ERRORS[status]}
        if status == 429:
            found[status]["headers"] = {
                "Retry-After": {
                    "description": "Seconds.",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 1, "maximum": 60},
                }
            }
    return found


def images() -> dict[int | str, dict[str, Any]]:
    """The answers of a request for images."""
    content = {
        "image/png": {"schema": {"type": "string", "format": "binary"}},
        "text/event-stream": {"schema": _EVENT},
    }
    made = {
        "model": ImagesAnswer,
        "description": "The images; with `Accept: image/png` the one image itself; with `stream` events.",
        "content": content,
    }
    return {200: made, **errors(400, 401, 404, 408, 413, 422, 429, 500, 503, 504)}


def describe(app: FastAPI, *, model: str, limits: Limits, keyed: bool) -> dict[str, Any]:
    """The document of an application with these limits."""
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = found["components"]["schemas"]
    bounds: dict[str, dict[str, Any]] = {
        "model": {"enum": [model]},
        "prompt": {"maxLength": limits.prompt},
        "negative_prompt": {"maxLength": limits.prompt},
        "n": {"maximum": limits.images},
        "steps": {"maximum": limits.steps},
        "timeout": {"maximum": limits.timeout},
    }
    fields = schemas[GenerationBody.__name__]["properties"]
    for name, bound in bounds.items():
        field = fields[name]
        field.get("anyOf", [field])[0].update(bound)
    fields["size"]["description"] += f" At most {limits.pixels} pixels."
    schemas[GenerationBody.__name__]["maxProperties"] = len(fields)
    (parameter,) = found["paths"]["/v1/models/{model}"]["get"]["parameters"]
    parameter["schema"]["enum"] = [model]
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path in found["paths"].values():
        for operation in path.values():
            # FastAPI adds its own form of 422, which is not how errors look here, to whatever has a parameter.
            invalid = operation["responses"].get("422", {}).get("content", {})
            if "HTTPValidationError" in str(invalid):
                del operation["responses"]["422"]
            if "401" in operation["responses"]:
                if keyed:
                    operation["security"] = [{"key": []}]
                else:
                    del operation["responses"]["401"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return found
