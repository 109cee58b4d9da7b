"""latentrt as a side of the benchmark, on one of its back ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..runtime.pipeline import Pipeline
from .cases import Case
from .monitor import Span
from .side import Made, Side, now, try_convolutions, vae_in

__all__ = ["open_side"]


class LatentrtSide(Side):
    """One pipeline; engines are loaded by the first call."""

    def __init__(self, case: Case, pipe: Pipeline) -> None:
        self._case = case
        self._pipe = pipe
        also = try_convolutions(pipe.device) if pipe.backend in ("eager", "triton") else ""
        self.settings = f"back end {pipe.backend}, {vae_in(pipe.vae.dtype)}{also}"

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Made:
        case = self._case
        height, width = case.size or (None, None)
        result = self._pipe(
            list(prompts),
            seed=list(seeds),
            height=height,
            width=width,
            negative_prompt=case.negative,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            high_noise_frac=case.high_noise_frac,
            output_type="np",
        )
        return Made(result.images, _spans(result.timings, now(self._pipe.device)))


def _spans(timings: dict[str, float], end: float) -> list[Span]:
    """Stages follow one another without a gap, and the last one ends with the call."""
    begin = end - timings["total"]
    spans = []
    for name, seconds in timings.items():
        if name != "total":
            spans.append(Span(name, begin, begin + seconds))
            begin += seconds
    return spans


def open_side(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    *,
    backend: str,
    graphs: bool | None = None,
) -> LatentrtSide:
    """Load the case's checkpoints; exports and engines are kept in `folder`."""
    pipe = Pipeline.from_pretrained(
        case.model,
        case.refiner,
        backend=backend,
        dtype=dtype,
        device=device,
        cache_dir=folder / "cache",
        graphs=graphs,
    )
    pipe.set_progress_bar_config(disable=True)
    return LatentrtSide(case, pipe)
