"""scheduler_config.json -> SamplerConfig: what is taken over, what is refused."""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.sampler_oracle import (
    CLASSES,
    config_of,
    diffusers_steps,
    generators,
    make_scheduler,
    noise_like,
    start_at,
    table_steps,
)
from helpers.tiny_checkpoints import SCHEDULERS
from latentrt.errors import RequestError, UnsupportedConfigError
from latentrt.runtime.checks import shown
from latentrt.runtime.sampler import SAMPLERS, SamplerConfig, build_table
from latentrt.runtime.sampler_config import scheduler_fields
from tolerances import SAMPLER_TRAJECTORY, relative_error

X = noise_like(1, 4, 6, 6)

# As published; fields of other samplers are there from conversions.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SDXL": SCHEDULERS["sdxl"],
    "SD 1.5": SCHEDULERS["sd15"],
    "SD 2.1, zero SNR": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": True,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    },
    "DDPM": {
        "_class_name": "DDPMScheduler",
        "variance_type": "fixed_large",
        "beta_schedule": "squaredcos_cap_v2",
    },
    "LCM": {"_class_name": "LCMScheduler", "original_inference_steps": 40, "clip_sample_range": 2.0},
    "DPM++": {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_karras_sigmas": True,
        "final_sigmas_type": "sigma_min",
        "timestep_spacing": "trailing",
    },
}
FORCED = {
    "pndm": {"skip_prk_steps": True},
    "dpm++2m": {"use_karras_sigmas": False},
    "dpm++2m-karras": {"use_karras_sigmas": True},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("source", PUBLISHED)
def test_another_sampler_takes_over_what_from_config_takes_over(source: str, sampler: str) -> None:
    published = PUBLISHED[source]
    original = getattr(diffusers, published["_class_name"]).from_config(published)
    other = getattr(diffusers, CLASSES[sampler][0])
    as_saved = json.loads(original.to_json_string())  # every field of the class, and those passed along
    for config in (published, dict(original.config), as_saved):
        scheduler = other.from_config(config, **FORCED.get(sampler, {}))
        start_at(scheduler, 5)
        x = X * scheduler.init_noise_sigma
        theirs = diffusers_steps(scheduler, x, scheduler.timesteps, generators(1))
        ours = table_steps(SamplerConfig.from_dict(config, sampler), 5, x, generators(1))
        # Euler at zero terminal SNR: see SAMPLER_ZERO_SNR_EULER; what was taken over shows in the other samplers.
        loose = "SNR" in source and sampler.startswith("euler")
        assert relative_error(ours, theirs) < (1e-3 if loose else SAMPLER_TRAJECTORY)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_class(name: str) -> None:
    """A file that gives nothing but the class."""
    cls, own = CLASSES[name]
    scheduler = getattr(diffusers, cls)(**own)
    config = SamplerConfig.from_dict({"_class_name": cls, **own})
    scheduler.set_timesteps(7)
    x = X * scheduler.init_noise_sigma
    theirs = diffusers_steps(scheduler, x, scheduler.timesteps, generators(1))
    assert relative_error(table_steps(config, 7, x, generators(1)), theirs) < SAMPLER_TRAJECTORY
    assert build_table(config, 7).init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma))


@pytest.mark.parametrize("name", SAMPLERS)
def test_names(name: str) -> None:
    assert SamplerConfig.from_dict(PUBLISHED["SDXL"], name).name == name


def test_unknown_sampler_lists_those_there_are() -> None:
    with pytest.raises(RequestError, match=r"'heun'.*euler, euler-a, ddim, ddpm, pndm, dpm.*lcm"):
        SamplerConfig.from_dict(PUBLISHED["SDXL"], "heun")


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", None, ["Euler"]])
def test_unknown_class_is_named(name: Any) -> None:
    with pytest.raises(
        UnsupportedConfigError, match=f"{re.escape(repr(name))}.*EulerDiscreteScheduler.*sampler="
    ):
        SamplerConfig.from_dict({"_class_name": name})


