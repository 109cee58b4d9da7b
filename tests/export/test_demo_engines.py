"""`runtime/prepare.py` and `export/engines.py`: the demo's components parsed and built by TensorRT for RTX, dynamic,
with plugins and without; and builds that are killed or race each other.

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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from latentrt.runtime.cache import Store
from latentrt.runtime.cache_contents import contents, verify
from latentrt.runtime.engine_store import EngineTarget
from latentrt.runtime.engines import plugins
from latentrt.runtime.engines.base import Component
from latentrt.runtime.loading import load_components
from latentrt.runtime.prepare import find_or_build_engine, find_or_export_onnx
from latentrt.runtime.weights import open_checkpoint

# Seconds on two cores to themselves; a machine that is shared takes several times that.
pytestmark = pytest.mark.timeout(900)

ALL_ARCHS = (80, 86, 89, 120)
ONE = (89,)

# In the precisions that tests/export/test_export_demo.py exports in any case. The VAE stays in float32 beside float16.
CASES = [
    ("demo", "text_encoder", torch.float32, ONE, "all"),
    ("demo", "text_encoder_2", torch.float16, ONE, "all"),
    ("demo", "unet", torch.float16, ONE, "all"),
    ("demo", "unet", torch.float16, ALL_ARCHS, "none"),
    ("demo", "vae_decoder", torch.float32, ONE, "all"),
    ("demo", "vae_encoder", torch.float32, ONE, "all"),
    ("demo-refiner", "unet", torch.float32, ONE, "all"),
]
REST = [
    ("demo", "text_encoder", torch.float16, ONE, "none"),
    ("demo", "text_encoder_2", torch.float32, ONE, "none"),
    ("demo", "unet", torch.float32, ONE, "none"),
    ("demo", "unet", torch.float16, ALL_ARCHS, "all"),
    ("demo", "unet", torch.float16, ONE, "DotProductAttention"),
    ("demo-refiner", "unet", torch.float16, ONE, "none"),
    ("demo", "unet", torch.bfloat16, ONE, "none"),
    ("demo", "unet", torch.bfloat16, ONE, "all"),
    ("demo", "vae_decoder", torch.float32, ONE, "none"),
    ("demo", "vae_encoder", torch.float32, ONE, "none"),
    ("demo", "vae_decoder", torch.bfloat16, ONE, "none"),
    ("demo", "vae_encoder", torch.bfloat16, ONE, "none"),
]


def asked(
    model: str, name: str, dtype: torch.dtype, archs: tuple[int, ...], with_plugins: str
) -> tuple[Component, EngineTarget]:
    target = EngineTarget(
        "tensorrt-rtx", archs, plugins=plugins.versions(plugins.parse_plugins(with_plugins))
    )
    return load_components(open_checkpoint(model), dtype)[name], target


def nodes(model: str, name: str, dtype: torch.dtype, cache_dir: Path) -> Counter[str]:
    """How many nodes of each type a component has."""
    component = load_components(open_checkpoint(model), dtype)[name]
    graph = onnx.load(find_or_export_onnx(component, cache_dir=cache_dir), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize(
    ("model", "name", "dtype", "archs", "with_plugins"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_every_component_is_built(
    shared_export_cache: Path,
    model: str,
    name: str,
    dtype: torch.dtype,
    archs: tuple[int, ...],
    with_plugins: str,
) -> None:
    made = find_or_build_engine(
        *asked(model, name, dtype, archs, with_plugins), cache_dir=shared_export_cache
    )
    assert made.plan.stat().st_size == made.figures["engine_bytes"] > 10_000
    assert made.figures["layers"] > 20
    (profile,) = made.profiles
    for axis in profile.axes.values():
        assert axis.low < axis.high  # dynamic

    # Every node of an operator whose plugin is on became one, and TensorRT called each of them.
    names, has = plugins.parse_plugins(with_plugins), nodes(model, name, dtype, shared_export_cache)
    assert made.figures["plugin_layers"] == sum(has[plugin] for plugin in names)
    assert sorted(made.figures["plugins"]) == sorted(names)
    for plugin, calls in made.figures["plugins"].items():
        assert calls.get("created", 0) == has[plugin]
        assert calls.get("configured", 0) >= has[plugin]
        assert calls.get("serialized", 0) >= has[plugin]
    if "text" not in name and with_plugins == "all":
        assert made.figures["plugin_layers"] > 10

    component, target = asked(model, name, dtype, archs, with_plugins)
    again = find_or_build_engine(component, target, cache_dir=shared_export_cache)
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
