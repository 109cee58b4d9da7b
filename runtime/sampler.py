"""Samplers as coefficient tables, computed in float64 before the loop.

    config = SamplerConfig.from_dict(scheduler_config)            # what the checkpoint says
    begin, end = step_range(config, 30, denoising_end=0.8)        # which steps of the schedule
    table = build_table(config, 30, begin=begin, end=end)         # one row of coefficients for each

`latentrt.kernels.sampler_step` says what a row means. With a_t = alpha_bar(t), the share of the signal's variance left
at timestep t (diffusers' alphas_cumprod), and sigma_t = sqrt((1 - a_t) / a_t), the formulas are those of

    euler       Karras et al. (2022), algorithm 1 without churn: x' = x + (sigma' - sigma) (x - x0) / sigma
    euler-a     the same with ancestral noise, as in k-diffusion's sample_euler_ancestral
    ddim        Song et al. (2020), equations 12 and 16
    ddpm        Ho et al. (2020), equation 7; learned variance: Nichol and Dhariwal (2021), equation 15
    pndm        Liu et al. (2022), equations 9 and 12: linear multistep after one Heun-like step
    dpm++2m     Lu et al., DPM-Solver++ (2022), algorithm 2 and its first-order step
    lcm         Luo et al. (2023), algorithm 3

and in details (the noise level after the last step, what is rounded) those of diffusers' schedulers, which the tests
compare with. Where nothing bounds x0, its weight is folded into those of x and of the model's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RequestError
from ..kernels.sampler_step import COLUMNS, KEEP_NOTHING, KEEP_OUT, KEEP_X0, StepRow
from .sampler_config import SAMPLERS, SamplerConfig
from .schedule import Schedule, make_schedule, step_range

__all__ = ["SAMPLERS", "SamplerConfig", "SamplerTable", "build_table", "step_range"]

_Pair = tuple[float, float]

_EULER = ("euler", "euler-a")
_TIMESTEP = StepRow._fields.index("timestep")
_WEIGHTS = slice(StepRow._fields.index("w_x"), StepRow._fields.index("w_noise") + 1)
"""Columns with the weights of the sum that is the next latents."""

_ADAMS_BASHFORTH = {
    1: (1.0, 0.0, 0.0, 0.0),
    2: (3 / 2, -1 / 2, 0.0, 0.0),
    3: (23 / 12, -16 / 12, 5 / 12, 0.0),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Linear multistep of as many outputs, the latest first: Liu et al. (2022), equation 9, and its lower orders."""


@dataclass(frozen=True)
class SamplerTable:
    """The steps `begin` to `end` of a schedule.

    Attributes:
        rows: float64 [N, COLUMNS] on the CPU; columns are `latentrt.kernels.sampler_step.StepRow`.
        draws_noise: for each step, whether noise is drawn for it; its weight can still be zero.
        uses_history: whether the sampler uses results of earlier steps.
        predicts_variance: whether the model's output has its variance in the second half of its channels.
        init_noise_sigma: initial latents are standard normal noise times this.
        add_noise: weights (of the latents, of the noise) that bring clean latents to the noise level of step `begin`.
        variance_preserving: whether latents are alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 (VP); else, as Euler's,
            x0 + (sigma / alpha) eps (VE).
        last_signal: that alpha after the last step; 1 without steps.
    """

    rows: Tensor
    draws_noise: tuple[bool, ...]
    uses_history: bool
    predicts_variance: bool
    init_noise_sigma: float
    add_noise: tuple[float, float]
    variance_preserving: bool
    last_signal: float

    def __len__(self) -> int:
        return len(self.draws_noise)

    @property
    def timesteps(self) -> list[float]:
        """The timestep that the model gets at each step."""
        column: list[float] = self.rows[:, _TIMESTEP].tolist()
        return column

    def handing_over_to(self, following: SamplerTable) -> SamplerTable:
        """The same steps, the last of which scales the latents as another table's sampler does: VP or VE."""
        if following.variance_preserving == self.variance_preserving:
            return self
        rows = self.rows.clone()
        rows[-1, _WEIGHTS] *= self.last_signal if following.variance_preserving else 1 / self.last_signal
        return replace(self, rows=rows)

    def on(self, device: torch.device) -> Tensor:
        """The rows on a device, rounded once to float32: [N, COLUMNS]."""
        return self.rows.to(device=device, dtype=torch.float32)


