"""Whole pipelines beside diffusers': the case table, the oracle, and the pairwise cover that `make test` runs.

A case names a checkpoint and a way to call it. `Rig.theirs` is diffusers on one prompt at a time; `Rig.ours` is
latentrt on the whole batch, with other sizes for every prompt. What variants "a", "b" and "c" mean depends on
the checkpoint, so that a cover over them stays small.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import latentrt
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from tiny_checkpoints import UNETS, randomize, write_json
from tolerances import PIPELINE_EAGER, PIPELINE_ONNXRUNTIME, PIPELINE_ZERO_SNR_FEW_STEPS

Images = NDArray[np.float32]
Options = dict[str, Any]

KINDS = ("sdxl", "ensemble", "refiner", "sd15", "sd21", "lcm")
BACKENDS = ("eager", "onnxruntime")
EXPORTED = ("sdxl", "ensemble", "refiner")
"""What the cover combines with everything on ONNX Runtime too; of the others it has one case each there, as to export
a UNet takes as long as a dozen images."""
STEPS = (1, 2, 5, 20, 50)
SPLITS = {"a": 0.5, "b": 0.8, "c": 0.8}
STRENGTHS = {"a": 0.3, "b": 0.8, "c": 1.0}

_DPM_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
SAMPLERS: dict[str, tuple[str, Options]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddim eta": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {**_DPM_2M, "use_karras_sigmas": False}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {**_DPM_2M, "use_karras_sigmas": True}),
    "lcm": ("LCMScheduler", {}),
}
"""diffusers' class of every sampler, and what is forced on it."""

