"""diffusers as a side of the benchmark: eager, or compiled by PyTorch, in its fastest settings.

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
from .side import (
    MEMORY_FORMATS,
    Layout,
    Side,
    SideOutput,
    choose_layout,
    layout_text,
    now,
    try_convolutions,
    vae_in,
)

__all__ = ["DiffusersSide", "compile_options", "load_pipelines", "open_side"]

_FROM_NOISE = 1e-6
"""`denoising_start` with which diffusers' refiner takes every step: at 0 it would fall back to image to image."""


def load_pipelines(
    case: Case, device: torch.device, dtype: torch.dtype, *, upcast: torch.dtype = torch.float32
) -> tuple[Any, Any | None]:
    """diffusers' own pipelines of base and refiner, sharing the second text encoder and the VAE.

    Args:
        upcast: dtype of a VAE that would overflow in float16, if `dtype` is float16.
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
    """Convert the VAE once: the pipelines would convert its weights to float32 and back for every picture."""
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
        # NVML would count cached memory, of weights that were moved or replaced by sessions, as this side's.
        if device.type == "cuda":
            release_memory()

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
        case = self._case
        height, width = case.size or (None, None)
        call_args: dict[str, Any] = {
            "prompt": list(prompts),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "num_inference_steps": case.steps,
            "guidance_scale": case.guidance,
            "negative_prompt": None if case.negative is None else [case.negative] * len(prompts),
        }
        noise = self._noise(call_args["generator"])
        base_args = {**call_args, "height": height, "width": width, "latents": noise}
        self._spans = []
        share = case.high_noise_frac
        if self._refiner is None or share == 1:
            images = self._stage("base", self._base, output_type="np", **base_args)
            return SideOutput(images, self._spans)
        if share == 0:
            latents = self._initial_latents(noise)
            share = _FROM_NOISE
        else:
            latents = self._stage("base", self._base, denoising_end=share, output_type="latent", **base_args)
        images = self._stage(
            "refiner", self._refiner, image=latents, denoising_start=share, output_type="np", **call_args
        )
        return SideOutput(images, self._spans)

    def _noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """The same noise [B, C, H/8, W/8] as latentrt's: drawn in float32, then rounded. diffusers would draw it in
        the model's dtype, which can give other numbers."""
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

    def _initial_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise scaled as the base's pipeline scales it; the refiner's pipeline does not scale."""
        self._base.scheduler.set_timesteps(self._case.steps)
        scaled: torch.Tensor = noise * self._base.scheduler.init_noise_sigma
        return scaled

    def set_layout(self, layout: Layout) -> None:
        """Convert the weights of every network with convolutions."""
        for pipe in (self._base, self._refiner):
            if pipe is not None:
                pipe.unet.to(memory_format=MEMORY_FORMATS[layout["UNet"]])
        self._base.vae.to(memory_format=MEMORY_FORMATS[layout["VAE"]])

    def _stage(self, name: str, pipe: Any, **call_args: Any) -> Any:
        """Run one pipeline. Its denoising loop lasts from the first scaled input to the decoder, or to the end if there
        is no decoder."""
        self._marks.clear()
        images = pipe(**call_args).images
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
        """Wrap `call` so that it records the time of its first call as `name`."""

        @functools.wraps(call)
        def marking(*args: Any, **kwargs: Any) -> Any:
            if name not in self._marks:
                self._marks[name] = now(self._device)
            return call(*args, **kwargs)

        return marking


class _Eager(DiffusersSide):
    """Eager diffusers, each network in the memory format that is fastest on this machine."""

    def tune(self, layout: Layout | None = None) -> None:
        self.layout = choose_layout(self, self.set_layout, self._device, layout)
        self.settings += f", {layout_text(self.layout)}"


def open_side(
    case: Case, device: torch.device, dtype: torch.dtype, folder: Path, *, mode: str | None = None
) -> DiffusersSide:
    """Load diffusers eager, or compiled with a mode of `torch.compile`. The process's environment says where compiled
    code is stored."""
    # bfloat16 on a GPU, as latentrt uses: in float32 decoding would take diffusers much longer.
    upcast = torch.bfloat16 if device.type == "cuda" else torch.float32
    base, refiner = load_pipelines(case, device, dtype, upcast=upcast)
    extra_settings = try_convolutions(device)
    if mode is None:
        return _Eager(case, device, base, refiner, "eager, SDPA" + extra_settings)
    if device.type == "cuda" and mode == "max-autotune":
        # Both pipelines have the same VAE.
        for network in [base.unet, base.vae, *([] if refiner is None else [refiner.unet])]:
            _fuse_projections(network)
        extra_settings += ", fused QKV"
    # PyTorch counts recompilations of base and refiner together, and compiles each batch size separately.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(case.batches))
    options = compile_options(mode, device)
    compile_args: dict[str, Any] = {"options": options, "dynamic": False, "fullgraph": True}
    for pipe in (base, refiner):
        if pipe is not None:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.unet.compile(**compile_args)
    base.vae.to(memory_format=torch.channels_last)
    base.vae.decode = torch.compile(base.vae.decode, **compile_args)
    described = ", ".join([mode, "static sizes", "whole graphs", *(f"{k}={v}" for k, v in options.items())])
    settings = f"torch.compile({described}), SDPA, channels_last"
    return DiffusersSide(case, device, base, refiner, settings + extra_settings)


def _fuse_projections(network: Any) -> None:
    """Fuse the projections to queries, keys and values, and remove the single ones.

    diffusers keeps those beside the fused ones, unused: a quarter of the base UNet would count as memory twice.
    """
    network.fuse_qkv_projections()
    for module in network.modules():
        for fused, names in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
            if hasattr(module, fused):
                for name in names:
                    delattr(module, name)


def compile_options(mode: str, device: torch.device) -> dict[str, Any]:
    """Inductor's options of a mode, and on a GPU with max-autotune also those of diffusers' guide.

    Freezing is not used on a CPU. It gained nothing: the demo's UNet was 1.40 and 1.45 times as fast as eager with it,
    and 1.45 times without. And a second process took twice as long to start, because PyTorch's cache of traced graphs
    has no frozen ones.
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
