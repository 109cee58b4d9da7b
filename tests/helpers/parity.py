"""Whole pipelines beside diffusers': the oracle of a case, and latentrt on the same weights.

`Rig.theirs` is diffusers on one prompt at a time; `Rig.ours` is latentrt on the whole batch, with other sizes for every
prompt. The cases are in parity_cases.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import latentrt
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from tolerances import PIPELINE_EAGER

from helpers.parity_cases import NATIVE, PREDICTIONS, SAMPLERS, SEEDS, SPLITS, STRENGTHS, Case, Options

Images = NDArray[np.float32]

_UNITS = (-8, -4, -2, -1, 1, 2, 4, 8)  # in the last place


class Rig:
    """The checkpoints, and both sides' pipelines over them, each loaded once."""

    def __init__(self, folder: Callable[[str], Path], cache_dir: Path | None = None) -> None:
        """`folder(kind)` is where a checkpoint lies; exported models go to `cache_dir`."""
        self.folder = folder
        self._cache_dir = cache_dir
        self._ours: dict[tuple[str, str], latentrt.Pipeline] = {}
        self._theirs: dict[str, Any] = {}
        self._oracles: dict[Case, Images] = {}
        self.picture = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(99))

    def difference(self, case: Case, **changes: Any) -> float:
        """max|ours - theirs| over the images of a case; `changes` are for our side alone."""
        ours = self.ours(case, **changes)
        theirs = np.concatenate([self.theirs(case, k) for k in range(case.batch)])
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            return float("inf")
        return float(np.abs(ours.astype(np.float64) - theirs).max())

    def allowed(self, case: Case) -> float:
        """A case's tolerance; or, where diffusers' own float32 images are further than half of PIPELINE_EAGER from its
        float64 image, four times that distance, and on ONNX Runtime as much more as its tolerance is wider: what
        float32 does not hold, no program can be held to.

        LCM makes a new guess of the image at each step and adds noise to it, so that with a random UNet and strong
        guidance roundings grow a thousandfold in twenty steps. How far they take one image is chance (0.0006 to 0.005
        in one case): that of eight more is looked at, each with other roundings from the first layer on.
        """
        own = 0.0
        for k in range(case.batch):
            exact = self.exact(case, k)
            images = [self.theirs(case, k), *(self._rounded_otherwise(case, k, units) for units in _UNITS)]
            own = max(own, *(float(np.abs(image - exact).max()) for image in images))
        share = own / PIPELINE_EAGER
        return case.tolerance * (1 if share <= 0.5 else 4 * share)

    def ours(self, case: Case, scheduler: Options | None = None, **changes: Any) -> Images:
        """The case's images [batch, H, W, 3], made in one call; `scheduler` changes fields of its config."""
        fields = PREDICTIONS[case.prediction] | (scheduler or {})
        told = [case.told(k) for k in range(case.batch)]
        arguments = {name: [one[name] for one in told] for name in told[0]} | case.options()
        arguments |= {"seed": list(SEEDS[: case.batch]), "output_type": "np"}
        arguments["sampler"] = None if case.sampler == NATIVE[case.kind] else case.sampler.split()[0]
        arguments |= changes
        height, width = case.size
        if case.kind == "refiner":
            pipe = self.pipeline("refiner", case.backend, fields)
            images = pipe(image=self.picture, strength=STRENGTHS[case.variant], **arguments).images
        elif case.kind == "ensemble" and case.variant == "c":
            # SDXL's documented two calls; the generators go on where the base left them.
            base = self.pipeline("sdxl", case.backend, fields)
            refiner = self.pipeline("refiner", case.backend, fields)
            generators = [torch.Generator().manual_seed(seed) for seed in arguments.pop("seed")]
            arguments |= {"generator": generators}
            split = SPLITS["c"]
            first = {**arguments, "output_type": "latent", "height": height, "width": width}
            latents = base(**first, denoising_end=split).images
            images = refiner(image=latents, denoising_start=split, **arguments).images
        else:
            pipe = self.pipeline(case.kind, case.backend, fields)
            if case.kind == "ensemble":
                arguments.setdefault("high_noise_frac", SPLITS[case.variant])
            images = pipe(height=height, width=width, **arguments).images
        return np.asarray(images)

    def theirs(self, case: Case, k: int) -> Images:
        """What diffusers makes of prompt k alone, [1, H, W, 3]."""
        alone = replace(case, batch=1, backend=str(k))
        if alone not in self._oracles:
            self._oracles[alone] = self._oracle(case, k)
        return self._oracles[alone]

    def exact(self, case: Case, k: int) -> NDArray[np.float64]:
        """`theirs`, in float64 from the same noise, which is drawn in float32."""
        kinds = ("sdxl", "refiner") if case.kind == "ensemble" else (case.kind,)
        pipes = [self.diffusers(kind) for kind in kinds]
        with _float32_noise():
            try:
                for pipe in pipes:
                    pipe.to(torch.float64)
                return self._oracle(case, k).astype(np.float64)
            finally:
                for pipe in pipes:
                    pipe.to(torch.float32)

    def _rounded_otherwise(self, case: Case, k: int, units: int) -> Images:
        """`theirs`, with the first weights of each UNet so many units in the last place larger."""
        kinds = ("sdxl", "refiner") if case.kind == "ensemble" else (case.kind,)
        weights = [self.diffusers(kind).unet.conv_in.weight.data for kind in kinds]
        kept = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight *= 1 + units * torch.finfo(torch.float32).eps
            return self._oracle(case, k)
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)

    def _oracle(self, case: Case, k: int) -> Images:
        generator = torch.Generator().manual_seed(SEEDS[k])
        height, width = case.size
        options = {**case.options(), **case.told(k), "generator": generator}
        aesthetics = {
            n: options.pop(n) for n in ("aesthetic_score", "negative_aesthetic_score") if n in options
        }
        final = {"output_type": "np"}
        if case.kind == "refiner":
            pipe = self.diffusers("refiner", case)
            strength = STRENGTHS[case.variant]
            if int(case.steps * strength) == 0:
                return _round_trip(pipe, self.picture, generator)
            return np.asarray(
                pipe(image=self.picture, strength=strength, **options, **aesthetics, **final).images
            )
        if case.kind == "ensemble":
            base, refiner = self.diffusers("sdxl", case), self.diffusers("refiner", case)
            split = SPLITS[case.variant]
            latents = base(
                **options, height=height, width=width, denoising_end=split, output_type="latent"
            ).images
            return np.asarray(
                refiner(image=latents, denoising_start=split, **options, **aesthetics, **final).images
            )
        return np.asarray(
            self.diffusers(case.kind, case)(**options, height=height, width=width, **final).images
        )

    def pipeline(self, kind: str, backend: str, scheduler: Options | None = None) -> latentrt.Pipeline:
        """Ours, with fields of `scheduler_config.json` changed."""
        if (kind, backend) not in self._ours:
            options: Options = {"backend": backend, "cache_dir": self._cache_dir}
            if kind == "ensemble":
                options["refiner"] = self.folder("refiner")
            if kind in ("ensemble", "refiner"):
                base = self.pipeline("sdxl", backend)
                options |= {"text_encoder_2": base.text_encoder_2, "vae": base.vae}
            folder = self.folder("sdxl" if kind == "ensemble" else kind)
            pipe = latentrt.Pipeline.from_pretrained(folder, **options)
            pipe.set_progress_bar_config(disable=True)
            self._ours[kind, backend] = pipe
        pipe = self._ours[kind, backend]
        if not scheduler:
            return pipe
        base, refiner = (
            expert and replace(expert, scheduler={**expert.scheduler, **scheduler})
            for expert in (pipe._parts.base, pipe._parts.refiner)
        )
        return latentrt.Pipeline(replace(pipe._parts, base=base, refiner=refiner))

    def diffusers(self, kind: str, case: Case | None = None) -> Any:
        """Theirs, with the scheduler of the case, or the checkpoint's own."""
        if kind not in self._theirs:
            pipe = diffusers.DiffusionPipeline.from_pretrained(self.folder(kind))
            pipe.set_progress_bar_config(disable=True)
            if kind in ("sd15", "sd21"):
                # diffusers' clip_skip looks for a level of nesting that transformers 5 has no more.
                object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
            self._theirs[kind] = pipe
        pipe = self._theirs[kind]
        config = json.loads((self.folder(kind) / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        if case is not None:
            config |= PREDICTIONS[case.prediction]
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        if case is not None:
            name, forced = SAMPLERS[case.sampler]
            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **forced)
        return pipe


@contextmanager
def _float32_noise() -> Iterator[None]:
    """diffusers draws noise in the dtype of what it is added to, and other numbers in each."""

    def draw(*args: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        return randn_tensor(*args, dtype=torch.float32, **options).to(dtype or torch.float32)

    modules = [
        m for name, m in sys.modules.items() if name.startswith("diffusers.") and "randn_tensor" in vars(m)
    ]
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


def _round_trip(pipe: Any, picture: torch.Tensor, generator: torch.Generator) -> Images:
    """Encoded and decoded: image to image at a strength of no step, where diffusers fails."""
    with torch.inference_mode():
        latents = pipe.vae.encode(picture * 2 - 1).latent_dist.sample(generator)
        image = pipe.vae.decode(latents).sample
    return np.asarray((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
