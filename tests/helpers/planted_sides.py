"""Sides of the benchmark with planted faults, so that the instrument can be held against what is known of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrt.bench.cases import Case, SideSpec
from latentrt.bench.latentrt_side import LatentrtSide
from latentrt.bench.latentrt_side import open_side as open_latentrt
from latentrt.bench.monitor import Span
from latentrt.bench.results import CaseResult, Row
from latentrt.bench.side import Layout, Side, SideOutput
from latentrt.runtime.engines.base import Component
from latentrt.runtime.engines.eager import EagerBackend, EagerEngine
from latentrt.runtime.pipeline import Pipeline
from torch import Tensor

SIZE = 32
STEPS = 5
CASE = Case("planted", "nothing real", "none", steps=STEPS)


class PlantedSide(Side):
    """Draws the same smooth picture for a seed as every other one, and takes the time it is told to."""

    def __init__(
        self,
        case: Case,
        *,
        step_seconds: float = 0.0,
        leak_bytes: int = 0,
        spike_bytes: int = 0,
        wrong_from: int | None = None,
        dies_at: int | None = None,
        fails_at: int | None = None,
        tuning_seconds: float = 0.0,
        hangs_at: int | None = None,
        busy_at: int | None = None,
        child: str | None = None,
        reverses: bool = False,
        nan: bool = False,
        note: str | None = None,
        tells: Sequence[str] = (),
    ) -> None:
        self.settings = "|".join(os.environ[name] for name in tells) or "planted"
        self._note = note
        self._case = case
        self._step_seconds = step_seconds
        self._leak_bytes = leak_bytes
        self._spike_bytes = spike_bytes
        self._wrong_from = wrong_from
        self._dies_at = dies_at
        self._fails_at = fails_at
        self._tuning_seconds = tuning_seconds
        self._hangs_at = hangs_at
        self._busy_at = busy_at
        self._child = child
        self._reverses = reverses
        self._nan = nan
        self._calls = 0
        self._kept: list[bytes] = []

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> SideOutput:
        call, self._calls = self._calls, self._calls + 1
        if self._note is not None:
            with open(self._note, "a") as stream:
                stream.write(".")
        if call == self._fails_at:
            raise RuntimeError("planted \x1b[96mfailure\nand a long explanation")
        if call == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if call == self._hangs_at:
            with subprocess.Popen(["sleep", "1000"]) as child:
                Path(self._child or "").write_text(str(child.pid))
        if call == self._busy_at:
            Path(self._note or "").write_text("b")
            while True:  # not waiting for anything, as on a GPU
                torch.ones(1 << 16).sum()
        begun = time.perf_counter()
        for _ in range(self._case.steps):
            time.sleep(self._step_seconds)
        stepped = time.perf_counter()
        if self._spike_bytes:
            spike = b"\1" * self._spike_bytes
            for _ in range(40):  # so that whoever samples has its chance on a loaded machine
                time.sleep(0.01)
            del spike
        self._kept.append(b"\1" * self._leak_bytes)
        wrong = self._wrong_from is not None and call >= self._wrong_from
        images = np.stack([_picture(seed + 7 * wrong) for seed in (seeds[::-1] if self._reverses else seeds)])
        if self._nan:
            images[:] = np.nan
        end = time.perf_counter()
        return SideOutput(images, [Span("base", begun, stepped), Span("decode", stepped, end)])

    def tune(self, layout: Layout | None = None) -> None:
        time.sleep(self._tuning_seconds)
        self.layout = layout or {"UNet": "channels_last", "VAE": "contiguous"}
        self.settings = "planted and tuned"

    def close(self) -> None:
        self._kept.clear()


def _picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).random((4, 4, 3), dtype=np.float32)
    return np.kron(coarse, np.ones((SIZE // 4, SIZE // 4, 1), np.float32))


def open_planted(
    case: Case, device: torch.device, dtype: torch.dtype, folder: Path, **options: Any
) -> PlantedSide:
    return PlantedSide(case, **options)


def planted(name: str, **options: Any) -> SideSpec:
    """The side of a benchmark that has a planted fault: `planted("slow", step_seconds=0.02)`."""
    return SideSpec(name, "planted", "helpers.planted_sides:open_planted", options)


def rows(result: CaseResult) -> dict[str, Row]:
    """A result's rows, by the name of their side."""
    return {row.side: row for row in result.rows}


def open_backend(case: Case, *place: Any, backend: str) -> PlantedSide:
    """A planted side that takes what a side of latentrt's back ends takes."""
    return PlantedSide(case)


class WrongSampler:
    """A pipeline that takes DPM++ 2M's steps where Euler's were asked for."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pipe(*args, sampler="dpm++2m", **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def open_wrong_sampler(case: Case, *args: Any, **options: Any) -> LatentrtSide:
    side = open_latentrt(case, *args, **options)
    return LatentrtSide(case, WrongSampler(side._pipe))


class QuickUNet(EagerEngine):
    """Predicts nothing, in no time but what it is told to take."""

    seconds = 0.0

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        return {"prediction": torch.zeros_like(inputs["sample"])}


class SlowUNet(QuickUNet):
    seconds = 0.020


class QuickBackend(EagerBackend):
    name = "quick"
    unet = QuickUNet

    def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> EagerEngine:
        kind = self.unet if component.name == "unet" else EagerEngine
        return kind(component, device)


class SlowBackend(QuickBackend):
    name = "slow"
    unet = SlowUNet
