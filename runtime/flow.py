"""The whole flow of a call, top to bottom: text, first latents, the steps of each expert, pixels.

No stage knows its neighbours: what one hands on is tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .conditioning import Conditioning
from .denoiser import Denoiser, LoopRequest, all_ready
from .image import from_tensor
from .latents import NoiseSource, initial_latents, noised_latents
from .parts import Parts
from .progress import Watch
from .request import GenerationRequest
from .sampler import SamplerTable
from .stages import Stage

__all__ = ["first_latents", "make_images"]


def make_images(
    parts: Parts,
    request: GenerationRequest,
    stages: Sequence[Stage],
    noise: NoiseSource,
    watch: Watch,
    tile: int | None,
) -> Any:
    """The images of a request, as its `output_type` asks; None where nobody wants them any more.

    Args:
        stages: who takes which steps.
        tile: as for `VAE.decode`.
    """
    device, residency, vae = parts.loader.device, parts.loader.residency, parts.vae
    with watch.stage("prepare"):
        _prepare(parts, request, stages, tile)
    with watch.stage("text"):
        conditionings = [
            stage.expert.condition(request, device, from_image=stage.from_image) for stage in stages
        ]
    with watch.stage("start"):
        latents = first_latents(parts, request, stages[0].table, noise)
    with ExitStack() as held:
        with watch.stage("prepare"):
            loops = _loops(request, stages, conditionings, latents, noise)
            together = residency is None or residency.together("denoise")
            runs = held.enter_context(all_ready(loops, together=together))
        for stage, run in zip(stages, runs, strict=True):
            with watch.stage(stage.name):
                latents = run(latents, watch)
    watch.tell()
    if watch.discarded:
        return None
    if request.output_type == "latent":
        return latents
    with watch.stage("decode"):
        return from_tensor(vae.decode(latents, tile=tile), request.output_type)


def _prepare(parts: Parts, request: GenerationRequest, stages: Sequence[Stage], tile: int | None) -> None:
    """Load what the stages need, so that their times are their own; where all of it may stay."""
    if parts.loader.residency is not None:
        return
    needed = [engine for stage in stages for engine in stage.expert.engines()]
    if request.image is not None and request.image.shape[1] == 3:
        needed.append(parts.vae.encoder)
    if request.output_type != "latent":
        needed.append(parts.vae.decoder)
    for engine in needed:
        engine.load()
    if request.output_type != "latent":
        # Of all that is recorded it takes most memory, which the others then share.
        parts.vae.record_decode(request.height, request.width, tile=tile)


def first_latents(
    parts: Parts, request: GenerationRequest, table: SamplerTable, noise: NoiseSource
) -> Tensor:
    """float32 [B, C, h, w] at the noise level of the table's first step."""
    device, vae = parts.loader.device, parts.vae
    shape = (vae.channels, request.height // vae.scale, request.width // vae.scale)
    if request.image is None:
        given = noise.draw(shape) if request.latents is None else request.latents
        return initial_latents(given.to(device, torch.float32), table)
    clean, rows = request.image.to(device, torch.float32), request.image_rows
    if clean.shape[1] == 3 and isinstance(request.generators, torch.Generator):
        # As in diffusers, a picture is drawn once from a generator of all images, and they start from the same.
        clean = vae.encode(clean, NoiseSource(request.generators, len(clean)).draw)[rows]
    elif clean.shape[1] == 3:
        clean = vae.encode(clean[rows], noise.draw)
    else:
        clean = clean[rows]
    if request.denoising_start is not None or not len(table):
        return clean
    return noised_latents(clean, noise.draw(shape).to(clean), table)


def _loops(
    request: GenerationRequest,
    stages: Sequence[Stage],
    conditionings: Sequence[Conditioning],
    latents: Tensor,
    noise: NoiseSource,
) -> list[tuple[Denoiser, LoopRequest]]:
    """The denoising loops, over latents such as these; their noise is drawn in the order in which they run."""
    B, C, h, w = latents.shape
    device, host = latents.device, torch.device("cpu")  # the loops' own tensors have room for the noise
    scales = torch.tensor(request.guidance_scales, dtype=torch.float32, device=device)
    return [
        (
            stage.expert.denoiser,
            LoopRequest(
                (B, C, h, w),
                stage.table,
                conditioning.named(),
                scales if stage.expert.guided(request.guided) else None,
                request.guidance_rescale,
                noise.draw_steps(stage.table, (C, h, w), host),
            ),
        )
        for stage, conditioning in zip(stages, conditionings, strict=True)
    ]