NATIVE = {
    "sdxl": "euler",
    "ensemble": "euler",
    "refiner": "euler",
    "sd15": "pndm",
    "sd21": "ddim",
    "lcm": "lcm",
}
PREDICTIONS: dict[str, Options] = {
    "epsilon": {"prediction_type": "epsilon"},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero-snr": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}
OWN_PREDICTION = {kind: "v" if kind == "sd21" else "epsilon" for kind in KINDS}

# Prompts of one word and of many, sizes that all differ: nothing of one row fits another.
PROMPTS = ("a red cat on the hill", "storm", "two people walking in the old town, evening light")
NEGATIVES = ("blurry", "the dog, low quality, text", "dark night")
SECOND_PROMPTS = ("painting of the sea", "a photo", "green")
ORIGINAL = ((64, 64), (96, 40), (512, 768))
CROPS = ((0, 0), (16, 8), (0, 40))
TARGET = ((64, 64), (64, 96), (128, 64))
NEGATIVE_ORIGINAL = ((32, 32), (1024, 640), (48, 80))
NEGATIVE_CROPS = ((8, 24), (0, 0), (64, 32))
NEGATIVE_TARGET = ((64, 48), (32, 32), (256, 256))
SEEDS = (0, 11, 12345)

_LCM_SCHEDULER = {
    "_class_name": "LCMScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


@dataclass(frozen=True)
class Case:
    """One comparison. `batch` images are made in one call, and each is compared with diffusers run alone."""

    kind: str
    sampler: str
    prediction: str
    steps: int
    guidance: float
    batch: int
    variant: str
    backend: str

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in astuple(self))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width): not square where levels of the UNet get odd sides."""
        return (48, 64) if self.kind in ("ensemble", "sd21") else (64, 64)

    @property
    def tolerance(self) -> float:
        """Of the image in [0, 1]."""
        if self.prediction == "zero-snr" and self.steps <= 5:
            return PIPELINE_ZERO_SNR_FEW_STEPS
        return PIPELINE_ONNXRUNTIME if self.backend == "onnxruntime" else PIPELINE_EAGER

    def options(self) -> Options:
        """Arguments with the same name and meaning on both sides, for every prompt."""
        options: Options = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "eta": 0.7 if self.sampler == "ddim eta" else 0.0,
        }
        if self.kind in ("sdxl", "lcm", "sd15", "sd21") and self.variant == "c":
            options |= {"clip_skip": 1, "guidance_rescale": 0.7}
        if self.kind in ("ensemble", "refiner") and self.variant == "b":
            options |= {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}
        return options

    def told(self, k: int) -> Options:
        """What is said of prompt k alone."""
        told: Options = {"prompt": PROMPTS[k]}
        negated = self.kind in ("ensemble", "refiner") or self.variant != "b"
        if negated:
            told["negative_prompt"] = NEGATIVES[k]
        if self.kind in ("sd15", "sd21"):
            return told
        if self.variant == "a":
            told["prompt_2"] = SECOND_PROMPTS[k]
        if negated:
            told |= {
                "negative_original_size": NEGATIVE_ORIGINAL[k],
                "negative_crops_coords_top_left": NEGATIVE_CROPS[k],
                "negative_target_size": NEGATIVE_TARGET[k],
            }
        return told | {
            "original_size": ORIGINAL[k],
            "crops_coords_top_left": CROPS[k],
            "target_size": TARGET[k],
        }


def possible(case: Case) -> bool:
    """Whether both sides can run it: PNDM knows no sample prediction and no zero-SNR schedule, diffusers' Euler
    ancestral no sample prediction, and a UNet that is told the guidance scale belongs to LCM."""
    if (case.sampler, case.prediction) in (("pndm", "sample"), ("pndm", "zero-snr"), ("euler-a", "sample")):
        return False
    return case.kind != "lcm" or case.sampler == "lcm"


@cache
def all_cases() -> list[Case]:
    """Everything that can be combined."""
    axes = (KINDS, SAMPLERS, PREDICTIONS, STEPS, (1.0, 7.5), (1, 3), ("a", "b", "c"), BACKENDS)
    return [case for values in product(*axes) if possible(case := Case(*values))]


def coverable() -> list[Case]:
    """What the cover is chosen from."""
    return [case for case in all_cases() if case.backend == "eager" or case.kind in EXPORTED]


@cache
def cover() -> list[Case]:
    """Every pair of values of two fields that `coverable` has occurs in one of these, and every checkpoint on ONNX
    Runtime; the same list each time.

    Greedy: the case with the most pairs not seen yet; among equals the one with the fewest steps, then any.
    """
    cases = coverable()
    random.Random(0).shuffle(cases)
    ids: dict[tuple[int, int, Any, Any], int] = {}
    rows = [
        [ids.setdefault((i, j, row[i], row[j]), len(ids)) for i, j in combinations(range(len(row)), 2)]
        for row in map(astuple, cases)
    ]
    pairs = np.array(rows)
    steps = np.array([case.steps for case in cases])
    missing = np.ones(len(ids), dtype=bool)
    chosen: list[Case] = []
    while missing.any():
        gain = missing[pairs].sum(1)
        best = int(np.argmax(gain - 1e-3 * steps))
        missing[pairs[best]] = False
        chosen.append(cases[best])
    rest = (kind for kind in KINDS if kind not in EXPORTED)
    return chosen + [Case(k, NATIVE[k], OWN_PREDICTION[k], 2, 7.5, 1, "a", "onnxruntime") for k in rest]


def families() -> list[tuple[str, str, str, str]]:
    """(kind, sampler, prediction, variant) of the whole product: every checkpoint as it was trained, every way to
    hand over and every strength, and on SDXL's base every prediction too. Each stands for all of `STEPS`, both
    guidance scales, batches and back ends."""
    found = dict.fromkeys((c.kind, c.sampler, c.prediction, c.variant) for c in all_cases())
    return [
        (kind, sampler, prediction, variant)
        for kind, sampler, prediction, variant in found
        if (prediction == OWN_PREDICTION[kind] or (kind, variant) == ("sdxl", "a"))
        and (variant == "a" or kind in ("ensemble", "refiner"))
    ]


class Rig:
    """The checkpoints, and both sides' pipelines over them, each loaded once."""

    def __init__(self, folder: Callable[[str], Path], cache_dir: Path | None = None) -> None:
        """`folder(kind)` is where a checkpoint lies; exported models go to `cache_dir`."""
        self._folder = folder
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
        """A case's tolerance; or, where diffusers' own float32 image is further than half of PIPELINE_EAGER from its
        float64 image, four times that distance, and on ONNX Runtime as much more as its tolerance is wider: what
        float32 does not hold, no program can be held to.

        LCM makes a new guess of the image at each step and adds noise to it, so that with a random UNet and strong
        guidance roundings grow a thousandfold in twenty steps.
        """
        own = max(float(np.abs(self.theirs(case, k) - self.exact(case, k)).max()) for k in range(case.batch))
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
                options["refiner"] = self._folder("refiner")
            if kind in ("ensemble", "refiner"):
                base = self.pipeline("sdxl", backend)
                options |= {"text_encoder_2": base.text_encoder_2, "vae": base.vae}
            folder = self._folder("sdxl" if kind == "ensemble" else kind)
            pipe = latentrt.Pipeline.from_pretrained(folder, **options)
            pipe.set_progress_bar_config(disable=True)
            self._ours[kind, backend] = pipe
        pipe = self._ours[kind, backend]
        if not scheduler:
            return pipe
        base, refiner = (
            expert and replace(expert, scheduler={**expert.scheduler, **scheduler})
            for expert in (pipe._base, pipe._refiner)
        )
        return latentrt.Pipeline(replace(pipe._parts, base=base, refiner=refiner))

    def diffusers(self, kind: str, case: Case | None = None) -> Any:
        """Theirs, with the scheduler of the case, or the checkpoint's own."""
        if kind not in self._theirs:
            pipe = diffusers.DiffusionPipeline.from_pretrained(self._folder(kind))
            pipe.set_progress_bar_config(disable=True)
            if kind in ("sd15", "sd21"):
                # diffusers' clip_skip looks for a level of nesting that transformers 5 has no more.
                object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
            self._theirs[kind] = pipe
        pipe = self._theirs[kind]
        config = json.loads((self._folder(kind) / "scheduler" / "scheduler_config.json").read_text("utf-8"))
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


def save_lcm(path: Path, sdxl: Path) -> Path:
    """A checkpoint like LCM-SDXL: a UNet that is told the guidance scale, and its scheduler."""
    return save_beside(path, sdxl, {"time_cond_proj_dim": 20}, _LCM_SCHEDULER)


def save_beside(path: Path, sdxl: Path, fields: Options, scheduler: Options) -> Path:
    """A checkpoint with SDXL's text encoders and VAE, and a UNet (`fields` differ) and scheduler of its own."""
    path.mkdir(parents=True, exist_ok=True)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        (path / part).symlink_to(sdxl / part, target_is_directory=True)
    unet = UNet2DConditionModel(**{**UNETS["sdxl"], **fields})
    randomize(unet, 77)
    unet.save_pretrained(path / "unet", safe_serialization=True)
    write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    index = json.loads((sdxl / "model_index.json").read_text("utf-8"))
    write_json(path / "model_index.json", {**index, "scheduler": ["diffusers", scheduler["_class_name"]]})
    return path
