"""What a checkpoint's `scheduler_config.json` asks for, and the samplers that can be put in its place."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RequestError, UnsupportedConfigError
from .checks import check_choice, shown

__all__ = ["SAMPLERS", "SamplerConfig", "scheduler_fields"]

_log = logging.getLogger(__name__)

_Fields = Mapping[str, Any]

_KINDS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "LCMScheduler": "lcm",
}

_DPM_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_OVERRIDES: Mapping[str, tuple[str, _Fields]] = {
    "euler": ("euler", {}),
    "euler-a": ("euler-a", {}),
    "ddim": ("ddim", {}),
    "ddpm": ("ddpm", {}),
    "pndm": ("pndm", {"skip_prk_steps": True}),
    "dpm++2m": ("dpm++2m", {**_DPM_2M, "use_karras_sigmas": False}),
    "dpm++2m-karras": ("dpm++2m", {**_DPM_2M, "use_karras_sigmas": True}),
    "lcm": ("lcm", {}),
}
SAMPLERS = tuple(_OVERRIDES)
"""Names that `sampler=` takes."""

# The defaults of diffusers' classes, for fields that the file lacks.
_COMMON: _Fields = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_SIGMAS: _Fields = {
    "timestep_spacing": "linspace",
    "rescale_betas_zero_snr": False,
}
_CLIPPED: _Fields = {
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
}
_KARRAS: _Fields = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}
_DEFAULTS: Mapping[str, _Fields] = {
    "euler": {
        **_COMMON,
        **_SIGMAS,
        **_KARRAS,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
    },
    "euler-a": {**_COMMON, **_SIGMAS},
    "ddim": {**_COMMON, **_CLIPPED, "set_alpha_to_one": True},
    "ddpm": {**_COMMON, **_CLIPPED, "variance_type": "fixed_small"},
    "pndm": {**_COMMON, "timestep_spacing": "leading", "skip_prk_steps": False, "set_alpha_to_one": False},
    "dpm++2m": {
        **_COMMON,
        **_SIGMAS,
        **_KARRAS,
        **_DPM_2M,
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "thresholding": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "lcm": {
        **_COMMON,
        **_CLIPPED,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
}

_UNUSED: _Fields = {"lambda_min_clipped": -math.inf, "original_inference_steps": 1, "timestep_scaling": 10.0}
"""Of samplers that have no such field."""

_LEAST_SIGMA = 1e-9

_OFF = (False, None)
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": _PREDICTIONS,
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "skip_prk_steps": (True,),
    "thresholding": _OFF,
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "use_lu_lambdas": _OFF,
    "use_dynamic_shifting": _OFF,
    **dict.fromkeys(
        (
            *("clip_sample", "euler_at_final", "lower_order_final", "rescale_betas_zero_snr"),
            *("set_alpha_to_one", "use_karras_sigmas"),
        ),
        (True, False, None),
    ),
}
# Not DDPM's "fixed_large_log" and "learned": in diffusers they take the root of a negative number and of a raw output.
_VARIANCES: Mapping[str, tuple[Any, ...]] = {
    "ddpm": (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    "dpm++2m": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}

# Fields of these classes that only matter together with one that is refused.
_IDLE = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
_KNOWN = frozenset[str]().union(*_DEFAULTS.values()) | _IDLE


@dataclass(frozen=True)
class SamplerConfig:
    """A sampler and the noise schedule it runs on; names and meanings are diffusers'.

    Attributes:
        kind: euler, euler-a, ddim, ddpm, pndm, dpm++2m or lcm.
        clip: bound of the predicted clean latents; inf for none.
        variance_type: fixed_small, fixed_large or learned_range. Used by ddpm.
        trained_betas: the whole schedule, when the checkpoint brings its own.
    """

    kind: str
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    trained_betas: tuple[float, ...] | None
    rescale_betas_zero_snr: bool
    prediction_type: str
    timestep_spacing: str
    steps_offset: int
    clip: float
    set_alpha_to_one: bool
    variance_type: str
    use_karras_sigmas: bool
    sigma_min: float | None
    sigma_max: float | None
    final_sigmas_type: str
    lower_order_final: bool
    euler_at_final: bool
    lambda_min_clipped: float
    original_inference_steps: int
    timestep_scaling: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], sampler: str | None = None) -> SamplerConfig:
        """Read a `scheduler_config.json`.

        Args:
            config: its content. Fields that only other samplers have are ignored, as in diffusers: files keep them
                from conversions.
            sampler: one of `SAMPLERS` to use instead of the checkpoint's. As with diffusers'
                `Scheduler.from_config`, it takes every field of its own that the file gives, and defaults for the
                rest.

        Raises:
            RequestError: no sampler of that name.
            UnsupportedConfigError: naming the field and the value.
        """
        given, name = _explicit(config), config.get("_class_name")
        _require_own_schedule(name, given)
        if sampler is not None:
            kind, forced = _OVERRIDES[check_choice("sampler", sampler, SAMPLERS)]
        else:
            if not isinstance(name, str) or name not in _KINDS:
                raise UnsupportedConfigError(
                    f"scheduler _class_name is {shown(name)}; latentrt has {', '.join(_KINDS)}; "
                    f"or choose one with sampler=, such as {SAMPLERS[0]!r}"
                )
            kind, forced = _KINDS[name], {}
        return _resolve(kind, {**given, **forced})

    @property
    def name(self) -> str:
        """Its name in `SAMPLERS`."""
        return f"{self.kind}-karras" if self.kind == "dpm++2m" and self.use_karras_sigmas else self.kind


def scheduler_fields(
    config: Mapping[str, Any], overrides: Mapping[str, Any], *, stable_diffusion: bool
) -> dict[str, Any]:
    """A `scheduler_config.json` with some of its fields replaced.

    Args:
        stable_diffusion: correct an outdated file as diffusers' StableDiffusionPipeline (SD 1.x and 2.x, not SDXL) does
            when it loads one: `steps_offset` 1 and no clipping, whatever it says.

    Raises:
        RequestError: `overrides` are not fields of any sampler here, or have values that the checkpoint's sampler
            cannot have.
    """
    if not isinstance(overrides, Mapping):
        raise RequestError(
            f"scheduler is a {type(overrides).__name__}; give the fields that shall differ from the checkpoint's "
            'scheduler_config.json, such as {"timestep_spacing": "trailing"}, and choose the sampler with sampler='
        )
    known = sorted(_KNOWN - _IDLE)
    if unknown := [str(name) for name in overrides if name not in known]:
        raise RequestError(
            f"scheduler has {', '.join(unknown)}, which no sampler knows; there are {', '.join(known)}"
        )
    mended = {"steps_offset": 1, "clip_sample": False} if stable_diffusion else {}
    replaced = {**mended, **overrides}
    fields = {**config, **replaced}
    if filled_in := config.get("_use_default_values"):  # see `_explicit`
        fields["_use_default_values"] = [name for name in filled_in if name not in replaced]
    if overrides and fields.get("_class_name") in _KINDS:
        try:
            SamplerConfig.from_dict(fields)
        except UnsupportedConfigError as error:
            raise RequestError(f"scheduler= cannot be met: {error}") from error
    return fields


def _explicit(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the file itself gives; diffusers marks those that it filled in.

    Raises:
        UnsupportedConfigError: one of them is a list, an array or the like.
    """
    filled_in = config.get("_use_default_values", ())
    given = {k: v for k, v in config.items() if not k.startswith("_") and k not in filled_in}
    given = {k: v.item() if isinstance(v, np.number | np.bool_) else v for k, v in given.items()}
    if unknown := sorted(given.keys() - _KNOWN):
        _log.warning("scheduler fields that no supported sampler has are ignored: %s", ", ".join(unknown))
    for name in given.keys() & _KNOWN - {"trained_betas"}:
        if given[name] is not None and not isinstance(given[name], (str, int, float)):
            raise UnsupportedConfigError(
                f"scheduler field {name} is {shown(given[name])}; it must be a number, a text, true, false or null"
            )
    return given


