"""The pipeline: a prompt becomes an image. How it does is in `flow.py`, top to bottom."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .budget import Budget
from .calls import Calls, PipelineOutput
from .checks import check_flag, check_integer, check_items, shown
from .parts import Parts, load_parts
from .place import parse_device, parse_dtype
from .previews import Previewer
from .request import GenerationRequest, OutputType, Size, check_sizes
from .sampler import SAMPLERS
from .text_encoder import TextEncoder
from .vae import VAE

__all__ = ["Pipeline", "PipelineOutput"]

OnStepEnd = Callable[["Pipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
OnProgress = Callable[["Pipeline", int, dict[str, Any]], Mapping[str, Any] | None]


_ELSEWHERE = {
    **{
        name: f"give another one to from_pretrained(..., {name}=)"
        for name in ("text_encoder", "text_encoder_2", "vae")
    },
    **dict.fromkeys(("unet", "tokenizer", "tokenizer_2"), "load a checkpoint that has another one"),
    "scheduler": f"choose one for each call with sampler= ({', '.join(SAMPLERS)}), and change its fields with "
    'from_pretrained(..., scheduler={"timestep_spacing": "trailing"})',
    "safety_checker": "there is none; check the images that a call returns",
    "watermark": "there is none; mark the images that a call returns",
    "image_processor": "images are made as output_type= says; process what a call returns",
    **dict.fromkeys(
        ("_guidance_scale", "_guidance_rescale"),
        'divide the schedule between two calls, one with denoising_end= and output_type="latent", the next with '
        "denoising_start= and other guidance",
    ),
}
"""What is set on diffusers' pipelines and has no meaning here, with what to do instead."""


