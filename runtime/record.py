"""What made each image: the parameters that go into its PNG, enough to make it again."""

from __future__ import annotations

from typing import Any

from .. import __version__
from .parts import Parts
from .place import dtype_name
from .request import GenerationRequest, Size

__all__ = ["records"]


def records(request: GenerationRequest, parts: Parts) -> list[dict[str, Any]]:
    """One record for each image of a request that these parts made. Except for the essentials, arguments that have
    their default value are left out. Tiles are recorded where an image had several, whether asked for or not.
    """
    r, base, refiner = request, parts.base, parts.refiner
    sampler = base.sampler_config(r.sampler)
    common: dict[str, Any] = {
        "steps": r.steps,
        "sampler": r.sampler or sampler.name,
        # Only those that were in effect: a sampler may set such a field itself.
        **{name: value for name, value in base.overrides.items() if getattr(sampler, name, value) == value},
        "size": _wide((r.height, r.width)),
        "model": base.public_name,
        "backend": parts.loader.backend.name,
        "dtype": dtype_name(parts.loader.dtype),
        "version": f"latentrt {__version__}",
    }
    with_vae = r.output_type != "latent" or r.starts_from_pixels
    if with_vae and parts.vae.dtype != parts.loader.dtype:
        common["vae_dtype"] = dtype_name(parts.vae.dtype)
    if r.output_type != "latent" and parts.vae.is_tiled(r.height, r.width, r.tile):
        common["tiled_vae"] = True
    if refiner is not None:
        common |= {"refiner": refiner.public_name, "high_noise_frac": r.high_noise_frac}
    if r.image is not None and r.denoising_start is None:
        common["strength"] = r.strength
    if r.latents is not None:
        common["latents"] = "given"
    defaults: dict[str, float | None] = {
        "clip_skip": None,
        "guidance_rescale": 0.0,
        "eta": 0.0,
        "denoising_start": None,
        "denoising_end": None,
    }
    if any(expert.aesthetic for expert in parts.experts):
        defaults |= {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}
    common |= {name: getattr(r, name) for name, default in defaults.items() if getattr(r, name) != default}
    sized = any(expert.config.takes_sizes for expert in parts.experts)
    return [
        {
            **_texts(r, k),
            "guidance_scale": r.guidance_scales[k],
            **common,
            **(_sizes(r, k) if sized else {}),
            "seed": r.seeds[k],
        }
        for k in range(r.batch)
    ]


def _texts(r: GenerationRequest, k: int) -> dict[str, str]:
    p = k // r.images_per_prompt
    texts = {"prompt": r.prompts[p]}
    if r.prompts_2[p] != r.prompts[p]:
        texts["prompt_2"] = r.prompts_2[p]
    if negative := r.negatives[p]:
        texts["negative_prompt"] = negative
    if (second := r.negatives_2[p]) and second != r.negatives[p]:
        texts["negative_prompt_2"] = second
    return texts


def _sizes(r: GenerationRequest, k: int) -> dict[str, str]:
    """Sizes as WIDTHxHEIGHT and crops as `top,left`, where they are not those of the image."""
    own = (r.height, r.width)
    sizes = {
        "original_size": r.original_sizes[k] if r.original_sizes[k] != own else None,
        "target_size": r.target_sizes[k] if r.target_sizes[k] != own else None,
        "negative_original_size": r.negative_original_sizes and r.negative_original_sizes[k],
        "negative_target_size": r.negative_target_sizes and r.negative_target_sizes[k],
    }
    crops = {
        "crops_coords_top_left": r.crops[k] if r.crops[k] != (0, 0) else None,
        "negative_crops_coords_top_left": r.negative_crops and r.negative_crops[k],
    }
    found = {name: _wide(size) for name, size in sizes.items() if size}
    return found | {name: f"{crop[0]},{crop[1]}" for name, crop in crops.items() if crop}


def _wide(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