def build_table(
    config: SamplerConfig, num_steps: int, *, begin: int = 0, end: int | None = None, eta: float = 0.0
) -> SamplerTable:
    """The coefficients of steps `begin` to `end` of a schedule of `num_steps`.

    Samplers that look back start afresh at `begin`, as a refiner's own scheduler does.

    Args:
        begin, end: from `step_range`; equal for no steps, None for the last.
        eta: share of DDPM's noise that DDIM adds, in [0, 1]; the other samplers ignore it.

    Raises:
        RequestError: no such schedule or range.
    """
    schedule = make_schedule(config, num_steps)
    end = len(schedule) if end is None else end
    if not 0 <= begin <= end <= len(schedule):
        raise RequestError(f"steps {begin} to {end} were asked for; the schedule has {len(schedule)}")
    steps = list(_SAMPLERS[config.kind](_Steps(config, schedule, begin, end, eta)))
    rows = torch.tensor([step.row for step in steps], dtype=torch.float64, device="cpu").reshape(-1, COLUMNS)
    return SamplerTable(
        rows=rows,
        draws_noise=tuple(step.draws_noise for step in steps),
        uses_history=config.kind in ("pndm", "dpm++2m"),
        predicts_variance=config.kind == "ddpm" and config.variance_type == "learned_range",
        init_noise_sigma=_init_noise_sigma(config, schedule),
        add_noise=_add_noise(config, schedule, begin),
        variance_preserving=config.kind not in _EULER,
        last_signal=steps[-1].signal_after if steps else 1.0,
    )


def _init_noise_sigma(config: SamplerConfig, schedule: Schedule) -> float:
    if config.kind not in _EULER:
        return 1.0
    highest = float(schedule.sigmas.max())
    # "leading" begins short of pure noise: the variance is the signal's, which is 1, plus the noise's.
    return math.hypot(highest, 1) if config.timestep_spacing == "leading" else highest


def _add_noise(config: SamplerConfig, schedule: Schedule, begin: int) -> _Pair:
    if begin == len(schedule):
        return 1.0, 0.0
    if config.kind in _EULER:
        return 1.0, float(schedule.sigmas[begin])
    if config.kind == "dpm++2m":
        return _alpha_sigma(float(schedule.sigmas[begin]))
    a = float(schedule.alphas_cumprod[int(schedule.timesteps[begin])])
    return math.sqrt(a), math.sqrt(1 - a)


