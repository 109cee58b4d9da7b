"""The demo's components parsed and built by TensorRT for RTX, dynamic; and builds that are killed or race each other.

The engines are real, and have run nowhere: loading one takes a GPU.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrt.runtime.cache import Store
from latentrt.runtime.cache_contents import contents, verify
from latentrt.runtime.engine_store import EngineTarget, StoredEngine
from latentrt.runtime.loading import load_components
from latentrt.runtime.prepare import engine
from latentrt.runtime.weights import open_checkpoint

# Seconds on two cores to themselves; a machine that is shared takes several times that.
pytestmark = pytest.mark.timeout(900)

ALL_ARCHS = (80, 86, 89, 120)

# In the precisions that tests/export/test_demo.py exports in any case. The VAE stays in float32 beside float16.
CASES = [
    ("demo", "text_encoder", torch.float32, (89,)),
    ("demo", "text_encoder_2", torch.float16, (89,)),
    ("demo", "unet", torch.float16, ALL_ARCHS),
    ("demo", "vae_decoder", torch.float32, (89,)),
    ("demo", "vae_encoder", torch.float32, (89,)),
    ("demo-refiner", "unet", torch.float32, (89,)),
]
REST = [
    ("demo", "text_encoder", torch.float16, (89,)),
    ("demo", "text_encoder_2", torch.float32, (89,)),
    ("demo", "unet", torch.float32, (89,)),
    ("demo-refiner", "unet", torch.float16, (89,)),
    ("demo", "unet", torch.bfloat16, (89,)),
    ("demo", "vae_decoder", torch.bfloat16, (89,)),
    ("demo", "vae_encoder", torch.bfloat16, (89,)),
]


def build(model: str, name: str, dtype: torch.dtype, archs: tuple[int, ...], cache_dir: Path) -> StoredEngine:
    component = load_components(open_checkpoint(model), dtype)[name]
    return engine(component, EngineTarget("tensorrt-rtx", archs), cache_dir=cache_dir)


@pytest.mark.parametrize(
    ("model", "name", "dtype", "archs"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_every_component_is_built(
    exports: Path, model: str, name: str, dtype: torch.dtype, archs: tuple[int, ...]
) -> None:
    made = build(model, name, dtype, archs, exports)
    assert made.plan.stat().st_size == made.figures["engine_bytes"] > 10_000
    assert made.figures["layers"] > 20
    assert made.figures["plugin_layers"] == 0
    (profile,) = made.profiles
    for axis in profile.axes.values():
        assert axis.low < axis.high  # dynamic

    begun = time.process_time()
    again = build(model, name, dtype, archs, exports)
    assert time.process_time() - begun < 1
    assert (again.built, again.key) == (False, made.key)


# --- killed, and at once


def start(model: str | Path, cache: Path) -> subprocess.Popen[str]:
    command = ["build", str(model), "--engine", "tensorrt-rtx", "--arch", "sm_89", "--dtype", "float32"]
    return subprocess.Popen(
        [sys.executable, "-m", "latentrt.cli", *command, "--component", "vae_decoder", "--json"],
        env={**os.environ, "LATENTRT_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it built or found; it must have succeeded."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    (row,) = json.loads(out)
    return row


def kinds(cache: Path) -> list[str]:
    return sorted(str(entry.description["kind"]) for entry in contents(Store(cache)))


@pytest.mark.full
def test_two_processes_build_once(tmp_path: Path) -> None:
    rows = [finish(process) for process in [start("demo", tmp_path), start("demo", tmp_path)]]
    assert sorted(row["built"] for row in rows) == [False, True]
    assert rows[0]["key"] == rows[1]["key"]
    assert kinds(tmp_path) == ["engine", "onnx"]


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_20_times(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """While it loads, exports, checks, builds or writes: nothing damaged stays, and the next run succeeds."""
    model = tiny("sdxl")
    begun = time.monotonic()
    finish(start(model, tmp_path / "whole"))
    whole = time.monotonic() - begun
    draw = random.Random(0)
    left = set()
    for k in range(20):
        cache = tmp_path / str(k)
        process = start(model, cache)
        time.sleep(draw.uniform(0.2, 1) * whole)  # before that it imports
        process.kill()
        process.communicate()
        left.add(tuple(kinds(cache)))
        assert verify(Store(cache)) == {}
        finish(start(model, cache))
        assert verify(Store(cache)) == {}
        assert kinds(cache) == ["engine", "onnx"]
        assert list((cache / "partial").iterdir()) == []
        shutil.rmtree(cache)
    assert len(left) > 1  # they were not all killed in the same place
