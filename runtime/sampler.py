"""Samplers as coefficient tables, computed in float64 before the loop.

    config = SamplerConfig.from_dict(scheduler_config)            # what the checkpoint says
    begin, end = step_range(config, 30, denoising_end=0.8)        # which steps of the schedule
    table = build_table(config, 30, begin=begin, end=end)         # one row of coefficients for each

What a row means is `latentrt.kernels.sampler_step`. With a_t the share of the signal's variance left at step
t (alphas_cumprod) and sigma_t = sqrt((1 - a_t) / a_t), the formulas are those of

    euler       Karras et al. (2022), algorithm 1 without churn: x' = x + (sigma' - sigma) (x - x0) / sigma
    euler-a     the same with ancestral noise, as in k-diffusion's sample_euler_ancestral
    ddim        Song et al. (2020), equations 12 and 16
    ddpm        Ho et al. (2020), equation 7; learned variance: Nichol and Dhariwal (2021), equation 15
    pndm        Liu et al. (2022), equations 9 and 12: linear multistep after one Heun-like step
    dpm++2m     Lu et al., DPM-Solver++ (2022), algorithm 2 and its first-order step
    lcm         Luo et al. (2023), algorithm 3

in the details (which level follows the last step, what is rounded) those of diffusers' schedulers, the oracle
of the tests. Where nothing bounds x0, its weight is folded into those of x and of the model's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import RequestError
from ..kernels.sampler_step import COLUMNS, KEEP_NOTHING, KEEP_OUT, KEEP_X0, StepRow
from .sampler_config import SAMPLERS, SamplerConfig
from .schedule import Schedule, make_schedule, step_range

__all__ = ["SAMPLERS", "SamplerConfig", "SamplerTable", "build_table", "step_range"]

_Pair = tuple[float, float]

_EULER = ("euler", "euler-a")
_WEIGHTS = slice(StepRow._fields.index("w_x"), StepRow._fields.index("w_noise") + 1)
"""The columns whose sum of products the next latents are."""


@dataclass(frozen=True)
class SamplerTable:
    """The steps `begin` to `end` of a schedule.

    Attributes:
        rows: float64 [N, COLUMNS] on the CPU; columns are `latentrt.kernels.sampler_step.StepRow`.
        draws_noise: for each step, whether noise is drawn for it; its weight can still be zero.
        uses_history: whether earlier steps are looked back on.
        predicts_variance: whether the model's output has its variance in the second half of its channels.
        init_noise_sigma: initial latents are standard normal noise times this.
        add_noise: weights (of the latents, of the noise) that bring clean latents to the level of step
            `begin`.
        unit_variance: whether latents are a x0 + s eps with a^2 + s^2 = 1, and not x0 + (s / a) eps, as Euler's are.
        last_signal: that a after the last step.
    """

    rows: Tensor
    draws_noise: tuple[bool, ...]
    uses_history: bool
    predicts_variance: bool
    init_noise_sigma: float
    add_noise: tuple[float, float]
    unit_variance: bool
    last_signal: float

    def __len__(self) -> int:
        return len(self.draws_noise)

    @property
    def timesteps(self) -> list[float]:
        """What the model is told at each step."""
        column: list[float] = self.rows[:, 0].tolist()
        return column

    def handing_over_to(self, following: SamplerTable) -> SamplerTable:
        """The same steps, the last of which leaves the latents as another table's sampler scales them."""
        if following.unit_variance == self.unit_variance:
            return self
        rows = self.rows.clone()
        rows[-1, _WEIGHTS] *= self.last_signal if following.unit_variance else 1 / self.last_signal
        return replace(self, rows=rows)

    def on(self, device: torch.device) -> Tensor:
        """The rows where the loop needs them, rounded once to float32."""
        return self.rows.to(device=device, dtype=torch.float32)


def build_table(
    config: SamplerConfig, num_steps: int, *, begin: int = 0, end: int | None = None, eta: float = 0.0
) -> SamplerTable:
    """The coefficients of steps `begin` to `end` of a schedule of `num_steps`.

    Samplers that look back start afresh at `begin`, as a refiner's own scheduler does.

    Args:
        begin, end: from `step_range`; equal for no steps, None for the last.
        eta: share of DDPM's noise that DDIM adds, in [0, 1]; the other samplers do not know it.

    Raises:
        RequestError: no such schedule, range or eta.
    """
    if not 0 <= eta <= 1:
        raise RequestError(f"eta is {eta}; it must be from 0 to 1")
    schedule = make_schedule(config, num_steps)
    end = len(schedule) if end is None else end
    if not 0 <= begin <= end <= len(schedule):
        raise RequestError(f"steps {begin} to {end} were asked for; the schedule has {len(schedule)}")
    run = _Run(config, schedule, begin, end, eta)
    steps = list(_SAMPLERS[config.kind](run))
    rows = torch.tensor([row for row, _ in steps], dtype=torch.float64, device="cpu").reshape(-1, COLUMNS)
    return SamplerTable(
        rows=rows,
        draws_noise=tuple(drawn for _, drawn in steps),
        uses_history=config.kind in ("pndm", "dpm++2m"),
        predicts_variance=config.kind == "ddpm" and config.variance_type == "learned_range",
        init_noise_sigma=_init_noise_sigma(config, schedule),
        add_noise=_add_noise(config, schedule, begin),
        unit_variance=config.kind not in _EULER,
        last_signal=_last_signal(run),
    )


