"""diffusers as a side of the benchmark: eager, or compiled by PyTorch, in the setting that suits it best.

Source of the settings: diffusers' guide "Accelerate inference of text-to-image diffusion models": SDPA attention
(the default since PyTorch 2), channels_last, `torch.compile` of the UNets and of the VAE's decoder.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .monitor import Span
from .side import Made, checkpoint_folder, now

__all__ = ["DiffusersSide", "load_pipelines", "open_side"]

_TRIAL_STEPS = 4


def load_pipelines(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any | None]:
    """diffusers' own pipelines of base and refiner, sharing the second text encoder and the VAE."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    place = {"dtype": dtype, "add_watermarker": False}
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(checkpoint_folder(case.model), **place)
    refiner = None
    if case.refiner is not None:
        name = "demo-refiner" if case.refiner == "demo" else case.refiner
        refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
            checkpoint_folder(name),
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
    return base, refiner


class DiffusersSide:
    """diffusers' two pipelines on one case; picture k has a generator of its own on the CPU, as latentrt's has."""

    def __init__(
        self, case: Case, device: torch.device, base: Any, refiner: Any | None, settings: str
    ) -> None:
        self.settings = settings
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
        }
        sized = {**asked, "height": height, "width": width}
        self._spans = []
        if self._refiner is None:
            images = self._stage("base", self._base, output_type="np", **sized)
        else:
            split = case.high_noise_frac
            latents = self._stage("base", self._base, denoising_end=split, output_type="latent", **sized)
            images = self._stage(
                "refiner", self._refiner, image=latents, denoising_start=split, output_type="np", **asked
            )
        return Made(images, self._spans)

    def close(self) -> None:
        """The process that holds it ends."""

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


def open_side(
    case: Case, device: torch.device, dtype: torch.dtype, folder: Path, *, mode: str | None = None
) -> DiffusersSide:
    """diffusers eager, or compiled in a mode of `torch.compile`; compiled code is kept in `folder`."""
    base, refiner = load_pipelines(case, device, dtype)
    if mode is None:
        side = DiffusersSide(case, device, base, refiner, "eager, SDPA")
        side.settings += f", {_take_the_faster_format(side, device)}"
        return side
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    for pipe in (base, refiner):
        if pipe is not None:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.unet.compile(mode=mode)
    base.vae.to(memory_format=torch.channels_last)
    base.vae.decode = torch.compile(base.vae.decode, mode=mode)
    return DiffusersSide(case, device, base, refiner, f"torch.compile({mode}), SDPA, channels_last")


def _take_the_faster_format(side: DiffusersSide, device: torch.device) -> str:
    """Which layout convolutions like depends on the machine: a few steps of each, and the faster one stays."""
    seconds = {}
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for name, memory_format in formats.items():
        side.set_memory_format(memory_format)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            side.make([""], [0], _TRIAL_STEPS)
            times.append(now(device) - begin)
        seconds[name] = min(times)
    best = min(seconds, key=lambda name: seconds[name])
    side.set_memory_format(formats[best])
    return best
