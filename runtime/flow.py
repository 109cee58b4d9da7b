"""The whole flow of a call, top to bottom: text, first latents, the steps of each expert, pixels.

No stage knows its neighbours: they pass each other only tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from .conditioning import Conditioning
from .denoise import LoopRequest
from .denoiser import Denoiser, all_ready
from .image import Images, from_tensor
from .latents import NoiseSource, initial_latents, noised_latents
from .parts import Parts
from .progress import CallProgress
from .request import GenerationRequest
from .sampler import SamplerTable
from .stages import Stage
from .text_encoder import PromptEncoding

__all__ = ["first_latents", "make_images"]


def make_images(
    parts: Parts,
    request: GenerationRequest,
    stages: Sequence[Stage],
    noise: NoiseSource,
    progress: CallProgress,
) -> Images | None:
    """The images of a request.

    Args:
        parts: the experts and the VAE.
        stages: from `stages_of_request`: which expert takes which steps.
        noise: drawn for the first latents and then for each stage, in this order.
        progress: times the stages, calls back and may end the call; see `CallProgress`.

    Returns:
        By `output_type`, a list of PIL images, float32 [B, H, W, 3] in [0, 1], float32 [B, 3, H, W] or latents float32
        [B, C, h, w]; None if the callback discarded them.

    Raises:
        OutOfMemoryError: the device has too little memory; the message names the stage.
        RequestError: a callback returned something that it may not.
    """
    with progress.stage("prepare"):
        _prepare(parts, request, stages)
    with progress.stage("text"):
        conditionings = _conditionings(parts, request, stages)
    with progress.stage("start"):
        latents = first_latents(parts, request, stages[0].table, noise)
    with ExitStack() as held:
        with progress.stage("prepare"):
            loops = _loops(request, stages, conditionings, latents, noise)
            together = parts.loader.residency.together("denoise")
            runs = held.enter_context(all_ready(loops, together=together))
        for stage, run in zip(stages, runs, strict=True):
            with progress.stage(stage.name):
                latents = run(latents, progress)
    progress.deliver()
    if progress.discarded:
        return None
    if request.output_type == "latent":
        return latents
    with progress.stage("decode"):
        return from_tensor(parts.vae.decode(latents, tile=request.tile), request.output_type)


def _conditionings(parts: Parts, request: GenerationRequest, stages: Sequence[Stage]) -> list[Conditioning]:
    """The conditioning of each stage. A text that several stages encode with the same encoder is encoded once."""
    encode = PromptEncoding(parts.loader.device)
    return [stage.expert.condition(request, encode, from_image=stage.from_image) for stage in stages]


def _prepare(parts: Parts, request: GenerationRequest, stages: Sequence[Stage]) -> None:
    """Load every engine first, so that loading is not timed as part of a stage. Only if all weights stay resident."""
    if parts.loader.residency.offloads:
        return
    needed = [engine for stage in stages for engine in stage.expert.engines()]
    if request.starts_from_pixels:
        needed.append(parts.vae.encoder)
    if request.output_type != "latent":
        needed.append(parts.vae.decoder)
    for engine in needed:
        engine.load()
    if request.output_type != "latent":
        # Captured first, since it takes the most memory of all graphs: the others then share that.
        parts.vae.capture_decode(request.height, request.width, tile=request.tile)


def first_latents(
    parts: Parts, request: GenerationRequest, table: SamplerTable, noise: NoiseSource
) -> Tensor:
    """The latents that the first step starts from.

    Args:
        table: of the first stage.
        noise: drawn once for latents from noise; for those from an image, for encoding pixels and then for the noise.

    Returns:
        float32 [B, C, h, w] at the noise level of the table's first step.
    """
    device, vae = parts.loader.device, parts.vae
    shape = (vae.channels, request.height // vae.scale, request.width // vae.scale)
    if request.image is None:
        given = noise.draw(shape) if request.latents is None else request.latents
        return initial_latents(given.to(device, torch.float32), table)
    image, rows = request.image.to(device, torch.float32), request.image_rows
    if not request.starts_from_pixels:
        clean = image[rows]
    elif isinstance(request.generators, torch.Generator):
        # As in diffusers, a generator for all images encodes each given image once, for all that start from it.
        clean = vae.encode(image, NoiseSource(request.generators, len(image)).draw)[rows]
    else:
        clean = vae.encode(image[rows], noise.draw)
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
    """Each stage's denoiser with its request, over latents of this shape. Draws the noise of all steps, in order."""
    B, C, h, w = latents.shape
    device, host = latents.device, torch.device("cpu")  # the loops' own tensors have room for the noise
    scales = torch.tensor(request.guidance_scales, dtype=torch.float32, device=device)
    return [
        (
            stage.expert.denoiser,
            LoopRequest(
                shape=(B, C, h, w),
                table=stage.table,
                constants=conditioning.named(),
                guidance_scale=scales if stage.expert.uses_cfg(request.guided) else None,
                guidance_rescale=request.guidance_rescale,
                noise=noise.draw_steps(stage.table, (C, h, w), host),
            ),
        )
        for stage, conditioning in zip(stages, conditionings, strict=True)
    ]
