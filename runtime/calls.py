"""The calls of a pipeline: each within its memory budget, unaffected by its caller's autocast, and interruptible."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OutOfMemoryError
from .budget import Budget, without_frames
from .flow import make_images
from .latents import NoiseSource
from .memory import format_bytes
from .parts import Parts
from .previews import Previewer
from .progress import CallProgress
from .record import records
from .request import GenerationRequest
from .residency import residencies_held
from .stages import Stage, stages_of_request, warn_of_late_start

__all__ = ["Calls", "PipelineOutput"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineOutput:
    """The result of a call.

    Attributes:
        images: a list of PIL images, an array, a tensor or latents, by `output_type`; None if discarded.
        parameters: what made each image, ready for a PNG; a seed is None where a used generator was given.
        timings: seconds of each stage: prepare (load, and export and capture the first time), text, start, base,
            refiner, decode, total.
        interrupted: the call was stopped, so the images are unfinished or None.
    """

    images: Any
    parameters: list[dict[str, Any]]
    timings: dict[str, float]
    interrupted: bool = False

    def __getitem__(self, key: int | str) -> Any:
        """`output[0]` and `output["images"]`, as diffusers' outputs have them."""
        return vars(self)[key] if isinstance(key, str) else (self.images,)[key]


class Calls:
    """Makes the images of requests, which may come from several threads.

    Attributes:
        running: the progress of each call that is running.
    """

    def __init__(self, parts: Parts, budget: Budget) -> None:
        self.running: set[CallProgress] = set()
        self._parts = parts
        self._budget = budget

    def make(
        self, request: GenerationRequest, bar_options: Mapping[str, Any], **reporting: Any
    ) -> PipelineOutput:
        """Make the images of a request; `bar_options` and `reporting` are as for `CallProgress`."""
        stages = self._stages(request)
        request = self._budget.admit(request, stages, idle=not self.running).request
        if request.image is None:
            warn_of_late_start(stages[0].table)
        noise = NoiseSource(request.generators, request.batch)
        with self._progress(stages, bar_options, **reporting) as progress, self._executing():
            states = noise.states()
            for again in (False, True):
                try:
                    images = make_images(self._parts, request, stages, noise, progress)
                    break
                except OutOfMemoryError as error:
                    if progress.in_callback:
                        raise
                    failure = without_frames(error)
                # Only here are the frames that failed gone, with the tensors that they held.
                freed = 0 if again else self._budget.free_unused()
                if not freed:
                    plan = self._budget.plan(request, stages).describe(self._parts.loader.residency.policy)
                    raise OutOfMemoryError(f"{failure}. By plan, {plan}") from failure.__cause__
                _log.warning(
                    "%s; freed %s kept from earlier requests, trying once more", failure, format_bytes(freed)
                )
                noise.restore(states)
                progress.begin_again()
        if progress.discarded:  # the last steps may be reported after the images were made
            images = None
        return PipelineOutput(
            images,
            records(request, self._parts),
            progress.timings,
            progress.interrupted or images is None,
        )

    def check(self, request: GenerationRequest, *, planned: bool) -> int:
        """The steps that a request takes; refuses one that cannot be met, by plan too if it is to be `planned`."""
        stages = self._stages(request)
        if planned:
            self._budget.require(request, stages, idle=not self.running)
        return sum(len(stage.table) for stage in stages)

    def fit_previewer(self, request: GenerationRequest) -> Previewer:
        """A previewer fitted to the VAE at the request's size."""
        request = self._budget.admit(request, self._stages(request), idle=not self.running).request
        vae, device = self._parts.vae, self._parts.loader.device
        with self._executing():
            return Previewer.fit(vae, request.height, request.width, device, tile=request.tile)

    def interrupt(self) -> None:
        """Stop every call in progress after the step it is at."""
        for progress in list(self.running):
            progress.stop.set()

    @property
    def stopping(self) -> bool:
        """Whether one in progress was asked to stop."""
        return any(progress.stop.is_set() for progress in list(self.running))

    def _stages(self, request: GenerationRequest) -> list[Stage]:
        return stages_of_request(self._parts.experts, request)

    @contextmanager
    def _executing(self) -> Iterator[None]:
        """Keep other threads from offloading these engines, and turn off a caller's autocast: networks would run, be
        captured and be exported in its dtypes."""
        with (
            residencies_held(self._parts.engines()),
            torch.autocast("cpu", enabled=False),
            torch.autocast(self._parts.loader.device.type, enabled=False),
            torch.no_grad(),
        ):
            yield

    @contextmanager
    def _progress(
        self, stages: Sequence[Stage], bar_options: Mapping[str, Any], **reporting: Any
    ) -> Iterator[CallProgress]:
        """The progress of one call, which `interrupt` reaches while it lasts."""
        steps = sum(len(stage.table) for stage in stages)
        progress = CallProgress(steps, bar_options, self._parts.loader.device, **reporting)
        self.running.add(progress)
        try:
            yield progress
            progress.finish()
        finally:
            self.running.discard(progress)
            progress.close()
