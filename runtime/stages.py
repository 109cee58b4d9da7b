"""The schedule divided among the experts: in one call a base's steps and then a refiner's."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from .expert import Expert
from .request import GenerationRequest
from .sampler import SamplerTable, build_table, step_range

__all__ = ["Stage", "stages_of"]


@dataclass(frozen=True)
class Stage:
    """A run of steps that one expert takes; `from_image` when it does not begin with noise of its own."""

    name: str
    expert: Expert
    table: SamplerTable
    from_image: bool


def stages_of(
    base: Expert, refiner: Expert | None, request: GenerationRequest, sampler: str | None
) -> list[Stage]:
    """Who takes which steps. Stages without steps are left out, but the first, whose schedule is the start's.

    Raises:
        RequestError: the schedule is divided twice.
    """
    strength = request.strength if request.image is not None and request.denoising_start is None else None
    if refiner is None:
        experts = [base]
        windows = [(request.denoising_start, request.denoising_end)]
    else:
        if request.denoising_start is not None or request.denoising_end is not None:
            raise RequestError(
                "this pipeline has a refiner and divides the schedule at high_noise_frac; load base and refiner "
                "as two pipelines to use denoising_start and denoising_end"
            )
        experts = [base, refiner]
        windows = [(None, request.high_noise_frac), (request.high_noise_frac, None)]
    stages = []
    for k, (expert, (start, end)) in enumerate(zip(experts, windows, strict=True)):
        config = expert.sampler(sampler)
        first, last = step_range(config, request.steps, denoising_start=start, denoising_end=end)
        if strength is not None:
            first = min(last, max(first, step_range(config, request.steps, strength=strength)[0]))
        table = build_table(config, request.steps, begin=first, end=last, eta=request.eta)
        name = expert.name if refiner is None else ("base", "refiner")[k]
        stages.append(Stage(name, expert, table, request.image is not None or k > 0))
    return [stage for stage in stages if len(stage.table)] or stages[:1]
