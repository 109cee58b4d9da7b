"""The training loop shared by all stages: a budget of minutes, checkpoints and resume.

A stage's learning rate and any other schedule follow its progress, the used share of its minutes, so that the
same recipe fits a slow CPU and a GPU. A stage killed at any time goes on from its last checkpoint.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ...errors import RequestError

console = Console()
SAVE_EVERY = 90.0  # seconds


@dataclass
class Run:
    """What every stage needs to know."""

    out: Path
    seed: int
    device: torch.device
    minutes: dict[str, float] = field(default_factory=dict)
    examples: int = 30_000
    batch: int = 32  # of the UNets
    workers: int = 1  # threads that share a UNet's batch

    def batch_of(self, cpu: int) -> int:
        """A stage's batch: as given on a CPU, four times that on a GPU."""
        return cpu if self.device.type == "cpu" else 4 * cpu

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU, nothing on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


@dataclass
class Stage:
    """One model in training: what to save, and the function that does a step.

    `step(progress, generator)` returns figures to show; the stage's state is the modules' and optimiser's.
    `made_from` is what it is trained on was made from, where that is latents and text embeddings.
    """

    name: str
    modules: dict[str, torch.nn.Module]
    optimiser: torch.optim.Optimizer
    step: Callable[[float, torch.Generator], dict[str, float]]
    peak_rate: float
    warm_up: float = 0.02
    ema: dict[str, Ema] = field(default_factory=dict)
    on_report: Callable[[int], None] | None = None
    report_every: float = 180.0
    made_from: dict[str, Any] = field(default_factory=dict)


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.source = list(module.parameters())
        self.average = [parameter.detach().clone() for parameter in self.source]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.source], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average inside this context."""
        present = [parameter.detach().clone() for parameter in self.source]
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(present)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.source, values, strict=True):
            parameter.copy_(value)


def rate_at(progress: float, warm_up: float) -> float:
    """Linear warm-up, then cosine to 1 % of the peak."""
    if progress < warm_up:
        return (progress + 1e-4) / (warm_up + 1e-4)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def checkpoint_of(out: Path, stage: str) -> Path:
    """Where a stage's state is kept."""
    return out / "checkpoints" / f"{stage}.pt"


def read_checkpoint(run: Run, stage: str) -> dict[str, Any] | None:
    """A stage's state, where it was begun.

    Raises:
        RequestError: it was with another seed.
    """
    path = checkpoint_of(run.out, stage)
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("seed", run.seed) != run.seed:
        raise RequestError(
            f"{path} was begun with seed {state['seed']}, and this is seed {run.seed}; give that one, or another --out"
        )
    return state


def train(run: Run, stage: Stage) -> None:
    """Run the stage until its minutes are used, resuming where an earlier call stopped; from the beginning where that
    one was trained on something else, whose checkpoint is then kept as `.old`.

    Raises:
        RequestError: that call had another seed.
    """
    budget = 60.0 * run.minutes[stage.name]
    path = checkpoint_of(run.out, stage.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    steps, used = 0, 0.0
    generator = torch.Generator().manual_seed(run.seed)
    state = read_checkpoint(run, stage.name)
    if state is not None and state.get("made_from", {}) != stage.made_from:
        before = path.replace(path.with_suffix(".old"))
        console.log(
            f"{stage.name}: begun anew; what was trained on other latents or text encoders is in {before}"
        )
        state = None
    if state is not None:
        _restore(state, stage, generator)
        steps, used = int(state["steps"]), float(state["used"])
        console.log(f"{stage.name}: resumed at step {steps}, {used / 60:.1f} minutes in")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    averages: dict[str, float] = {}
    saved = reported = logged = last = time.monotonic()
    with Progress(*columns, console=console, refresh_per_second=0.5) as bar:  # redrawing costs a busy core
        task = bar.add_task(stage.name, total=budget, completed=round(used), note="")
        while used < budget:
            progress = min(1.0, used / budget)
            for group in stage.optimiser.param_groups:
                group["lr"] = stage.peak_rate * rate_at(progress, stage.warm_up) * group.get("scale", 1.0)
            figures = stage.step(progress, generator)
            for ema in stage.ema.values():
                ema.update()
            steps += 1
            for key, value in figures.items():
                averages[key] = averages.get(key, value) * 0.98 + value * 0.02
            now = time.monotonic()
            used, last = used + now - last, now
            note = " ".join(f"{key} {value:.4f}" for key, value in averages.items())
            bar.update(task, completed=used, note=f"step {steps} {note}")
            if now - logged > 30:
                logged = now
                console.log(f"{stage.name} {used / 60:.1f} min, step {steps}, {note}")
            if now - saved > SAVE_EVERY:
                saved = now
                _save(path, stage, generator, steps, used, run.seed)
            if stage.on_report is not None and now - reported > stage.report_every:
                stage.on_report(steps)
                reported = last = time.monotonic()
    _save(path, stage, generator, steps, used, run.seed)


def _save(path: Path, stage: Stage, generator: torch.Generator, steps: int, used: float, seed: int) -> None:
    state = {
        "modules": {key: module.state_dict() for key, module in stage.modules.items()},
        "optimiser": stage.optimiser.state_dict(),
        "ema": {key: (ema.average, ema.updates) for key, ema in stage.ema.items()},
        "generator": generator.get_state(),
        "steps": steps,
        "used": used,
        "seed": seed,
        "made_from": stage.made_from,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _restore(state: dict[str, Any], stage: Stage, generator: torch.Generator) -> None:
    for key, module in stage.modules.items():
        module.load_state_dict(state["modules"][key])
    stage.optimiser.load_state_dict(state["optimiser"])
    for key, ema in stage.ema.items():
        average, ema.updates = state["ema"][key]
        for value, saved in zip(ema.average, average, strict=True):
            value.copy_(saved)
    generator.set_state(state["generator"])
