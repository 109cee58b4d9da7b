"""What may be posted to /v1/images/generations: OpenAI's fields that mean something here, and latentrt's own."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ...errors import EngineSizeError, RequestError
from .requests import ImageRequest

__all__ = ["FieldError", "GenerationBody", "Limits", "field_of", "image_requests"]

_MAX_SEED = 2**63 - 1
_MOST_FIELDS = 64


class FieldError(RequestError):
    """A field of the body cannot be met.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        """For copies and other processes: by default an exception is made again from its message alone."""
        return type(self), (self.field, str(self)), self.__dict__


@dataclass(frozen=True)
class Limits:
    """What a server allows.

    Attributes:
        pixels: of an image.
        steps, images: of a request.
        prompt: characters, of the negative one too.
        body: bytes of a request.
        timeout: seconds until an image must be made, where the request does not say; and the most it may say.
        read: seconds for a client to send a request, from its first byte to its last.
        write: seconds in which a client must take something of an answer that waits for it.
    """

    pixels: int = 2048 * 2048
    steps: int = 150
    images: int = 10
    prompt: int = 4000
    body: int = 1 << 20
    timeout: float = 600.0
    read: float = 30.0
    write: float = 60.0


def _whole(value: Any) -> Any:
    """To JSON Schema, and to many a client, 3.0 is an integer as well."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
_Unused = Annotated[str | None, Field(max_length=256, description="Accepted, and not used.")]


class GenerationBody(BaseModel):
    """OpenAI's request. A field it has and this server has no meaning for is refused, like any other unknown one, but
    for those that ask for no other picture.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, description="What the picture should show.")]
    model: Annotated[str | None, Field(max_length=256, description="As /v1/models has it.")] = None
    n: Annotated[int | None, Field(ge=1, description="Images to make; their seeds count up."), _WHOLE] = None
    size: Annotated[
        str | None,
        Field(
            pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
            description="WIDTHxHEIGHT in pixels, multiples of 8; by default the model's own.",
        ),
    ] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=1000, description="Previews to stream; one a step by default."), _WHOLE
    ] = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Annotated[
        Literal["auto", "low"] | None, Field(description="Accepted; nothing is moderated.")
    ] = None
    safety_identifier: _Unused = None
    user: _Unused = None

    negative_prompt: Annotated[str | None, Field(description="What to steer away from.")] = None
    seed: Annotated[
        int | None, Field(ge=0, le=_MAX_SEED, description="Of the first image; drawn if not told."), _WHOLE
    ] = None
    steps: Annotated[int | None, Field(ge=1, description="Of the whole schedule; 30 by default."), _WHOLE] = (
        None
    )
    guidance: Annotated[
        float | None,
        Field(ge=-1e4, le=1e4, allow_inf_nan=False, description="1 or less turns guidance off."),
    ] = None
    sampler: Annotated[str | None, Field(max_length=64, description="Such as euler or dpm++2m-karras.")] = (
        None
    )
    high_noise_frac: Annotated[
        float | None,
        Field(ge=0, le=1, allow_inf_nan=False, description="Share the base denoises before a refiner."),
    ] = None
    timeout: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="Seconds until the images must be made."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: Any) -> Any:
        """An error for each of a hundred thousand unknown fields would hold up the event loop for seconds."""
        if isinstance(data, dict) and len(data) > _MOST_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "it has {count} fields; at most {most} are read",
                {"count": len(data), "most": _MOST_FIELDS},
            )  # fmt: skip
        return data


def image_requests(body: GenerationBody, model: str, limits: Limits) -> list[ImageRequest]:
    """A body as requests of one image each.

    Args:
        model: the one that is served.

    Raises:
        FieldError: a field is beyond a limit, or asks for another model.
    """
    if body.model is not None and body.model != model:
        raise FieldError("model", f"there is no model {body.model[:80]!r} here; this server has {model!r}")
    for name in ("prompt", "negative_prompt"):
        text = getattr(body, name) or ""
        if len(text) > limits.prompt:
            raise FieldError(name, f"{name} has {len(text)} characters; at most {limits.prompt} are allowed")
    count = body.n or 1
    steps = body.steps or ImageRequest.steps
    timeout = limits.timeout if body.timeout is None else body.timeout
    bounds = (
        ("n", count, limits.images),
        ("steps", steps, limits.steps),
        ("timeout", timeout, limits.timeout),
    )
    for field, value, most in bounds:
        if value > most:
            raise FieldError(field, f"{field} is {value}; at most {most} is allowed here")
    if body.seed is not None and body.seed + count - 1 > _MAX_SEED:
        raise FieldError(
            "seed", f"seed is {body.seed} and the seeds of {count} images count up past {_MAX_SEED}"
        )
    first = secrets.randbelow(2**32) if body.seed is None else body.seed
    width, height = _size(body.size, limits)
    frac = ImageRequest.high_noise_frac if body.high_noise_frac is None else body.high_noise_frac
    return [
        ImageRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=body.guidance,
            seed=first + k,
            sampler=body.sampler,
            high_noise_frac=frac,
        )
        for k in range(count)
    ]


def _size(text: str | None, limits: Limits) -> tuple[int | None, int | None]:
    """(width, height)"""
    if text in (None, "auto"):
        return None, None
    width, height = (int(side) for side in text.split("x"))
    if width * height > limits.pixels:
        raise FieldError(
            "size", f"size is {text}, {width * height} pixels; at most {limits.pixels} are allowed here"
        )
    return width, height


_FIELDS = (
    (r"negative_prompt", "negative_prompt"),
    (r"prompt", "prompt"),
    (r"(width|height)", "size"),
    (r"the request asks for \d+ images", "n"),
    (r"num_inference_steps|\d+ steps", "steps"),
    (r"guidance_scale", "guidance"),
    (r"seed", "seed"),
    (r"(there is )?no sampler|.*\bsampler\b", "sampler"),
    (r"high_noise_frac", "high_noise_frac"),
)


def field_of(error: RequestError) -> str | None:
    """The field a refusal is about: its messages begin with the pipeline's name of the argument."""
    if isinstance(error, FieldError):
        return error.field
    if isinstance(error, EngineSizeError):
        return "size"
    return next((field for pattern, field in _FIELDS if re.match(pattern, str(error))), None)
