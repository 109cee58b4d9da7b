"""How the evaluation makes pictures: prompts and seeds in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import latentrt
import numpy as np
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
SPLIT = 0.8
GUIDANCE = 4.0


class Generator(Protocol):
    """Pictures [H, W, 3] for prompts and seeds, row by row."""

    def __call__(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        *,
        steps: int,
        size: tuple[int, int] = (128, 128),
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> list[Picture]: ...


class DiffusersGenerator:
    """The demo folder through diffusers; with `refine` the last fifth of the steps is the refiner's."""

    def __init__(self, demo: Path, *, refine: bool, guidance: float = GUIDANCE, batch: int = 16) -> None:
        self.base = StableDiffusionXLPipeline.from_pretrained(
            demo, torch_dtype=torch.float32, add_watermarker=False
        )
        self.base.set_progress_bar_config(disable=True)
        self.guidance, self.batch, self.refiner = guidance, batch, None
        if refine:
            self.refiner = StableDiffusionXLImg2ImgPipeline(
                vae=self.base.vae,
                text_encoder=None,
                tokenizer=None,
                text_encoder_2=self.base.text_encoder_2,
                tokenizer_2=self.base.tokenizer_2,
                unet=UNet2DConditionModel.from_pretrained(
                    demo / "refiner" / "unet", torch_dtype=torch.float32
                ),
                scheduler=EulerDiscreteScheduler.from_pretrained(demo / "refiner" / "scheduler"),
                requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False,
                add_watermarker=False,
            )
            self.refiner.set_progress_bar_config(disable=True)

    def __call__(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        *,
        steps: int,
        size: tuple[int, int] = (128, 128),
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> list[Picture]:
        """Generate in batches; `size`, `original` and `crop` are (height, width) in pixels."""
        pictures: list[Picture] = []
        for k in range(0, len(prompts), self.batch):
            part = prompts[k : k + self.batch]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[k : k + self.batch]]
            shared: dict[str, Any] = {
                "prompt": part,
                "num_inference_steps": steps,
                "guidance_scale": self.guidance,
                "original_size": original or size,
                "target_size": size,
                "crops_coords_top_left": crop,
                "generator": generators,
            }
            if self.refiner is None:
                out = self.base(height=size[0], width=size[1], output_type="np", **shared)
            else:
                latents = self.base(
                    height=size[0], width=size[1], denoising_end=SPLIT, output_type="latent", **shared
                ).images
                out = self.refiner(image=latents, denoising_start=SPLIT, output_type="np", **shared)
            pictures.extend(np.rint(image * 255).astype(np.uint8) for image in out.images)
        return pictures


class LatentrtGenerator:
    """The demo through latentrt: `model` and `refiner` are "demo", or folders laid out like it."""

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        refine: bool,
        backend: str = "auto",
        guidance: float = GUIDANCE,
        batch: int = 16,
    ) -> None:
        refiner = (Path(model) / "refiner" if model != "demo" else "demo") if refine else None
        self.pipeline = latentrt.Pipeline.from_pretrained(model, refiner=refiner, backend=backend)
        self.pipeline.set_progress_bar_config(disable=True)
        self.guidance, self.batch = guidance, batch

    def __call__(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        *,
        steps: int,
        size: tuple[int, int] = (128, 128),
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> list[Picture]:
        """Generate in batches; `size`, `original` and `crop` are (height, width) in pixels."""
        pictures: list[Picture] = []
        for k in range(0, len(prompts), self.batch):
            out = self.pipeline(
                prompts[k : k + self.batch],
                height=size[0],
                width=size[1],
                num_inference_steps=steps,
                guidance_scale=self.guidance,
                high_noise_frac=SPLIT,
                seed=list(seeds[k : k + self.batch]),
                original_size=original or size,
                target_size=size,
                crops_coords_top_left=crop,
                output_type="pil",
            )
            pictures.extend(np.asarray(image) for image in out.images)
        return pictures