REFUSED = [
    ("euler", "beta_schedule", "sigmoid"),
    ("euler", "prediction_type", "flow_prediction"),
    ("euler", "timestep_spacing", "quadratic"),
    ("euler", "interpolation_type", "log_linear"),
    ("euler", "use_exponential_sigmas", True),
    ("euler", "use_beta_sigmas", True),
    ("euler", "final_sigmas_type", "one"),
    ("euler", "num_train_timesteps", 0),
    ("euler", "num_train_timesteps", "1000"),
    ("euler", "steps_offset", -1),
    ("euler", "beta_start", math.nan),
    ("euler", "num_train_timesteps", 10**12),
    ("euler", "beta_start", 2),
    ("euler", "beta_end", math.inf),
    ("euler", "sigma_min", "low"),
    ("euler", "trained_betas", [0.1, 0.2]),
    ("ddim", "thresholding", True),
    ("ddpm", "thresholding", True),
    ("ddpm", "variance_type", "learned"),
    ("ddpm", "variance_type", "fixed_large_log"),
    ("pndm", "skip_prk_steps", False),
    ("pndm", "prediction_type", "sample"),
    ("dpm++2m", "algorithm_type", "sde-dpmsolver++"),
    ("dpm++2m", "solver_order", 3),
    ("dpm++2m", "solver_type", "heun"),
    ("dpm++2m", "use_lu_lambdas", True),
    ("dpm++2m", "use_flow_sigmas", True),
    ("dpm++2m", "variance_type", "learned_range"),
    ("lcm", "original_inference_steps", 2000),
    ("lcm", "original_inference_steps", math.inf),
    ("lcm", "original_inference_steps", 1.5),
    ("euler", "num_train_timesteps", 1000.5),
    ("euler", "steps_offset", math.inf),
    ("euler", "steps_offset", None),
    ("euler", "sigma_min", 0),
    ("euler", "sigma_max", 10**400),
    ("euler", "use_karras_sigmas", "no"),
    ("euler", "rescale_betas_zero_snr", [True]),
    ("euler", "beta_schedule", np.array(["linear", "linear"])),
    ("euler", "prediction_type", np.array(["epsilon", "sample"])),
    ("euler", "timestep_type", np.array(["discrete", "continuous"])),
    ("ddim", "set_alpha_to_one", np.array([True, True])),
    ("ddpm", "variance_type", np.array(["fixed_small", "learned"])),
    *(("dpm++2m", "lambda_min_clipped", value) for value in (None, "", math.inf, math.nan)),
    *(("lcm", "timestep_scaling", value) for value in (None, "", math.inf, -1)),
]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_unsupported_fields_are_named_with_their_value(name: str, field: str, value: Any) -> None:
    cls, own = CLASSES[name]
    with pytest.raises(UnsupportedConfigError) as raised:
        SamplerConfig.from_dict({"_class_name": cls, **own, field: value})
    message = str(raised.value)
    assert field in message
    assert ("2 values" if field == "trained_betas" else shown(value)) in message


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"beta_start": 0.0}, "beta_start 0.0, beta_end"),
        ({"beta_start": 1e-9}, "beta_start 1e-09, beta_end"),  # 1 - 1e-9 is 1 in float32
        ({"beta_start": 1.0}, "beta_start 1.0, beta_end"),
        ({"beta_end": 1.0}, "beta_end 1.0, num_train_timesteps 1000"),
        ({"num_train_timesteps": 100_000}, "num_train_timesteps 100000"),  # nothing is left of the signal
        (
            {"trained_betas": [0.1, 1.0, 0.1], "num_train_timesteps": 3, "original_inference_steps": 3},
            "trained_betas",
        ),
    ],
    ids=str,
)
def test_betas_that_leave_no_noise_or_no_signal(name: str, fields: dict[str, Any], named: str) -> None:
    cls, own = CLASSES[name]
    config = SamplerConfig.from_dict({"_class_name": cls, **own, "beta_schedule": "linear", **fields})
    with pytest.raises(
        UnsupportedConfigError, match=rf"scheduler .*{named}.* no noise or no signal.*; give betas"
    ):
        build_table(config, 2)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "LCM"])
def test_trained_betas_that_end_without_signal(name: str) -> None:
    """As files have them whose betas were rescaled before they were written. These samplers read no signal there,
    where the model does not predict the noise."""
    fields = {"_class_name": f"{name}Scheduler", "prediction_type": "v_prediction", "clip_sample": False}
    scaled = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    zero_snr = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr
    betas = zero_snr(diffusers.DDIMScheduler(**scaled).betas).tolist()
    assert betas[-1] == 1.0
    written = build_table(SamplerConfig.from_dict({**fields, "trained_betas": betas}), 4).on(
        torch.device("cpu")
    )
    asked = {**fields, **scaled, "rescale_betas_zero_snr": True}
    flagged = build_table(SamplerConfig.from_dict(asked), 4).on(torch.device("cpu"))
    torch.testing.assert_close(written, flagged, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedConfigError, match="no noise or no signal"):
        build_table(SamplerConfig.from_dict({"_class_name": f"{name}Scheduler", "trained_betas": betas}), 4)


def test_numbers_of_numpy() -> None:
    numbers = {
        "use_karras_sigmas": np.bool_(True),
        "steps_offset": np.int64(1),
        "beta_end": np.float32(0.0625),
    }
    plain = {"use_karras_sigmas": True, "steps_offset": 1, "beta_end": 0.0625}
    euler = {"_class_name": "EulerDiscreteScheduler"}
    assert SamplerConfig.from_dict({**euler, **numbers}) == SamplerConfig.from_dict({**euler, **plain})


