"""The cases and the sides of `latentrt bench`, in one table each.

A case is a workload: which pictures are generated. A side is a way to generate them. A side runs in the case's dtype,
or in another one if it is written `SIDE@DTYPE`, such as `diffusers@float32`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import RequestError
from ..runtime.engines.registry import backend_names, get_backend
from ..runtime.sampler import step_range
from ..runtime.sampler_config import SamplerConfig

__all__ = [
    "CASES",
    "DTYPES",
    "MLPERF",
    "SIDES",
    "Case",
    "SideSpec",
    "case_named",
    "default_sides",
    "eager_sides",
    "pictures_only",
    "reference_side",
    "sides_named",
    "unavailable_reason",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MLPERF: Mapping[str, Any] = {
    "steps": 20,
    "guidance": 8.0,
    "negative": "normal quality, low quality, worst quality, low res, blurry, nsfw, nude",
}
"""MLPerf inference's rules for stable-diffusion-xl; its sampler is Euler, SDXL's own."""


@dataclass(frozen=True)
class Case:
    """A workload that every side runs.

    Attributes:
        model, refiner: as `Pipeline.from_pretrained` takes them, or `sdxl-random` and `sdxl-refiner-random`: the
            published configurations with random weights.
        size: (height, width) in pixels; the model's own if None.
        batches: batch sizes; latency and the first image are reported for the first one.
        steps: of the whole schedule, base and refiner together.
        high_noise_frac: the base's share of the schedule, if there is a refiner.
        guidance: guidance scale.
        negative: negative prompt, if any.
        dtype: of weights and activations.
    """

    name: str
    summary: str
    model: str
    refiner: str | None = None
    size: tuple[int, int] | None = None
    batches: tuple[int, ...] = (1,)
    steps: int = 30
    high_noise_frac: float = 0.8
    guidance: float = 5.0
    negative: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError(f"case {self.name}: {self.steps} steps; at least 1 is needed")
        if not 0 <= self.high_noise_frac <= 1:
            raise RequestError(
                f"case {self.name}: high_noise_frac is {self.high_noise_frac}; it can be 0 to 1"
            )
        if not math.isfinite(self.guidance):
            raise RequestError(f"case {self.name}: guidance is {self.guidance}; give a finite number")

    def split_steps(self, scheduler: Mapping[str, Any]) -> dict[str, int]:
        """Stage -> the number of steps it takes, by the checkpoint's `scheduler_config.json`."""
        config = SamplerConfig.from_dict(scheduler)
        if self.refiner is None:
            first, last = step_range(config, self.steps)
            return {"base": last - first}
        middle = self.high_noise_frac
        begin, end = step_range(config, self.steps, denoising_end=middle)
        begin_2, end_2 = step_range(config, self.steps, denoising_start=middle)
        return {"base": end - begin, "refiner": end_2 - begin_2}


_SDXL: dict[str, Any] = {"model": "sdxl-random", "size": (1024, 1024), "dtype": "float16"}
_ROWS = (
    Case("demo", "the shipped demo, base + refiner", "demo", "demo", batches=(1, 4)),
    Case("demo-base", "the shipped demo's base alone", "demo", batches=(1, 4)),
    Case("sdxl", "SDXL base at 1024x1024, random weights", batches=(1, 2, 4, 8), **_SDXL),
    Case(
        "sdxl-refiner",
        "SDXL base + refiner at 1024x1024, random weights",
        refiner="sdxl-refiner-random",
        batches=(1, 4),
        **_SDXL,
    ),
    Case("sdxl-mlperf", "MLPerf's settings: 20 steps, guidance 8, a negative prompt", **MLPERF, **_SDXL),
)
CASES: Mapping[str, Case] = {case.name: case for case in _ROWS}


@dataclass(frozen=True)
class SideSpec:
    """One way to generate the pictures.

    Attributes:
        factory: `module:function` that loads a `Side` (see `side.Factory`).
        options: further arguments of the factory.
        builds: it exports or compiles first, which is timed in a process of its own.
        compiles_each_size: each batch size takes minutes to compile; on a CPU only the first is measured.
        copies: how many copies of the weights it writes to disk: one for an export, one for an engine.
        dtype: in place of the case's.
    """

    name: str
    summary: str
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    builds: bool = False
    compiles_each_size: bool = False
    copies: int = 0
    dtype: str | None = None

    @property
    def is_eager_diffusers(self) -> bool:
        """Whether quality is measured against it."""
        return self.factory == _DIFFUSERS and not self.options

    def at(self, dtype: str) -> SideSpec:
        """The same side in another dtype."""
        return replace(self, name=f"{self.name}@{dtype}", dtype=dtype)


_DIFFUSERS = "latentrt.bench.diffusers_side:open_side"
_ONNXRUNTIME = "latentrt.bench.onnxruntime_side:open_side"
_LATENTRT = "latentrt.bench.latentrt_side:open_side"
_COPIES = {"onnxruntime": 1, "tensorrt": 2, "tensorrt-rtx": 2}


