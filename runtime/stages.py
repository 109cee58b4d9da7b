"""The schedule divided among the experts: in one call a base's steps and then a refiner's."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..errors import RequestError
from .expert import Expert
from .request import GenerationRequest
from .sampler import SamplerTable, build_table, step_range

__all__ = ["Stage", "stage_names", "stages_of", "stages_of_request", "warn_of_late_start"]

_log = logging.getLogger(__name__)

_MOST_SIGNAL = 0.2
"""Share of the image in the model's input at the first step, alpha / hypot(alpha, sigma). SDXL's with leading spacing
and 1000, 5 and 4 steps: 0.07, 0.19, 0.24."""


@dataclass(frozen=True)
class Stage:
    """The steps of a call that one expert takes.

    Attributes:
        name: for timings and messages, such as "base".
        from_image: it continues from an image, or from another expert's latents, rather than from noise.
    """

    name: str
    expert: Expert
    table: SamplerTable
    from_image: bool


def stages_of(
    experts: Sequence[Expert],
    sampler: str | None,
    *,
    steps: int,
    high_noise_frac: float,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    from_image: bool = False,
    strength: float | None = None,
    eta: float = 0.0,
) -> list[Stage]:
    """Divide the schedule among the experts. Stages without steps are left out; if none has any, the first is kept,
    since its schedule says where latents start. Each hands over latents scaled as the next one's sampler expects.

    Args:
        experts: a base or a refiner alone, or both.
        sampler, steps, high_noise_frac, denoising_start, denoising_end, eta: as in `Pipeline.__call__`.
        from_image: it starts from pixels or latents; `strength`, if given, is the share of the steps to take.

    Raises:
        RequestError: denoising_start or denoising_end together with a refiner; a strength above 0 that begins at
            denoising_end or later; or there is no such sampler.
    """
    if len(experts) == 1:
        windows = [(denoising_start, denoising_end)]
    else:
        if denoising_start is not None or denoising_end is not None:
            raise RequestError(
                "this pipeline has a refiner and divides the schedule at high_noise_frac; load base and refiner "
                "as two pipelines to use denoising_start and denoising_end"
            )
        windows = [(None, high_noise_frac), (high_noise_frac, None)]
    stages = []
    for (name, expert), (start, end) in zip(stage_names(experts).items(), windows, strict=True):
        config = expert.sampler_config(sampler)
        first, last = step_range(config, steps, denoising_start=start, denoising_end=end)
        if strength is not None:
            first = min(last, max(first, step_range(config, steps, strength=strength)[0]))
            if strength and denoising_end is not None and first == last:
                raise RequestError(
                    f"strength {strength:g} leaves no step before denoising_end {denoising_end:g} of {steps} steps; "
                    "raise either"
                )
        table = build_table(config, steps, begin=first, end=last, eta=eta)
        stages.append(Stage(name, expert, table, from_image or expert is not experts[0]))
    stages = [stage for stage in stages if len(stage.table)] or stages[:1]
    for k, (stage, following) in enumerate(pairwise(stages)):
        stages[k] = replace(stage, table=stage.table.handing_over_to(following.table))
    return stages


def stage_names(experts: Sequence[Expert]) -> dict[str, Expert]:
    """The experts of a pipeline by the names of their stages."""
    return dict(zip(("base", "refiner") if len(experts) > 1 else (experts[0].name,), experts, strict=True))


def stages_of_request(experts: Sequence[Expert], request: GenerationRequest) -> list[Stage]:
    """`stages_of` a request.

    Raises:
        RequestError: as of `stages_of`.
    """
    r = request
    return stages_of(
        experts,
        r.sampler,
        steps=r.steps,
        high_noise_frac=r.high_noise_frac,
        denoising_start=r.denoising_start,
        denoising_end=r.denoising_end,
        from_image=r.image is not None,
        strength=r.strength if r.image is not None and r.denoising_start is None else None,
        eta=r.eta,
    )


def warn_of_late_start(first: SamplerTable) -> None:
    """Warn if a schedule that starts from noise begins far below the last trained timestep, as leading spacing does
    with few steps."""
    share = first.add_noise[0] / math.hypot(*first.add_noise)
    if len(first) and share > _MOST_SIGNAL:
        _log.warning(
            "the first step is at timestep %g, where the model expects %.0f %% picture, but it starts from pure noise; "
            "use more steps, or for a model distilled to a few load it with "
            'scheduler={"timestep_spacing": "trailing"}',
            first.timesteps[0],
            100 * share,
        )
