"""An expert denoiser: a UNet together with its conditioning.

SDXL is an ensemble of two (Podell et al., 2023, section 2.5): the base, and a refiner for the last, low-noise part of
the schedule. To the denoising loop they are the same thing with different data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import CheckpointError, UnsupportedConfigError
from .checks import check_choice
from .conditioning import Conditioning, MicroConditioning, guidance_batch, guidance_scale_embedding
from .denoiser import Denoiser
from .engines.lazy import LazyEngine
from .models.unet import UNetConfig
from .request import GenerationRequest
from .sampler import SAMPLERS, SamplerConfig
from .text_encoder import PromptEncoding, TextEmbeddings, TextEncoder

__all__ = ["Expert", "check_fit"]


@dataclass(frozen=True)
class Expert:
    """One UNet and its conditioning.

    Attributes:
        source: where its weights came from, for people to read.
        public_name: the same without the folders it lies in on this machine.
        unet, config: the network.
        denoiser: runs the denoising loop over the UNet.
        text_encoder, text_encoder_2: those it was trained on; SDXL's refiner has only the second, SD 1.x and 2.x
            only the first.
        scheduler: the checkpoint's scheduler_config.json, with the overrides.
        overrides: fields of it that the caller gave as scheduler=.
        aesthetic: its size conditioning ends in an aesthetic score.
        zero_negative: an absent negative prompt is zeros, not the empty text.
    """

    source: str
    public_name: str
    unet: LazyEngine
    config: UNetConfig
    denoiser: Denoiser
    text_encoder: TextEncoder | None
    text_encoder_2: TextEncoder | None
    scheduler: Mapping[str, Any]
    overrides: Mapping[str, Any]
    aesthetic: bool
    zero_negative: bool
    # By override. Cached, since parsing logs the fields that are ignored, and several stages of each request ask.
    _samplers: dict[str | None, SamplerConfig] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def name(self) -> str:
        """`refiner` for one that knows aesthetic scores, else `base`."""
        return "refiner" if self.aesthetic else "base"

    @property
    def encoders(self) -> list[TextEncoder]:
        """The text encoders there are, in the order their sequences are joined."""
        return [e for e in (self.text_encoder, self.text_encoder_2) if e is not None]

    def sharing(self, other: Expert) -> Expert:
        """This expert, with the other's second text encoder in place of an equal one of its own."""
        mine, theirs = self.text_encoder_2, other.text_encoder_2
        same = mine is not None and theirs is not None and mine.equals(theirs)
        return replace(self, text_encoder_2=theirs) if same else self

    def engines(self) -> list[LazyEngine]:
        """Everything it runs."""
        return [*(encoder.engine for encoder in self.encoders), self.unet]

    def sampler_config(self, override: str | None) -> SamplerConfig:
        """The checkpoint's sampler, or another one on the same noise schedule.

        Raises:
            RequestError: there is no such sampler.
        """
        name = None if override is None else check_choice("sampler", override, SAMPLERS)
        if name not in self._samplers:
            self._samplers[name] = SamplerConfig.from_dict(self.scheduler, name)
        return self._samplers[name]

    def uses_cfg(self, guided: bool) -> bool:
        """Whether a step runs the UNet on negative and positive rows: if the request is guided, and the guidance scale
        is not an input of the UNet, as in distilled models."""
        return guided and self.config.time_cond_proj_dim is None

    def condition(
        self, request: GenerationRequest, encode: PromptEncoding, *, from_image: bool
    ) -> Conditioning:
        """The UNet's inputs for a request, other than latents and timesteps.

        Args:
            encode: of this request; all of its experts have the same one.
            from_image: it continues from pixels or latents rather than from noise.
        """
        texts = [request.prompts, request.prompts_2][: len(self.encoders)]
        positive = encode(self.encoders, texts, request.clip_skip)
        negative = None
        if self.uses_cfg(request.guided):
            negative = self._negative(request, positive, encode).repeat(request.images_per_prompt)
        batch = guidance_batch(
            positive.repeat(request.images_per_prompt),
            negative,
            self._sizes(request, from_image) if self.config.takes_sizes else None,
            self.unet.component.dtype,
        )
        if self.config.time_cond_proj_dim is None:
            return batch
        embedding = guidance_scale_embedding(request.guidance_scales, self.config.time_cond_proj_dim)
        return replace(batch, timestep_cond=embedding.to(batch.encoder_hidden_states))

    def _negative(
        self, request: GenerationRequest, positive: TextEmbeddings, encode: PromptEncoding
    ) -> TextEmbeddings:
        if self.zero_negative and all(text is None for text in request.negatives):
            return positive.zeros()
        lists = [request.negatives, request.negatives_2][: len(self.encoders)]
        # Like diffusers, clip_skip is for the positive prompt only.
        return encode(self.encoders, [[text or "" for text in texts] for texts in lists], None)

    def _sizes(
        self, request: GenerationRequest, from_image: bool
    ) -> tuple[list[MicroConditioning], list[MicroConditioning]]:
        """The sizes and crops of the positive and of the negative rows."""
        r = request
        # A negative crop that is not given is diffusers' default: (0, 0) for a refiner or if a negative size is given,
        # else the positive crop. Its image-to-image pipeline ignores the sizes here.
        sized = r.negative_original_sizes is not None or r.negative_target_sizes is not None
        at_origin = self.aesthetic or (sized and not from_image)
        negative_crops = r.negative_crops or ([(0, 0)] * r.batch if at_origin else r.crops)
        score, negative_score = (
            (r.aesthetic_score, r.negative_aesthetic_score) if self.aesthetic else (None, None)
        )
        positive = zip(r.original_sizes, r.crops, r.target_sizes, strict=True)
        negative = zip(
            r.negative_original_sizes or r.original_sizes,
            negative_crops,
            r.negative_target_sizes or r.target_sizes,
            strict=True,
        )
        return (
            [MicroConditioning(*row, score) for row in positive],
            [MicroConditioning(*row, negative_score) for row in negative],
        )


def check_fit(base: Expert, refiner: Expert | None, latent_channels: int) -> None:
    """Whether the experts work on the VAE's latents, and on each other's.

    Raises:
        UnsupportedConfigError: a UNet takes more than latents.
        CheckpointError: base and refiner are of different families.
    """
    for expert in [base] if refiner is None else [base, refiner]:
        if expert.config.in_channels != latent_channels:
            raise UnsupportedConfigError(
                f"the UNet of {expert.source} reads {expert.config.in_channels} channels and its VAE's latents have "
                f"{latent_channels}: pipelines of inpainting and other models with more inputs are not supported"
            )
    if refiner is not None and refiner.config.takes_sizes != base.config.takes_sizes:
        raise CheckpointError(
            f"{base.source} and {refiner.source} are not of one family; a refiner works on its base's latents, so "
            "SDXL goes with SDXL, and Stable Diffusion 1.x or 2.x with its like"
        )