def test_a_clipped_noise_level_leaves_a_step() -> None:
    config = SamplerConfig.from_dict(
        {**PUBLISHED["DPM++"], "use_karras_sigmas": False, "lambda_min_clipped": 9.0}
    )
    with pytest.raises(UnsupportedConfigError, match=r"lambda_min_clipped is 9.0: no step is left; lower it"):
        build_table(config, 2)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        (3, "trained_betas has 3 for num_train_timesteps 2"),
        ("ab", "trained_betas has 'ab' for"),
        ([0.1, "x"], "trained_betas of euler is 'x'; it must be a number from 0 to 1"),
        ([0.1, math.nan], "trained_betas of euler is nan"),
    ],
)
def test_betas_that_are_none(betas: Any, message: str) -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 2, "trained_betas": betas}
    with pytest.raises(UnsupportedConfigError, match=message):
        SamplerConfig.from_dict(config)


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "pndm"])
def test_zero_terminal_snr_needs_a_model_that_does_not_predict_noise(name: str) -> None:
    cls, own = CLASSES[name]
    with pytest.raises(UnsupportedConfigError, match=r"rescale_betas_zero_snr.*epsilon"):
        SamplerConfig.from_dict({"_class_name": cls, **own, "rescale_betas_zero_snr": True})


COSXL = {**PUBLISHED["SDXL"], "timestep_type": "continuous", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
@pytest.mark.parametrize(
    ("config", "named"),
    [
        (COSXL, r"timestep_type is 'continuous'"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, r"'EDMEulerScheduler'"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, r"'EDMDPMSolverMultistepScheduler'"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            r"'FlowMatchEulerDiscreteScheduler'",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, r"use_flow_sigmas is True"),
        (
            {**PUBLISHED["SDXL"], "prediction_type": "flow_prediction"},
            r"prediction_type is 'flow_prediction'",
        ),
    ],
)
def test_a_model_of_other_noise_or_timesteps_is_refused_whatever_the_sampler(
    config: dict[str, Any], named: str, sampler: str | None
) -> None:
    with pytest.raises(UnsupportedConfigError, match=named) as raised:
        SamplerConfig.from_dict(config, sampler)
    assert "sampler=" not in str(raised.value)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_continuous_timesteps_do_not_matter_where_noise_is_predicted(sampler: str) -> None:
    """diffusers takes them for v_prediction only."""
    config = {**COSXL, "prediction_type": "epsilon"}
    assert SamplerConfig.from_dict(config, sampler) == SamplerConfig.from_dict(PUBLISHED["SDXL"], sampler)


def test_ignored_scheduler_fields_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="latentrt"):
        for name in CLASSES:
            config_of(make_scheduler(name))
        assert not caplog.records
        SamplerConfig.from_dict({**PUBLISHED["SDXL"], "shift": 3.0})
        SamplerConfig.from_dict(PUBLISHED["SD 2.1, zero SNR"], "pndm")
    assert ["shift" in caplog.text, "rescale_betas_zero_snr" in caplog.text] == [True, True]


def test_stable_diffusion_pipelines_mend_old_files() -> None:
    """diffusers does it when a StableDiffusionPipeline is made."""
    old = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    for stable_diffusion, overrides, expected in (
        (False, {}, (0, 1.0)),
        (True, {}, (1, math.inf)),
        (True, {"steps_offset": 0}, (0, math.inf)),  # what is asked for is no outdated file
    ):
        config = SamplerConfig.from_dict(scheduler_fields(old, overrides, stable_diffusion=stable_diffusion))
        assert (config.steps_offset, config.clip) == expected
        defaults = {"steps_offset": 5, "clip_sample": True}
        filled_in = {**old, **defaults, "_use_default_values": list(defaults)}
        config = SamplerConfig.from_dict(
            scheduler_fields(filled_in, overrides, stable_diffusion=stable_diffusion)
        )
        assert (config.steps_offset, config.clip) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"timestep_spacings": "trailing"},
            r"scheduler has timestep_spacings, .* there are .*, timestep_spacing, ",
        ),
        ({"_class_name": "LCMScheduler"}, r"scheduler has _class_name, which no sampler knows"),
        (
            {"timestep_spacing": "trailling"},
            r"scheduler= cannot be met: .*timestep_spacing of euler is 'trailling'",
        ),
        ({"prediction_type": np.array(["a", "b"])}, r"scheduler= cannot be met: .*prediction_type is array"),
        ({"num_train_timesteps": "abc"}, r"scheduler= cannot be met: .*num_train_timesteps"),
        ("trailing", r"scheduler is a str; give the fields .* choose the sampler with sampler="),
        (make_scheduler("euler"), r"scheduler is a EulerDiscreteScheduler; give the fields"),
    ],
)
def test_what_is_no_field_of_a_scheduler_is_named(overrides: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        scheduler_fields(PUBLISHED["SDXL"], overrides, stable_diffusion=False)


def test_schedulers_of_the_oracle_are_the_ones_named() -> None:
    assert tuple(CLASSES) == SAMPLERS
    assert {type(make_scheduler(name)).__name__ for name in CLASSES} == {cls for cls, _ in CLASSES.values()}
