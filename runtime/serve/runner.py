"""A pipeline as the engine sees it: check one request, make a batch of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import PIL.Image
import torch

from ...errors import EngineSizeError, MemoryPlanError, OutOfMemoryError, RequestError, ServiceError
from ..host_memory import peak_bytes
from ..pipeline import Pipeline
from ..place import release_memory
from ..previews import Previewer
from .requests import CheckedRequest, Group, ImageRequest, ImageResult

__all__ = ["OnStep", "PipelineRunner", "Runner", "is_out_of_memory"]

_log = logging.getLogger(__name__)

_TRIES = 3
"""Of a call that others stop: `Pipeline.interrupt` is for whatever the pipeline makes."""
_WANTS = (OutOfMemoryError, MemoryPlanError, MemoryError, torch.OutOfMemoryError)

OnStep = Callable[[int, Callable[[int], PIL.Image.Image] | None], None]
"""(steps done, k -> a preview of image k of the batch, where there is one); what it raises ends the call there."""


@runtime_checkable
class Runner(Protocol):
    """What makes images. `captures` is read once, when the engine is made; `check` is for the event loop, the others
    for one thread of their own."""

    @property
    def captures(self) -> bool:
        """Whether each batch size is compiled and captured the first time it is run, so that its first call is slow."""

    def check(self, request: ImageRequest) -> CheckedRequest:
        """Refuse what cannot be made, with a RequestError; quick."""

    def warm_up(self, batches: Sequence[int] = (1,)) -> None:
        """Load everything, and make a batch of each of these sizes; only that of one image has to succeed."""

    def run(self, requests: Sequence[CheckedRequest], on_step: OnStep) -> list[ImageResult]:
        """Make a batch of one group, all of it; with previews of all where one asks for them."""


class PipelineRunner:
    """A `Pipeline` behind that protocol."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe
        self._previewer: Previewer | None = None

    @property
    def captures(self) -> bool:
        return self._pipe.graphs or self._pipe.device.type == "cuda"

    def check(self, request: ImageRequest) -> CheckedRequest:
        negative = "" if request.negative_prompt is None else request.negative_prompt
        for name, text in (("prompt", request.prompt), ("negative_prompt", negative)):
            if not isinstance(text, str):  # a pipeline takes lists, and lists of scales, as well
                raise RequestError(f"{name} must be a string; got a {type(text).__name__}")
        if isinstance(request.guidance_scale, (list, tuple)) or isinstance(request.seed, (list, tuple)):
            raise RequestError("an ImageRequest is for one image: its seed and guidance_scale are one number")
        # Its memory is looked at in the thread that makes it: a plan would hold up the event loop.
        made, steps = self._pipe.check(
            request.prompt,
            planned=False,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            sampler=request.sampler,
            high_noise_frac=request.high_noise_frac,
        )
        (seed,) = made.seeds
        if seed is None:
            raise AssertionError("without a generator every image has a seed")
        return CheckedRequest(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            guidance_scale=made.guidance_scales[0],
            seed=seed,
            steps=steps,
            group=Group(
                made.height,
                made.width,
                made.steps,
                made.guided,
                request.sampler,
                made.high_noise_frac,
                request.negative_prompt is not None,
            ),
        )

    def warm_up(self, batches: Sequence[int] = (1,)) -> None:
        """Batches of images of the model's own size, the largest first, and the previews' fit. A batch of more than one
        that does not fit, or for which there is no engine, is logged and left out."""
        for batch in sorted(batches, reverse=True):
            try:
                self._pipe.warmup(batches=(batch,))
                continue
            except Exception as error:
                if batch == 1 or not (is_out_of_memory(error) or isinstance(error, EngineSizeError)):
                    raise
                _log.warning("a batch of %d is not warmed up: %s", batch, error)
            release_memory()  # not in the handler, where the error still holds its frames
        self._fitted()

    def run(self, requests: Sequence[CheckedRequest], on_step: OnStep) -> list[ImageResult]:
        group = requests[0].group
        stopped: Exception | None = None

        def step_done(_: Pipeline, steps: int, values: dict[str, Any]) -> dict[str, bool]:
            nonlocal stopped
            pictures: torch.Tensor | None = values["preview"]
            try:
                if stopped is None:
                    on_step(
                        steps,
                        pictures if pictures is None else lambda k: PIL.Image.fromarray(pictures[k].numpy()),
                    )
            except Exception as error:  # through the loop it would cost what the loop keeps for the next call
                stopped = error
            return {"discard": stopped is not None}

        device = self._pipe.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(_TRIES):
            output = self._pipe(
                [request.prompt for request in requests],
                negative_prompt=[request.negative_prompt or "" for request in requests]
                if group.negative
                else None,
                height=group.height,
                width=group.width,
                num_inference_steps=group.steps,
                guidance_scale=[request.guidance_scale for request in requests],
                seed=[request.seed for request in requests],
                sampler=group.sampler,
                high_noise_frac=group.high_noise_frac,
                callback_on_progress=step_done,
                previewer=self._fitted() if any(request.previews for request in requests) else None,
            )
            if stopped is not None:
                raise stopped
            if not output.interrupted:
                break
            _log.warning("the pipeline's interrupt() was called from elsewhere; its images are unfinished")
        else:
            raise ServiceError(
                f"{_TRIES} times in a row the pipeline's interrupt() was called from elsewhere; "
                "leave it to the engine that serves with it"
            )
        peak = _peak_memory(device)
        return [
            ImageResult(image, parameters, output.timings, len(requests), peak)
            for image, parameters in zip(output.images, output.parameters, strict=True)
        ]

    def _fitted(self) -> Previewer:
        if self._previewer is None:
            self._previewer = self._pipe.fit_previewer()
        return self._previewer


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return peak_bytes() or 0


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a want of memory, by plan or in fact."""
    while error is not None:
        if isinstance(error, _WANTS):
            return True
        error = error.__cause__
    return False