class Pipeline:
    """Base and refiner behind one call. Safe to call from several threads: a call keeps its state to itself."""

    def __init__(self, parts: Parts) -> None:
        """`parts`: what `load_parts` returns."""
        self._parts = parts
        self._loader = parts.loader
        self._budget = Budget(parts)
        self._calls = Calls(parts, self._budget)
        self._bar_options: dict[str, Any] = {}

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse what diffusers' pipelines would act on; other attributes, of the caller's own, can be set.

        Raises:
            RequestError: what to do instead.
        """
        if name in _ELSEWHERE and not (name in ("safety_checker", "watermark") and value is None):
            raise RequestError(
                f"a pipeline's {name} cannot be set, as its calls share it; {_ELSEWHERE[name]}"
            )
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        refiner: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        graphs: bool | None = None,
        memory: str = "resident",
        memory_limit: int | str | None = None,
        loop_memory: int | str | None = None,
        use_safetensors: bool | None = None,
        text_encoder: TextEncoder | None = None,
        text_encoder_2: TextEncoder | None = None,
        vae: VAE | None = None,
        scheduler: Mapping[str, Any] | None = None,
    ) -> Pipeline:
        """Load a checkpoint, and a refiner for the last steps.

        Args:
            model: `"demo"` (shipped), a diffusers folder, a single `.safetensors` file or a hub id. A refiner
                loads alone too (`"demo-refiner"` is the demo's).
            refiner: the same; `"demo"` stands for the demo's refiner.
            backend: `"auto"`, or a name that `latentrt backends` lists.
            dtype, torch_dtype: of weights and activations, a torch.dtype or its name; float32 on the CPU and
                float16 elsewhere by default.
            variant: of the weight files, such as `"fp16"`.
            revision: of a hub id.
            cache_dir: where exported models are kept; `LATENTRT_CACHE` or `~/.cache/latentrt` by default.
            device: `"cuda"` where there is one, else `"cpu"`, by default.
            graphs: (*) capture the work of engines once and replay it; by default on a GPU, as CUDA graphs.
            memory: (*) which weights are on the device when: "resident", all of them always; "balanced", text encoders
                for the text only; "low", one network at a time. Offloaded weights go to the host and come back through
                pinned memory; an engine of ONNX Runtime or TensorRT is closed and loaded again. Calls of several
                threads then run one at a time, and so do pipelines that share parts. The images are the same.
            memory_limit: (*) bytes of the device that it may take, or such as "8GB"; all that is free on a GPU, and no
                bound on the CPU, by default. What takes more by plan (`latentrt plan`) is refused.
            loop_memory: (*) bytes of captured graphs and their buffers that may be kept for later requests; by default
                what the plan of a request leaves, and 1 GiB where there is no bound. Of what cannot be kept only
                denoising loops are captured, each for its own steps.
            use_safetensors: accepted for diffusers' sake; latentrt reads nothing else.
            text_encoder, text_encoder_2, vae: parts of another pipeline to share instead of loading.
            scheduler: (*) fields in place of those of scheduler_config.json, such as
                `{"timestep_spacing": "trailing"}` for models distilled to a few steps. Like `sampler=` it is for the
                refiner too: the two divide one schedule.

        Raises:
            RequestError: an argument cannot be met, such as a dtype or device there is not; the message names it.
            CheckpointError: it is not there, damaged, or not understood.
            BackendError: unknown, or it cannot run here.
            MemoryPlanError: the weights alone take more memory than there is.
        """
        # First of all: a local variable of before would be passed on too.
        arguments = dict(locals())
        del arguments["cls"]
        return cls(load_parts(**arguments))

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The first text encoder, to share; None for a refiner."""
        return self._parts.base.text_encoder

    @property
    def text_encoder_2(self) -> TextEncoder | None:
        """SDXL's second text encoder, to share."""
        return self._parts.base.text_encoder_2

    @property
    def vae(self) -> VAE:
        """The VAE, to share."""
        return self._parts.vae

    @property
    def scheduler(self) -> SimpleNamespace:
        """Its `config` is the base's scheduler_config.json, for those who look at it as they would in diffusers."""
        return SimpleNamespace(config=dict(self._parts.base.scheduler))

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self._loader.device

    @property
    def backend(self) -> str:
        """The back end that was chosen."""
        return self._loader.backend.name

    @property
    def graphs(self) -> bool:
        """Whether the work of engines is captured once and replayed."""
        return self._loader.graphs is not None

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Pipeline:
        """Run on another device from the next call on; parts shared with another pipeline stay with that one.

        Args:
            device: as for `from_pretrained`; None for the one where it is.
            dtype: that which it has: another one is chosen when a pipeline is loaded.

        Raises:
            BackendUnavailableError: the back end cannot run there.
            RequestError: a call is in progress, or another dtype is given.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and parse_dtype(dtype) != self._loader.dtype:
            raise RequestError(
                f"a pipeline's dtype cannot be changed to {shown(dtype)}; load it so: from_pretrained(..., dtype=...)"
            )
        place = self._loader.device if device is None else parse_device(device)
        if place != self._loader.device:
            if self._calls.running:
                raise RequestError(
                    f"the pipeline cannot move to {str(place)!r} while a call runs; wait for its end"
                )
            self._loader.move(place)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm, such as `disable=True`. By default bars show on a terminal only."""
        self._bar_options = options

    def interrupt(self) -> None:
        """Stop every call in progress after the step it is at; each returns what it has."""
        self._calls.interrupt()

    @property
    def _interrupt(self) -> bool:
        """diffusers' callbacks write `pipe._interrupt = True` for `pipe.interrupt()`."""
        return self._calls.stopping

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        if value:
            self.interrupt()

    def warmup(
        self,
        sizes: Sequence[Size] | None = None,
        batches: Sequence[int] = (1,),
        *,
        guidance: bool = True,
        sampler: str | None = None,
    ) -> None:
        """Load everything and capture the work for these sizes, so that the first request is as fast as the others.

        Args:
            sizes: (height, width) in pixels; the model's own by default.
            batches: numbers of images.
            guidance, sampler: as the requests will have them.

        Raises:
            RequestError: an argument cannot be met; nothing was loaded.
            MemoryPlanError: the largest cannot fit. A size that fits alone but cannot be kept is logged.
        """
        pixels: list[Size] | list[tuple[None, None]] = [(None, None)]
        if sizes is not None:
            pixels = sorted(check_sizes("sizes", sizes, self.vae.scale), key=lambda size: -size[0] * size[1])
        counts = [check_integer("batches", n, 1, None) for n in check_items("batches", batches, "(1, 4)")]
        guided = check_flag("guidance", guidance)
        evicted = self._loader.graph_cache.evicted
        for height, width in pixels:
            for batch in sorted(counts, reverse=True):  # the largest first: others then fit its memory
                request = self._request(
                    [""] * batch,
                    height=height,
                    width=width,
                    num_inference_steps=5,  # of which a base takes two
                    high_noise_frac=0.5,
                    guidance_scale=None if guided else 1.0,
                    sampler=sampler,
                    seed=0,
                    output_type="pt",
                )
                self._calls.make(request, {"disable": True})
        self._budget.warn_of_evictions(evicted)

    def __call__(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        high_noise_frac: float = 0.8,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        sampler: str | None = None,
        clip_skip: int | None = None,
        original_size: Size | Sequence[Size] | None = None,
        crops_coords_top_left: Size | Sequence[Size] = (0, 0),
        target_size: Size | Sequence[Size] | None = None,
        negative_original_size: Size | Sequence[Size] | None = None,
        negative_crops_coords_top_left: Size | Sequence[Size] | None = None,
        negative_target_size: Size | Sequence[Size] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        output_type: OutputType = "pil",
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_progress: OnProgress | None = None,
        previewer: Previewer | None = None,
        tiled_vae: bool = False,
    ) -> PipelineOutput:
        """Make images. Arguments have diffusers' names and meanings; those of latentrt's own are marked (*).

        Args:
            prompt: a text, or a list of them.
            prompt_2: for SDXL's second text encoder; `prompt` by default, and in the place of an empty string.
            image: start from this picture, or from latents: see `image.to_tensor` for the forms it can have.
            strength: share of the steps taken from `image`; 0.3 for SDXL and 0.8 for SD by default.
            height, width: in pixels, multiples of 8; the model's own by default.
            num_inference_steps: steps of the whole schedule, base and refiner together.
            denoising_start: the image is latents already denoised for this fraction of the schedule.
            denoising_end: stop after this fraction; with `output_type="latent"` a refiner goes on from there.
            high_noise_frac: (*) with a refiner loaded, the fraction the base denoises. At 1 the refiner does
                nothing.
            guidance_scale: one, or (*) one for each image; 1 or less turns guidance off. 5 for SDXL and 7.5 for SD
                by default.
            guidance_rescale: share in [0, 1], against overexposure (Lin et al., 2023, section 3.4).
            negative_prompt, negative_prompt_2: what to steer away from.
            num_images_per_prompt: images of each prompt, next to each other in the result.
            eta: DDIM's share of noise.
            seed: (*) of the first image, the next ones count up; or one for each image. Random by default.
            generator: instead of seed, one torch.Generator for each image, or one for all.
            latents: instead of noise, `[B, 4, H/8, W/8]` of unit variance.
            sampler: (*) overrides the checkpoint's, such as "euler" or "dpm++2m-karras".
            clip_skip: text encoder layers left out, besides those the model always leaves out.
            original_size, crops_coords_top_left, target_size: (height, width) or (top, left), for all images
                or one per prompt; the image's size and (0, 0) by default.
            negative_original_size, negative_crops_coords_top_left, negative_target_size: of the negative half.
            aesthetic_score, negative_aesthetic_score: conditioning of a refiner.
            output_type: "pil", "np" (float32 `[B, H, W, 3]` in [0, 1]), "pt" (float32 `[B, 3, H, W]`) or "latent".
            callback_on_step_end: called after each step, which the device has done by then, as
                `callback(pipeline, step, timestep, {"latents": x})`, where timestep is a float. Networks may be
                called in its own thread only. It may return `{"latents": y}` to go on with, or `{"interrupt": True}`
                to stop.
            callback_on_progress: (*) called for each step once the device has done it, without waiting: on a GPU
                a step or two later. As `callback(pipeline, steps_done, {"preview": pictures})`, where pictures are
                uint8 `[B, H/8, W/8, 3]` on the CPU, or None. It may return `{"interrupt": True}` to stop, or
                `{"discard": True}` to stop and return no images.
            previewer: (*) makes the previews; `fit_previewer` returns one.
            tiled_vae: (*) decode in tiles of 512 x 512 pixels: less memory, and not quite the same picture; see
                `VAE.decode`. It is done anyway where by plan the picture would not fit whole.

        Raises:
            RequestError: an argument cannot be met; the message names it. A MemoryPlanError says what it needs.
            CheckpointError: a network's weights were replaced on disk between the load and its first use.
            OutOfMemoryError: the device had too little memory after all; the pipeline can still be used.
        """
        if previewer is not None and not isinstance(previewer, Previewer):
            raise RequestError(f"previewer is {shown(previewer)}; give what fit_previewer returns")
        return self._calls.make(
            self._parts.request(locals()),
            self._bar_options,
            on_step=self._bound("callback_on_step_end", callback_on_step_end),
            on_progress=self._bound("callback_on_progress", callback_on_progress),
            previewer=previewer,
        )

    def check(
        self, prompt: str | Sequence[str], *, planned: bool = True, **arguments: Any
    ) -> tuple[GenerationRequest, int]:
        """Refuse what a call with these arguments would refuse before its first step, and make nothing.

        Args:
            planned: whether to plan its memory too, which takes up to a second for each new kind of request.

        Returns:
            the request, and the steps it takes.

        Raises:
            RequestError: as a call does.
        """
        request = self._request(prompt, **arguments)
        return request, self._calls.check(request, planned=check_flag("planned", planned))

    def fit_previewer(self) -> Previewer:
        """A previewer of this model's latents, fitted to its VAE at the model's own size.

        Raises:
            MemoryPlanError: that size does not fit.
        """
        return self._calls.fit_previewer(self._request(""))

    def _bound(self, name: str, callback: Callable[..., Any] | None) -> Callable[..., Any] | None:
        """A callback with this pipeline as its first argument."""
        if callback is None:
            return None
        if not callable(callback):
            raise RequestError(f"{name} is {shown(callback)}; give a function, or None")
        return partial(callback, self)

    def _request(self, *arguments: Any, **named: Any) -> GenerationRequest:
        """The request that a call with these arguments would make."""
        call = _signature().bind(self, *arguments, **named)
        call.apply_defaults()
        return self._parts.request(call.arguments)


@cache
def _signature() -> inspect.Signature:
    """The signature of a call; cached, since a server checks every request."""
    return inspect.signature(Pipeline.__call__)