def _init_noise_sigma(config: SamplerConfig, schedule: Schedule) -> float:
    if config.kind not in _EULER:
        return 1.0
    highest = float(schedule.sigmas.max())
    # "leading" stops short of pure noise, and noise is added to the signal's variance of 1.
    return math.hypot(highest, 1) if config.timestep_spacing == "leading" else highest


def _add_noise(config: SamplerConfig, schedule: Schedule, begin: int) -> _Pair:
    if begin == len(schedule):
        return 1.0, 0.0
    if config.kind in _EULER:
        return 1.0, float(schedule.sigmas[begin])
    if config.kind == "dpm++2m":
        return _signal_noise(float(schedule.sigmas[begin]))
    a = float(schedule.alphas_cumprod[int(schedule.timesteps[begin])])
    return math.sqrt(a), math.sqrt(1 - a)


@dataclass(frozen=True)
class _Run:
    """What every sampler's rows are made from."""

    config: SamplerConfig
    schedule: Schedule
    begin: int
    end: int
    eta: float

    def steps(self) -> Iterator[tuple[int, int]]:
        """(index, timestep); whole timesteps."""
        for i in range(self.begin, self.end):
            yield i, int(self.schedule.timesteps[i])

    def level(self, t: int) -> float:
        """a_t."""
        return float(self.schedule.alphas_cumprod[t])

    def level_after(self, t: int) -> float:
        """a at the timestep before t, which lies `stride` below whatever the spacing."""
        before = t - self.stride
        if before >= 0:
            return self.level(before)
        return 1.0 if self.config.set_alpha_to_one else self.level(0)

    @property
    def stride(self) -> int:
        return self.config.num_train_timesteps // self.schedule.num_steps


def _last_signal(run: _Run) -> float:
    """The signal's weight in latents of unit variance at the level after the last step; 1 where there is none."""
    kind, end, timesteps = run.config.kind, run.end, run.schedule.timesteps
    if run.begin == end:
        return 1.0
    if len(run.schedule.sigmas):
        return _signal_noise(float(run.schedule.sigmas[end]))[0]
    if kind in ("ddpm", "lcm"):
        return math.sqrt(run.level(int(timesteps[end]))) if end < len(timesteps) else 1.0
    t = int(timesteps[end - 1])
    # PNDM's second step repeats the first and ends at the same level.
    repeats = kind == "pndm" and end - 1 == run.begin + 1
    return math.sqrt(run.level(t) if repeats else run.level_after(t))


_Step = tuple["StepRow[float]", bool]


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
    """A row, with x0's weight folded away where x0 is neither bounded nor kept."""
    if clamp == math.inf and keep != KEEP_X0:
        w_x, w_out, w_x0, x0 = w_x + w_x0 * x0[0], w_out + w_x0 * x0[1], 0.0, (0.0, 0.0)
    return StepRow(timestep, scale, *x0, clamp, w_x, w_x0, w_out, *w_h, w_noise, *log_var, keep)


def _x0_of(prediction: str, signal: float, noise: float) -> _Pair:
    """x0 = p x + q out, for x = signal x0 + noise eps."""
    if prediction == "sample":
        return 0.0, 1.0
    return (1 / signal, -noise / signal) if prediction == "epsilon" else (signal, -noise)


def _eps_of(prediction: str, signal: float, noise: float) -> _Pair:
    """eps = p x + q out, for x = signal x0 + noise eps."""
    if prediction == "epsilon":
        return 0.0, 1.0
    return (1 / noise, -signal / noise) if prediction == "sample" else (noise, signal)


def _signal_noise(sigma: float) -> _Pair:
    """(alpha, sigma) of unit variance together, from their quotient."""
    signal = 1 / math.hypot(sigma, 1)
    return signal, sigma * signal


def _euler(run: _Run) -> Iterator[_Step]:
    ancestral = run.config.kind == "euler-a"
    sigmas = run.schedule.sigmas
    for i in range(run.begin, run.end):
        sigma, following = float(sigmas[i]), float(sigmas[i + 1])
        up, down = 0.0, following
        if ancestral:
            down = following**2 / sigma
            up = math.sqrt(max(following**2 - down**2, 0.0))
        signal, _ = _signal_noise(sigma)
        p, q = _x0_of(run.config.prediction_type, signal, sigma * signal)
        row = _row(
            float(run.schedule.timesteps[i]),
            (p * signal, q),  # x is the unit-variance latents over their signal
            scale=signal,
            w_x=down / sigma,
            w_x0=1 - down / sigma,
            w_noise=up,
        )
        yield row, ancestral


