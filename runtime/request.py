"""The arguments of a call, checked and normalised once, before anything is computed.

`GenerationRequest.create` takes diffusers' arguments in all their forms (one prompt or many, one seed or a list,
sizes as pairs or per prompt) and gives back plain lists with one entry per image.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import RequestError
from .checks import check_choice, check_flag, check_integer, check_items, check_number, shown
from .image import check_tensor, to_tensor

__all__ = [
    "GenerationRequest",
    "OutputType",
    "Size",
    "check_side",
    "check_sizes",
]

OutputType = Literal["pil", "np", "pt", "latent"]
Size = tuple[int, int]

TILE = 64
"""Latents along a side of a tile, where tiles are asked for: 512 pixels, a quarter of the memory of 1024 x 1024."""
_MAX_SIDE = 16_384
"""Longest side of an image in pixels: a slip of the keyboard is refused before anything is planned for it."""


@dataclass(frozen=True)
class GenerationRequest:
    """A validated request; every list has one entry per image unless said otherwise.

    `prompts`, `prompts_2`, `negatives`, `negatives_2` have one entry per prompt; image k belongs to prompt
    `k // images_per_prompt`. A negative of None is "none given" (SDXL's base then uses zeros). `image` holds the
    given images, pixels in [-1, 1] or latents, and image k starts from row `image_rows[k]`.
    """

    prompts: list[str]
    prompts_2: list[str]
    negatives: list[str | None]
    negatives_2: list[str | None]
    images_per_prompt: int
    height: int
    width: int
    steps: int
    guidance_scales: list[float]
    guidance_rescale: float
    eta: float
    clip_skip: int | None
    generators: list[torch.Generator] | torch.Generator
    seeds: list[int | None]
    image: Tensor | None
    image_rows: list[int]
    latents: Tensor | None
    strength: float
    denoising_start: float | None
    denoising_end: float | None
    high_noise_frac: float
    original_sizes: list[Size]
    crops: list[Size]
    target_sizes: list[Size]
    negative_original_sizes: list[Size] | None
    negative_crops: list[Size] | None
    negative_target_sizes: list[Size] | None
    aesthetic_score: float
    negative_aesthetic_score: float
    output_type: OutputType
    sampler: str | None
    tiled_vae: bool

    @property
    def batch(self) -> int:
        """Images asked for."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def guided(self) -> bool:
        """Whether the images are guided; all of a request are, or none."""
        return self.guidance_scales[0] > 1

    @property
    def tile(self) -> int | None:
        """As for `VAE.decode`."""
        return TILE if self.tiled_vae else None

    @property
    def starts_from_pixels(self) -> bool:
        """Whether `image` is pixels, to be encoded by the VAE, rather than latents."""
        return self.image is not None and self.image.shape[1] == 3

    @classmethod
    def create(
        cls, arguments: Mapping[str, Any], *, default_size: Size, latent_scale: int, latent_channels: int
    ) -> GenerationRequest:
        """Check and normalise the arguments of one call.

        Args:
            arguments: as in `Pipeline.__call__`, every one present.
            default_size: (height, width) in pixels when none is given.
            latent_scale: pixels per latent along a side, 8.
            latent_channels: 4.

        Raises:
            RequestError: naming the argument, the value and what is allowed.
        """
        prompts, prompts_2 = _prompts(arguments)
        count = len(prompts)
        negatives, negatives_2 = _negatives(arguments, count)
        per_prompt = check_integer("num_images_per_prompt", arguments["num_images_per_prompt"], 1, 1024)
        batch = count * per_prompt

        image = None if arguments["image"] is None else to_tensor(arguments["image"])
        image_rows = [] if image is None else _rows("image", image, batch, per_prompt)
        latents = arguments["latents"]
        if latents is not None:
            latents = latents[_rows("latents", latents, batch, per_prompt)]
        if image is not None and latents is not None:
            raise RequestError(
                "give image= or latents=, not both; to continue from latents, pass them as image="
            )
        height, width = _size_of(arguments, image, latents, default_size, latent_scale, latent_channels)
        start, end = _part_of_the_schedule(arguments)
        generators, seeds = _generators(arguments["seed"], arguments["generator"], batch)

        def pairs(name: str, default: Size) -> list[Size]:
            return _pairs(name, default if arguments[name] is None else arguments[name], count, per_prompt)

        def optional_pairs(name: str) -> list[Size] | None:
            return None if arguments[name] is None else _pairs(name, arguments[name], count, per_prompt)

        clip_skip = arguments["clip_skip"]
        return cls(
            prompts=prompts,
            prompts_2=prompts_2,
            negatives=negatives,
            negatives_2=negatives_2,
            images_per_prompt=per_prompt,
            height=height,
            width=width,
            steps=check_integer("num_inference_steps", arguments["num_inference_steps"], 1, None),
            guidance_scales=_scales(arguments["guidance_scale"], batch),
            guidance_rescale=check_number("guidance_rescale", arguments["guidance_rescale"], 0, 1),
            eta=check_number("eta", arguments["eta"], 0, 1),
            clip_skip=None if clip_skip is None else check_integer("clip_skip", clip_skip, 0, None),
            generators=generators,
            seeds=seeds,
            image=image,
            image_rows=image_rows,
            latents=latents,
            strength=check_number("strength", arguments["strength"], 0, 1),
            denoising_start=start,
            denoising_end=end,
            high_noise_frac=check_number("high_noise_frac", arguments["high_noise_frac"], 0, 1),
            original_sizes=pairs("original_size", (height, width)),
            crops=pairs("crops_coords_top_left", (0, 0)),
            target_sizes=pairs("target_size", (height, width)),
            negative_original_sizes=optional_pairs("negative_original_size"),
            negative_crops=optional_pairs("negative_crops_coords_top_left"),
            negative_target_sizes=optional_pairs("negative_target_size"),
            aesthetic_score=check_number("aesthetic_score", arguments["aesthetic_score"], -100, 100),
            negative_aesthetic_score=check_number(
                "negative_aesthetic_score", arguments["negative_aesthetic_score"], -100, 100
            ),
            output_type=check_choice("output_type", arguments["output_type"], get_args(OutputType)),
            sampler=arguments["sampler"],
            tiled_vae=check_flag("tiled_vae", arguments["tiled_vae"]),
        )


def _prompts(arguments: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """For the first and the second text encoder."""
    prompts = _texts("prompt", arguments["prompt"], None)
    if _is_absent(arguments["prompt_2"]):
        return prompts, prompts
    return prompts, _texts("prompt_2", arguments["prompt_2"], len(prompts))


def _negatives(arguments: Mapping[str, Any], count: int) -> tuple[list[str | None], list[str | None]]:
    """For the first and the second text encoder; None where there is no negative prompt."""
    negatives: list[str | None] = [None] * count
    if arguments["negative_prompt"] is not None:
        negatives = [*_texts("negative_prompt", arguments["negative_prompt"], count)]
    if _is_absent(arguments["negative_prompt_2"]):
        return negatives, negatives
    second: list[str | None] = [*_texts("negative_prompt_2", arguments["negative_prompt_2"], count)]
    return ["" if text is None else text for text in negatives], second


def _part_of_the_schedule(arguments: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Where denoising starts and ends."""
    start, end = arguments["denoising_start"], arguments["denoising_end"]
    start = None if start is None else check_number("denoising_start", start, 0, 1)
    end = None if end is None else check_number("denoising_end", end, 0, 1)
    if start is not None and end is not None and start >= end:
        raise RequestError(
            f"denoising_start is {start} and denoising_end {end}; the start must come before the end"
        )
    if start is not None and arguments["image"] is None:
        raise RequestError(
            f"denoising_start={start} continues from latents; pass them as image= "
            '(the result of a call with denoising_end and output_type="latent")'
        )
    if end == 0:
        raise RequestError(
            f"denoising_end is {end}, before the first step; give a larger fraction, or leave it out"
        )
    return start, end


def _is_absent(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text)  # an array == "" has no one truth value


def _texts(name: str, value: Any, count: int | None) -> list[str]:
    """A prompt or a list of them; a single one stands for all `count` prompts."""
    if isinstance(value, str):
        value = [value] * (1 if count is None else count)
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise RequestError(
            f"{name} must be a string or a list of strings; got {type(value).__name__}: {shown(value)}"
        )
    if not value:
        raise RequestError(f"{name} is an empty list; give at least one prompt")
    if count is not None and len(value) != count:
        raise RequestError(
            f"{name} has {len(value)} entries for {count} prompts; give one for each, or a string"
        )
    for text in value:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{name} is not text: {text[:80]!r} holds half a character; give UTF-8"
            ) from error
    return list(value)


def check_side(name: str, value: Any, latent_scale: int) -> int:
    """A height or width in pixels.

    Raises:
        RequestError: it is too small or large, or no multiple of `latent_scale`.
    """
    side = check_integer(name, value, latent_scale, _MAX_SIDE)
    if side % latent_scale:
        near = max(latent_scale, round(side / latent_scale) * latent_scale)
        raise RequestError(f"{name} is {side}; it must be a multiple of {latent_scale}, such as {near}")
    return side


def check_sizes(name: str, value: Any, latent_scale: int) -> list[Size]:
    """Pairs of height and width in pixels.

    Raises:
        RequestError: it is no list of them, or as of `check_side`.
    """
    example = "[(1024, 1024), (832, 1216)]"
    pairs = [check_items(name, pair, example) for pair in check_items(name, value, example)]
    if any(len(pair) != 2 for pair in pairs):
        raise RequestError(f"{name} must be pairs (height, width), such as {example}; got {shown(value)}")
    return [(check_side(name, h, latent_scale), check_side(name, w, latent_scale)) for h, w in pairs]


def _scales(value: Any, batch: int) -> list[float]:
    """A guidance scale for every image, from a number or one for each."""
    if not isinstance(value, (list, tuple)):
        return [check_number("guidance_scale", value, -1e4, 1e4)] * batch
    if len(value) != batch:
        raise RequestError(
            f"guidance_scale has {len(value)} entries for {batch} images; give one for each, or one number"
        )
    scales = [check_number("guidance_scale", scale, -1e4, 1e4) for scale in value]
    if len({scale > 1 for scale in scales}) > 1:
        raise RequestError(
            f"guidance_scale is {shown(scales)}: 1 or less turns guidance off, and the images of one call "
            "must all be guided or all not; make them in two calls"
        )
    return scales


def _pair(name: str, value: Any) -> Size:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return check_integer(name, value[0], 0, _MAX_SIDE), check_integer(name, value[1], 0, _MAX_SIDE)
    raise RequestError(
        f"{name} must be a pair of whole numbers (height, width or top, left); got {shown(value)}"
    )


def _pairs(name: str, value: Any, count: int, per_prompt: int) -> list[Size]:
    """A pair for every image, from one pair or one per prompt."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (list, tuple)) for v in value):
        if len(value) != count:
            raise RequestError(
                f"{name} has {len(value)} pairs for {count} prompts; give one for each, or one pair"
            )
        return [_pair(name, v) for v in value for _ in range(per_prompt)]
    return [_pair(name, value)] * (count * per_prompt)


def _rows(name: str, value: Any, batch: int, per_prompt: int) -> list[int]:
    """For each image, the row of `value` it gets: with one row per prompt its prompt's; with any other number, the rows
    in turn."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
    if not isinstance(value, Tensor) or value.ndim != 4:
        got = list(value.shape) if isinstance(value, Tensor) else shown(value)
        raise RequestError(f"{name} must be a tensor [B, C, h, w]; got {got}")
    if 0 in value.shape[2:]:
        raise RequestError(f"{name} has the shape {list(value.shape)}; no side can be 0")
    rows = value.shape[0]
    if not rows or batch % rows:
        raise RequestError(f"{name} has {rows} rows for {batch} images; {batch} must be a multiple of it")
    return [k // per_prompt if rows * per_prompt == batch else k % rows for k in range(batch)]


def _size_of(
    arguments: Mapping[str, Any],
    image: Tensor | None,
    latents: Tensor | None,
    default: Size,
    latent_scale: int,
    latent_channels: int,
) -> Size:
    """Height and width in pixels, from the image or latents where they are given."""
    asked: list[int | None] = []
    for name in ("height", "width"):
        value = arguments[name]
        asked.append(None if value is None else check_side(name, value, latent_scale))
    tensor = latents if image is None else image  # at most one of them is given
    if tensor is None:
        return asked[0] or default[0], asked[1] or default[1]
    if latents is not None and latents.shape[1] != latent_channels:
        raise RequestError(f"latents have {latents.shape[1]} channels; this model's have {latent_channels}")
    scale = 1 if tensor.shape[1] == 3 else latent_scale
    given = (tensor.shape[2] * scale, tensor.shape[3] * scale)
    for side, value, actual in zip(("height", "width"), asked, given, strict=True):
        if value is not None and value != actual:
            raise RequestError(
                f"{side} is {value}, but the image or latents given are {actual}; leave it out"
            )
    if max(given) > _MAX_SIDE:
        raise RequestError(f"the image is {given[1]}x{given[0]} pixels; sides may be at most {_MAX_SIDE}")
    return given


def _generators(
    seed: Any, generator: Any, batch: int
) -> tuple[list[torch.Generator] | torch.Generator, list[int | None]]:
    """One generator per image, and the seeds that are known.

    A seed s for several images stands for s, s + 1, ... A single torch generator for several images is drawn
    from in diffusers' order. With neither, seeds are drawn at random, so that the result can be reproduced.
    """
    if seed is not None and generator is not None:
        raise RequestError("give seed= or generator=, not both")
    if generator is not None:
        many = isinstance(generator, (list, tuple))
        if not all(isinstance(g, torch.Generator) for g in (generator if many else [generator])):
            raise RequestError(
                f"generator must be a torch.Generator or a list of them; got {shown(generator)}"
            )
        if many and len(generator) != batch:
            raise RequestError(f"{len(generator)} generators for {batch} images; give one for each")
        if not many and batch > 1:
            return generator, [None] * batch
        one: list[torch.Generator] = list(generator) if many else [generator]
        # One that is listed twice has been drawn from when its second image begins.
        known = [_fresh_seed(g) if all(g is not h for h in one[:k]) else None for k, g in enumerate(one)]
        return one, known
    limit = 2**63 - 1
    if seed is None:
        first = secrets.randbelow(2**32)
        seeds = [first + k for k in range(batch)]
    elif isinstance(seed, Sequence) and not isinstance(seed, (str, bytes, bytearray)):
        seeds = [check_integer("seed", s, 0, limit) for s in seed]
        if len(seeds) != batch:
            raise RequestError(f"{len(seeds)} seeds for {batch} images; give one for each, or one number")
    else:
        first = check_integer("seed", seed, 0, limit - (batch - 1))
        seeds = [first + k for k in range(batch)]
    return [torch.Generator().manual_seed(s) for s in seeds], [*seeds]


def _fresh_seed(generator: torch.Generator) -> int | None:
    """The seed that would repeat this generator's draws, unless it has been drawn from already."""
    if generator.device.type != "cpu":
        return None
    seed = generator.initial_seed()
    fresh = torch.Generator().manual_seed(seed)
    return seed if torch.equal(fresh.get_state(), generator.get_state()) else None