_MODES = (
    ("compile", "default", "torch.compile"),
    ("reduce-overhead", "reduce-overhead", "torch.compile with CUDA graphs"),
    ("max-autotune", "max-autotune", "torch.compile(max-autotune)"),
)
"""Compiled diffusers: (suffix of the side's name, mode of `torch.compile`, summary)."""


def _side_table() -> dict[str, SideSpec]:
    rows = [
        SideSpec("diffusers", "eager, SDPA, contiguous or channels_last, whichever is faster", _DIFFUSERS),
        *(
            SideSpec(
                f"diffusers-{name}",
                summary,
                _DIFFUSERS,
                {"mode": mode},
                builds=True,
                compiles_each_size=True,
            )
            for name, mode, summary in _MODES
        ),
        SideSpec(
            "onnxruntime",
            "ONNX Runtime on an export of diffusers' own modules",
            _ONNXRUNTIME,
            builds=True,
            copies=1,
        ),
    ]
    for name in backend_names():
        rows.append(
            SideSpec(
                f"latentrt-{name}",
                f"latentrt on {name}",
                _LATENTRT,
                {"backend": name},
                builds=name != "eager",
                copies=_COPIES.get(name, 0),
            )
        )
    plain = {"backend": "triton", "graphs": False}
    rows.append(
        SideSpec("latentrt-triton-plain", "latentrt on triton without CUDA graphs", _LATENTRT, plain, True)
    )
    return {row.name: row for row in rows}


SIDES: Mapping[str, SideSpec] = _side_table()
_ON_CPU = ("diffusers", "diffusers-compile", "onnxruntime", "latentrt-eager", "latentrt-onnxruntime")


def case_named(name: str) -> Case:
    """Look up a case.

    Raises:
        RequestError: there is no such case; all are listed.
    """
    if name not in CASES:
        raise RequestError(f"no case {name!r}; there are {', '.join(CASES)}")
    return CASES[name]


def sides_named(names: Sequence[str]) -> list[SideSpec]:
    """Look up sides; the others' speed is compared with the first.

    Raises:
        RequestError: there is no such side or dtype, or a side is named twice.
    """
    specs = []
    for name in names:
        plain, _, dtype = name.partition("@")
        if plain not in SIDES:
            raise RequestError(f"no side {plain!r}; there are {', '.join(SIDES)}")
        if "@" in name and dtype not in DTYPES:
            raise RequestError(f"side {name!r}: no dtype {dtype!r}; there are {', '.join(DTYPES)}")
        specs.append(SIDES[plain].at(dtype) if dtype else SIDES[plain])
    if len({side.name for side in specs}) < len(specs):
        raise RequestError(f"a side is named twice in {', '.join(names)}; name each once")
    return specs


def eager_sides(sides: Sequence[SideSpec]) -> set[str]:
    """Names of the sides that quality can be measured against: eager diffusers, or, if it is not among `sides`,
    latentrt's own modules in eager PyTorch."""
    diffusers = {side.name for side in sides if side.is_eager_diffusers}
    latentrt = {side.name for side in sides if side.options == {"backend": "eager"}}
    return diffusers or latentrt


def pictures_only(case: Case, sides: Sequence[SideSpec]) -> SideSpec | None:
    """The side that only generates reference pictures and is not timed, if there is one: eager PyTorch in float32, in a
    case of half precision, unless it is the first side, which speed is compared with."""
    eager = [side for side in sides[1:] if side.name in eager_sides(sides)]
    exact = [side for side in eager if side.dtype == "float32" != case.dtype]
    return next(iter(exact), None)


def unavailable_reason(side: SideSpec, device: torch.device, dtype: str) -> str:
    """Why a side cannot run on this machine, and the remedy; empty if it can. Reads no weights.

    Args:
        dtype: of the case, for a side without a dtype of its own.
    """
    if side.factory in (_DIFFUSERS, _ONNXRUNTIME) and find_spec("diffusers") is None:
        return "diffusers is not installed; pip install diffusers"
    backend = "onnxruntime" if side.factory == _ONNXRUNTIME else side.options.get("backend")
    if backend is None:
        return ""
    availability = get_backend(backend).availability(device, DTYPES[side.dtype or dtype])
    return "" if availability.ok else f"{availability.reason}; {availability.remedy}"


def reference_side() -> str:
    """Name of the side that others are compared with by default: eager diffusers, or, if diffusers is not installed,
    latentrt's own modules in eager PyTorch."""
    return "latentrt-eager" if find_spec("diffusers") is None else "diffusers"


def default_sides(case: Case, device: torch.device) -> list[str]:
    """Names of the sides that are compared by default: those that are installed, `reference_side` first.

    On a CPU these are without the sides that need a GPU, and with one mode of `torch.compile` only. In half
    precision on a GPU the reference in float32 is added, whose pictures the others are compared with.
    """
    first = reference_side()
    names = [first, *(name for name in SIDES if name != first)]
    if device.type == "cpu":
        names = [name for name in names if name in _ON_CPU]
    available = [name for name in names if not unavailable_reason(SIDES[name], device, case.dtype)]
    exact = [f"{first}@float32"] if case.dtype != "float32" and device.type != "cpu" else []
    return [*available, *exact]