def _require_own_schedule(name: Any, given: _Fields) -> None:
    """Refuse a model whose noise or timesteps no sampler here has: with another sampler its images would be wrong.

    Raises:
        UnsupportedConfigError: naming the class or the field.
    """
    found = None
    if isinstance(name, str) and name.startswith(("EDM", "FlowMatch")):
        found = f"_class_name is {shown(name)}"
    elif given.get("use_flow_sigmas"):
        found = f"field use_flow_sigmas is {shown(given['use_flow_sigmas'])}"
    elif given.get("prediction_type") == "flow_prediction":
        found = "field prediction_type is 'flow_prediction'"
    elif (
        given.get("prediction_type") == "v_prediction"
        and given.get("timestep_type", "discrete") != "discrete"
    ):
        found = f"field timestep_type is {shown(given['timestep_type'])} with prediction_type 'v_prediction'"
    if found is not None:
        raise UnsupportedConfigError(
            f"scheduler {found}: the model was trained on noise or timesteps that no sampler of latentrt has; take a "
            "checkpoint with the timesteps of DDPM, as SDXL's own"
        )


def _resolve(kind: str, given: Mapping[str, Any]) -> SamplerConfig:
    defaults = _DEFAULTS[kind]
    f = {**_UNUSED, **{name: given.get(name, default) for name, default in defaults.items()}}
    if kind == "pndm" and given.get("rescale_betas_zero_snr"):
        _log.warning("pndm has no zero terminal SNR; rescale_betas_zero_snr is ignored, as in diffusers")
    _refuse_unsupported(kind, f)
    steps = _integer(kind, f, "num_train_timesteps", 1, 1_000_000)
    variance = f.get("variance_type")
    return SamplerConfig(
        kind=kind,
        num_train_timesteps=steps,
        beta_start=_number(kind, f, "beta_start", 0, 1),
        beta_end=_number(kind, f, "beta_end", 0, 1),
        beta_schedule=f["beta_schedule"],
        trained_betas=_betas(kind, f["trained_betas"], steps),
        rescale_betas_zero_snr=bool(f.get("rescale_betas_zero_snr", False)),
        prediction_type=f["prediction_type"],
        timestep_spacing=f["timestep_spacing"],
        steps_offset=_integer(kind, f, "steps_offset", 0, steps),
        clip=_number(kind, f, "clip_sample_range", 0) if f.get("clip_sample") else math.inf,
        set_alpha_to_one=bool(f.get("set_alpha_to_one", True)),
        variance_type="fixed_small" if variance in (None, "fixed_small_log") else str(variance),
        use_karras_sigmas=bool(f.get("use_karras_sigmas", False)),
        sigma_min=None if f.get("sigma_min") is None else _number(kind, f, "sigma_min", _LEAST_SIGMA),
        sigma_max=None if f.get("sigma_max") is None else _number(kind, f, "sigma_max", _LEAST_SIGMA),
        final_sigmas_type=f.get("final_sigmas_type", "zero"),
        lower_order_final=bool(f.get("lower_order_final", True)),
        euler_at_final=bool(f.get("euler_at_final", False)),
        lambda_min_clipped=_number(kind, f, "lambda_min_clipped", -math.inf),
        original_inference_steps=_integer(kind, f, "original_inference_steps", 1, steps),
        timestep_scaling=_number(kind, f, "timestep_scaling", 0),
    )


