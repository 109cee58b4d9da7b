"""How training and evaluation make pictures: prompts and seeds in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...runtime.pipeline import Pipeline
from .scenes import Picture

SPLIT = 0.8
GUIDANCE = 3.0


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


class PipelineGenerator:
    """The shipped demo, or a folder laid out like it; with `refine` the last fifth of the steps is the refiner's."""

    def __init__(
        self,
        demo: Path | None = None,
        *,
        refine: bool,
        backend: str = "auto",
        guidance: float = GUIDANCE,
        batch: int = 16,
    ) -> None:
        model, refiner = ("demo", "demo-refiner") if demo is None else (demo, demo / "refiner")
        self.base = Pipeline.from_pretrained(model, backend=backend)
        self.base.set_progress_bar_config(disable=True)
        self.guidance, self.batch, self.refiner = guidance, batch, None
        if refine:
            self.refiner = Pipeline.from_pretrained(
                refiner, backend=backend, text_encoder_2=self.base.text_encoder_2, vae=self.base.vae
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
            asked: dict[str, Any] = {
                "prompt": prompts[k : k + self.batch],
                "seed": list(seeds[k : k + self.batch]),
                "num_inference_steps": steps,
                "guidance_scale": self.guidance,
                "original_size": original or size,
                "target_size": size,
                "crops_coords_top_left": crop,
            }
            if self.refiner is None:
                images = self.base(height=size[0], width=size[1], **asked).images
            else:
                latents = self.base(
                    height=size[0], width=size[1], denoising_end=SPLIT, output_type="latent", **asked
                ).images
                images = self.refiner(image=latents, denoising_start=SPLIT, **asked).images
            pictures.extend(np.asarray(image) for image in images)
        return pictures