@dataclass(frozen=True)
class _Steps:
    """The steps of a table, from which every sampler makes its rows."""

    config: SamplerConfig
    schedule: Schedule
    begin: int
    end: int
    eta: float

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(index, timestep); whole timesteps."""
        for i in range(self.begin, self.end):
            yield i, int(self.schedule.timesteps[i])

    def alpha_bar(self, t: int) -> float:
        return float(self.schedule.alphas_cumprod[t])

    def next_alpha_bar(self, t: int) -> float:
        """alpha_bar where the step from t ends: `stride` below it, whatever the spacing of timesteps."""
        t_next = t - self.stride
        if t_next >= 0:
            return self.alpha_bar(t_next)
        return 1.0 if self.config.set_alpha_to_one else self.alpha_bar(0)

    @property
    def stride(self) -> int:
        return self.config.num_train_timesteps // self.schedule.num_steps


class _Step(NamedTuple):
    row: StepRow[float]
    draws_noise: bool
    signal_after: float


def _row(
    timestep: float,
    x0: _Pair,
    *,
    scale: float = 1.0,
    clamp: float = math.inf,
    w_x: float = 0.0,
    w_x0: float = 0.0,
    w_out: float = 0.0,
    w_h: tuple[float, float, float] = (0.0, 0.0, 0.0),
    w_noise: float = 0.0,
    log_var: _Pair = (0.0, 0.0),
    keep: float = KEEP_NOTHING,
) -> StepRow[float]:
    """A row; where x0 is neither bounded nor kept, its weight is folded into those of x and the output."""
    if clamp == math.inf and keep != KEEP_X0:
        w_x, w_out, w_x0, x0 = w_x + w_x0 * x0[0], w_out + w_x0 * x0[1], 0.0, (0.0, 0.0)
    return StepRow(timestep, scale, *x0, clamp, w_x, w_x0, w_out, *w_h, w_noise, *log_var, keep)


def _x0_of(prediction: str, signal: float, noise: float) -> _Pair:
    """(p, q) of x0 = p x + q out, for x = signal x0 + noise eps."""
    if prediction == "sample":
        return 0.0, 1.0
    return (1 / signal, -noise / signal) if prediction == "epsilon" else (signal, -noise)


def _eps_of(prediction: str, signal: float, noise: float) -> _Pair:
    """(p, q) of eps = p x + q out, for x = signal x0 + noise eps."""
    if prediction == "epsilon":
        return 0.0, 1.0
    return (1 / noise, -signal / noise) if prediction == "sample" else (noise, signal)


def _alpha_sigma(sigma: float) -> _Pair:
    """VP's weights of signal and noise, whose squares sum to 1, from VE's sigma, which is noise over signal."""
    signal = 1 / math.hypot(sigma, 1)
    return signal, sigma * signal


def _euler(steps: _Steps) -> Iterator[_Step]:
    ancestral = steps.config.kind == "euler-a"
    sigmas = steps.schedule.sigmas
    for i in range(steps.begin, steps.end):
        sigma, sigma_next = float(sigmas[i]), float(sigmas[i + 1])
        up, down = 0.0, sigma_next
        if ancestral:
            down = sigma_next**2 / sigma
            up = math.sqrt(max(sigma_next**2 - down**2, 0.0))
        signal, _ = _alpha_sigma(sigma)
        p, q = _x0_of(steps.config.prediction_type, signal, sigma * signal)
        row = _row(
            float(steps.schedule.timesteps[i]),
            (p * signal, q),  # x is VE: VP latents over their signal
            scale=signal,
            w_x=down / sigma,
            w_x0=1 - down / sigma,
            w_noise=up,
        )
        yield _Step(row, ancestral, _alpha_sigma(sigma_next)[0])


def _ddim(steps: _Steps) -> Iterator[_Step]:
    c = steps.config
    for _, t in steps:
        a, a_next = steps.alpha_bar(t), steps.next_alpha_bar(t)
        signal, noise = math.sqrt(a), math.sqrt(1 - a)
        deviation = steps.eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        direction = math.sqrt(max(1 - a_next - deviation**2, 0.0))
        p, q = _eps_of(c.prediction_type, signal, noise)
        row = _row(
            t,
            _x0_of(c.prediction_type, signal, noise),
            clamp=c.clip,
            w_x=direction * p,
            w_x0=math.sqrt(a_next),
            w_out=direction * q,
            w_noise=deviation,
        )
        yield _Step(row, steps.eta > 0, math.sqrt(a_next))


def _ddpm(steps: _Steps) -> Iterator[_Step]:
    c, timesteps = steps.config, steps.schedule.timesteps
    for i, t in steps:
        a = steps.alpha_bar(t)
        a_next = steps.alpha_bar(int(timesteps[i + 1])) if i + 1 < len(timesteps) else 1.0
        beta = 1 - a / a_next
        small = max((1 - a_next) / (1 - a) * beta, 1e-20)
        w_noise, log_var = 0.0, (0.0, 0.0)
        if t > 0:
            w_noise = math.sqrt(beta if c.variance_type == "fixed_large" else small)
            if c.variance_type == "learned_range":
                w_noise, log_var = 1.0, (math.log(small), math.log(beta))
        row = _row(
            t,
            _x0_of(c.prediction_type, math.sqrt(a), math.sqrt(1 - a)),
            clamp=c.clip,
            w_x=math.sqrt(a / a_next) * (1 - a_next) / (1 - a),
            w_x0=math.sqrt(a_next) * beta / (1 - a),
            w_noise=w_noise,
            log_var=log_var,
        )
        yield _Step(row, t > 0, math.sqrt(a_next))


def _pndm(steps: _Steps) -> Iterator[_Step]:
    """The first step is taken twice: again from where it began, with the mean of both outputs. Starting late (image to
    image) repeats the step at which it starts, as diffusers does, although the schedule has only its first one
    twice."""
    order = 0
    p_first, q_first = 1.0, 0.0
    for i, t in steps:
        if i == steps.begin + 1:
            # The first: x1 = p_first x + q_first out0, so x = (x1 - q_first out0) / p_first. From that x again:
            # w_x x + w_out (out0 + out1) / 2.
            a_next = steps.alpha_bar(t)
            w_x, w_out = _pndm_transfer(steps, t + steps.stride, a_next)
            w_x1 = w_x / p_first
            row = _row(t, (0, 0), w_x=w_x1, w_out=w_out / 2, w_h=(w_out / 2 - w_x1 * q_first, 0, 0))
        else:
            a_next = steps.next_alpha_bar(t)
            w_x, w_out = _pndm_transfer(steps, t, a_next)
            if i == steps.begin:
                p_first, q_first = w_x, w_out
            order = min(order + 1, 4)
            b0, b1, b2, b3 = (w_out * b for b in _ADAMS_BASHFORTH[order])
            row = _row(t, (0, 0), w_x=w_x, w_out=b0, w_h=(b1, b2, b3), keep=KEEP_OUT)
        yield _Step(row, False, math.sqrt(a_next))


def _pndm_transfer(steps: _Steps, t: int, a_next: float) -> _Pair:
    """Weights of x and of the (combined) output in the step from t to where alpha_bar is `a_next`."""
    a = steps.alpha_bar(t)
    signal, noise = math.sqrt(a), math.sqrt(1 - a)
    w_eps = -(a_next - a) / (a * math.sqrt(1 - a_next) + math.sqrt(a * (1 - a) * a_next))
    p, q = _eps_of(steps.config.prediction_type, signal, noise)
    return math.sqrt(a_next / a) + w_eps * p, w_eps * q


def _dpm(steps: _Steps) -> Iterator[_Step]:
    c, sigmas, last = steps.config, steps.schedule.sigmas, len(steps.schedule) - 1
    few = len(steps.schedule) < 15  # diffusers' number
    first_order_last = c.euler_at_final or c.final_sigmas_type == "zero" or (c.lower_order_final and few)
    for i, t in steps:
        sigma, sigma_next = float(sigmas[i]), float(sigmas[i + 1])
        signal, noise = _alpha_sigma(sigma)
        signal_next, noise_next = _alpha_sigma(sigma_next)
        weight = signal_next * (1 - sigma_next / sigma)
        first_order = i == steps.begin or (i == last and first_order_last)
        # 1 / r of the paper: this step's length in log(signal / noise) over that of the one before.
        slope = 0.0 if first_order else math.log(sigma / sigma_next) / math.log(float(sigmas[i - 1]) / sigma)
        row = _row(
            t,
            _x0_of(c.prediction_type, signal, noise),
            w_x=noise_next / noise,
            w_x0=weight * (1 + slope / 2),
            w_h=(-weight * slope / 2, 0, 0),
            keep=KEEP_X0,
        )
        yield _Step(row, False, signal_next)


def _lcm(steps: _Steps) -> Iterator[_Step]:
    c, last = steps.config, len(steps.schedule) - 1
    sigma_data = 0.5
    for i, t in steps:
        a = steps.alpha_bar(t)
        a_next = 1.0 if i == last else steps.alpha_bar(int(steps.schedule.timesteps[i + 1]))
        scaled = t * c.timestep_scaling
        row = _row(
            t,
            _x0_of(c.prediction_type, math.sqrt(a), math.sqrt(1 - a)),
            clamp=c.clip,
            w_x=math.sqrt(a_next) * sigma_data**2 / (scaled**2 + sigma_data**2),  # times c_skip of the paper
            w_x0=math.sqrt(a_next) * scaled / math.hypot(scaled, sigma_data),  # times c_out
            w_noise=math.sqrt(1 - a_next),
        )
        yield _Step(row, i < last, math.sqrt(a_next))


_SAMPLERS: dict[str, Callable[[_Steps], Iterator[_Step]]] = {
    "euler": _euler,
    "euler-a": _euler,
    "ddim": _ddim,
    "ddpm": _ddpm,
    "pndm": _pndm,
    "dpm++2m": _dpm,
    "lcm": _lcm,
}
