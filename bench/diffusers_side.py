"""diffusers as a side of the benchmark: eager, or compiled by PyTorch, in the setting that suits it best.

Source of the settings: diffusers' guide "Accelerate inference of text-to-image diffusion models": SDPA attention
(the default since PyTorch 2), channels_last, `torch.compile` of the UNets and of the VAE's decoder as whole graphs, and
with max-autotune Inductor's options and fused projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config as dynamo
import torch._inductor

from ..runtime.place import release_memory
from ..runtime.weights import refiner_source
from .cases import Case
from .models import checkpoint_folder
from .monitor import Span
from .side import Made, Side, now, take_quicker_layout, try_convolutions, vae_in

__all__ = ["DiffusersSide", "compile_options", "load_pipelines", "open_side"]

_FROM_NOISE = 1e-6
"""Of the schedule, so that diffusers' refiner takes every step: at 0 it falls back to image to image."""


def load_pipelines(
    case: Case, device: torch.device, dtype: torch.dtype, *, upcast: torch.dtype = torch.float32
) -> tuple[Any, Any | None]:
    """diffusers' own pipelines of base and refiner, sharing the second text encoder and the VAE.

    Args:
        upcast: dtype of a VAE that would overflow in float16, where `dtype` is that.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    place = {"dtype": dtype, "add_watermarker": False}
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoint_folder(case.model), **place)
    refiner = None
    if case.refiner is not None:
        refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
            checkpoint_folder(str(refiner_source(case.refiner))),
            vae=base.vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=base.text_encoder_2,
            tokenizer_2=base.tokenizer_2,
            **place,
        )
    for pipe in (base, refiner):
        if pipe is not None:
            pipe.to(device)
            pipe.set_progress_bar_config(disable=True)
    if dtype == torch.float16 and base.vae.config.force_upcast:
        _upcast(base.vae, upcast)
    return base, refiner


def _upcast(vae: Any, dtype: torch.dtype) -> None:
    """Once: the pipelines would move its weights to float32 and back for every picture."""
    vae.to(dtype)
    decode = vae.decode

    def from_half(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return decode(latents.to(dtype), *args, **kwargs)

    vae.decode = from_half


class DiffusersSide(Side):
    """diffusers' two pipelines on one case; picture k has a generator of its own on the CPU, as latentrt's has."""

    def __init__(
        self, case: Case, device: torch.device, base: Any, refiner: Any | None, settings: str
    ) -> None:
        self.settings = f"{settings}, {vae_in(base.vae.dtype)}"
        self._case = case
        self._base = base
        self._refiner = refiner
        self._device = device
        self._spans: list[Span] = []
        self._marks: dict[str, float] = {}
        for pipe in (base, refiner):
            if pipe is not None:
                pipe.encode_prompt = self._timed_text(pipe.encode_prompt)
                pipe.scheduler.scale_model_input = self._marking("loop", pipe.scheduler.scale_model_input)
        base.vae.decode = self._marking("decode", base.vae.decode)
        # What was moved, or replaced by sessions: NVML would count it as this side's.
        if device.type == "cuda":
            release_memory()

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Made:
        return self.make(prompts, seeds, self._case.steps)

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> Made:
        """The same at another number of steps."""
        case = self._case
        height, width = case.size or (None, None)
        asked: dict[str, Any] = {
            "prompt": list(prompts),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": steps,
            "guidance_scale": case.guidance,
            "negative_prompt": None if case.negative is None else [case.negative] * len(prompts),
        }
        noise = self._drawn(asked["generator"])
        sized = {**asked, "height": height, "width": width, "latents": noise}
        self._spans = []
        share = case.high_noise_frac
        if self._refiner is None or share == 1:
            images = self._stage("base", self._base, output_type="np", **sized)
            return Made(images, self._spans)
        if share == 0:
            latents = self._scaled(noise, steps)
            share = _FROM_NOISE
        else:
            latents = self._stage("base", self._base, denoising_end=share, output_type="latent", **sized)
        images = self._stage(
            "refiner", self._refiner, image=latents, denoising_start=share, output_type="np", **asked
        )
        return Made(images, self._spans)

    def _drawn(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Noise [B, C, H/8, W/8] of latentrt's numbers: drawn in float32, then rounded. diffusers would draw in the
        model's dtype, which need not give the same ones."""
        base = self._base
        height, width = self._case.size or (base.default_sample_size * base.vae_scale_factor,) * 2
        shape = (
            1,
            base.unet.config.in_channels,
            height // base.vae_scale_factor,
            width // base.vae_scale_factor,
        )
        drawn = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return drawn.to(self._device, base.unet.dtype)

    def _scaled(self, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """As the base begins from; the refiner's pipeline makes none."""
        self._base.scheduler.set_timesteps(steps)
        scaled: torch.Tensor = noise * self._base.scheduler.init_noise_sigma
        return scaled

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Of the weights of everything that convolves."""
        for pipe in (self._base, self._refiner):
            if pipe is not None:
                pipe.unet.to(memory_format=memory_format)
        self._base.vae.to(memory_format=memory_format)

    def _stage(self, name: str, pipe: Any, **asked: Any) -> Any:
        """Run one pipeline: its loop is from the first scaled input to the decoder, or else to the end."""
        self._marks.clear()
        images = pipe(**asked).images
        end = now(self._device)
        decode = self._marks.get("decode", end)
        self._spans.append(Span(name, self._marks.get("loop", decode), decode))
        if decode < end:
            self._spans.append(Span("decode", decode, end))
        return images

    def _timed_text(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = now(self._device)
            out = encode(*args, **kwargs)
            self._spans.append(Span("text", begin, now(self._device)))
            return out

        return timed

    def _marking(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which notes as `name` when it was first entered."""

        @functools.wraps(call)
        def marking(*args: Any, **kwargs: Any) -> Any:
            if name not in self._marks:
                self._marks[name] = now(self._device)
            return call(*args, **kwargs)

        return marking


class _Eager(DiffusersSide):
    """In the layout that is faster here."""

    def tune(self, memory_format: str | None = None) -> None:
        self.memory_format = take_quicker_layout(
            self.set_memory_format, self.make, self._device, memory_format
        )
        self.settings += f", {self.memory_format}"


def open_side(
    case: Case, device: torch.device, dtype: torch.dtype, folder: Path, *, mode: str | None = None
) -> DiffusersSide:
    """diffusers eager, or compiled in a mode of `torch.compile`; its process says where compiled code is kept."""
    # In bfloat16 on a GPU, as latentrt's own: float32 would cost diffusers a good part of its decoding.
    upcast = torch.bfloat16 if device.type == "cuda" else torch.float32
    base, refiner = load_pipelines(case, device, dtype, upcast=upcast)
    also = try_convolutions(device)
    if mode is None:
        return _Eager(case, device, base, refiner, "eager, SDPA" + also)
    if device.type == "cuda" and mode == "max-autotune":
        base.fuse_qkv_projections()
        if refiner is not None:
            refiner.unet.fuse_qkv_projections()  # the VAE is the base's
        also += ", fused QKV"
    # Base and refiner are one function to PyTorch, and each size of a batch is compiled apart.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(case.batches))
    options = compile_options(mode, device)
    how: dict[str, Any] = {"options": options, "dynamic": False, "fullgraph": True}
    for pipe in (base, refiner):
        if pipe is not None:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.unet.compile(**how)
    base.vae.to(memory_format=torch.channels_last)
    base.vae.decode = torch.compile(base.vae.decode, **how)
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    settings = (
        f"torch.compile({mode}, static sizes, whole graphs{', ' if told else ''}{told}), SDPA, channels_last"
    )
    return DiffusersSide(case, device, base, refiner, settings + also)


def compile_options(mode: str, device: torch.device) -> dict[str, Any]:
    """Inductor's settings of a mode, and on a GPU with max-autotune those of diffusers' guide.

    Freezing is left out on a CPU: the demo's UNet was 1.40 and 1.45 times as fast as eager with it and 1.45 times
    without, and a second process took twice as long to begin: PyTorch's cache of traced graphs holds no frozen ones.
    """
    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode))
    if device.type == "cuda" and mode == "max-autotune":
        options |= {
            "conv_1x1_as_mm": True,
            "coordinate_descent_tuning": True,
            "coordinate_descent_check_all_directions": True,
            "epilogue_fusion": False,
        }
    return options
