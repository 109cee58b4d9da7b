"""What whole pipelines are compared at: the case table, and the pairwise cover that `make test` runs.

A case names a checkpoint and a way to call it. What variants "a", "b" and "c" mean depends on the checkpoint, so that
a cover over them stays small.
"""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
from tolerances import PIPELINE_EAGER, PIPELINE_ONNXRUNTIME, PIPELINE_ZERO_SNR_FEW_STEPS

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