def _refuse_unsupported(kind: str, f: _Fields) -> None:
    """
    Raises:
        UnsupportedConfigError: a choice that this sampler does not have, or two that do not go together.
    """
    for name, allowed in _ALLOWED.items():
        if name in f and f[name] not in allowed:
            raise _unsupported(kind, name, f[name], allowed)
    if kind in _VARIANCES and f["variance_type"] not in _VARIANCES[kind]:
        raise _unsupported(kind, "variance_type", f["variance_type"], _VARIANCES[kind])
    prediction = f["prediction_type"]
    if kind == "pndm" and prediction == "sample":
        raise _unsupported(kind, "prediction_type", prediction, _PREDICTIONS[:2])
    if f.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise UnsupportedConfigError(
            "scheduler field rescale_betas_zero_snr is True with prediction_type 'epsilon': where the signal "
            "is zero, the noise says nothing of it; such a model predicts v_prediction or sample"
        )


def _betas(kind: str, betas: Any, steps: int) -> tuple[float, ...] | None:
    """`trained_betas`, one for each step of training; None if they are not given."""
    if betas is None:
        return None
    if not isinstance(betas, (list, tuple)) or len(betas) != steps:
        got = f"{len(betas)} values" if isinstance(betas, (list, tuple)) else shown(betas)
        raise UnsupportedConfigError(
            f"scheduler field trained_betas has {got} for num_train_timesteps {steps}; one is needed for each"
        )
    return tuple(_number(kind, {"trained_betas": beta}, "trained_betas", 0, 1) for beta in betas)


def _number(kind: str, fields: _Fields, name: str, least: float, most: float = 1e9) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise UnsupportedConfigError(
            f"scheduler field {name} of {kind} is {shown(value)}; it must be a number from {least} to {most}"
        )
    return float(value)


def _integer(kind: str, fields: _Fields, name: str, least: int, most: int) -> int:
    number = _number(kind, fields, name, least, most)
    if not number.is_integer():
        raise UnsupportedConfigError(
            f"scheduler field {name} of {kind} is {number}; it must be a whole number"
        )
    return int(number)


def _unsupported(kind: str, name: str, value: Any, allowed: tuple[Any, ...]) -> UnsupportedConfigError:
    return UnsupportedConfigError(
        f"scheduler field {name} of {kind} is {shown(value)}; supported: {', '.join(repr(a) for a in allowed)}; "
        f"other samplers can be chosen with sampler= ({', '.join(SAMPLERS)})"
    )