def _ddim(run: _Run) -> Iterator[_Step]:
    c = run.config
    for _, t in run.steps():
        a, a_next = run.level(t), run.level_after(t)
        signal, noise = math.sqrt(a), math.sqrt(1 - a)
        deviation = run.eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
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
        yield row, run.eta > 0


def _ddpm(run: _Run) -> Iterator[_Step]:
    c, timesteps = run.config, run.schedule.timesteps
    for i, t in run.steps():
        a = run.level(t)
        a_next = run.level(int(timesteps[i + 1])) if i + 1 < len(timesteps) else 1.0
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
        yield row, t > 0


def _pndm(run: _Run) -> Iterator[_Step]:
    """The first step is taken twice: the second time from where it began, which is solved for from its result
    and its output, with the mean of both outputs. Starting late (image to image) repeats that wherever it
    starts, as diffusers does, although the schedule has the doubled timestep at its beginning only."""
    multistep = {
        1: (1.0,),
        2: (3 / 2, -1 / 2),
        3: (23 / 12, -16 / 12, 5 / 12),
        4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    }
    kept = 0
    w_first = (1.0, 0.0)
    for i, t in run.steps():
        if i == run.begin + 1:
            w_x, w_out = _pndm_transfer(run, t + run.stride, run.level(t))
            back = w_x / w_first[0]
            row = _row(t, (0, 0), w_x=back, w_out=w_out / 2, w_h=(w_out / 2 - back * w_first[1], 0, 0))
            yield row, False
            continue
        w_x, w_out = _pndm_transfer(run, t, run.level_after(t))
        if i == run.begin:
            w_first = w_x, w_out
        kept = min(kept + 1, 4)
        latest, *earlier = [w_out * m for m in (*multistep[kept], 0.0, 0.0, 0.0)]
        w_h = (earlier[0], earlier[1], earlier[2])
        yield _row(t, (0, 0), w_x=w_x, w_out=latest, w_h=w_h, keep=KEEP_OUT), False


def _pndm_transfer(run: _Run, t: int, a_next: float) -> _Pair:
    """Weights of x and of the (combined) output in the step from t to the level `a_next`."""
    a = run.level(t)
    signal, noise = math.sqrt(a), math.sqrt(1 - a)
    w_eps = -(a_next - a) / (a * math.sqrt(1 - a_next) + math.sqrt(a * (1 - a) * a_next))
    p, q = _eps_of(run.config.prediction_type, signal, noise)
    return math.sqrt(a_next / a) + w_eps * p, w_eps * q


def _dpm(run: _Run) -> Iterator[_Step]:
    c, sigmas, last = run.config, run.schedule.sigmas, len(run.schedule) - 1
    for i, t in run.steps():
        sigma, following = float(sigmas[i]), float(sigmas[i + 1])
        signal, noise = _signal_noise(sigma)
        signal_next, noise_next = _signal_noise(following)
        weight = signal_next * (1 - following / sigma)
        careful = c.euler_at_final or c.final_sigmas_type == "zero" or (c.lower_order_final and last < 14)
        first_order = i == run.begin or (i == last and careful)
        # 1 / r of the paper: this step's length in log(signal / noise) over that of the one before.
        slope = 0.0 if first_order else math.log(sigma / following) / math.log(float(sigmas[i - 1]) / sigma)
        row = _row(
            t,
            _x0_of(c.prediction_type, signal, noise),
            w_x=noise_next / noise,
            w_x0=weight * (1 + slope / 2),
            w_h=(-weight * slope / 2, 0, 0),
            keep=KEEP_X0,
        )
        yield row, False


def _lcm(run: _Run) -> Iterator[_Step]:
    c, last = run.config, len(run.schedule) - 1
    sigma_data = 0.5
    for i, t in run.steps():
        a = run.level(t)
        a_next = 1.0 if i == last else run.level(int(run.schedule.timesteps[i + 1]))
        scaled = t * c.timestep_scaling
        row = _row(
            t,
            _x0_of(c.prediction_type, math.sqrt(a), math.sqrt(1 - a)),
            clamp=c.clip,
            w_x=math.sqrt(a_next) * sigma_data**2 / (scaled**2 + sigma_data**2),
            w_x0=math.sqrt(a_next) * scaled / math.hypot(scaled, sigma_data),
            w_noise=math.sqrt(1 - a_next),
        )
        yield row, i < last


_SAMPLERS: dict[str, Callable[[_Run], Iterator[_Step]]] = {
    "euler": _euler,
    "euler-a": _euler,
    "ddim": _ddim,
    "ddpm": _ddpm,
    "pndm": _pndm,
    "dpm++2m": _dpm,
    "lcm": _lcm,
}
