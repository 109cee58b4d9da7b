"""`runtime/graph_cache.py` in whole pipelines: which captured graphs are stored, and how much memory they may take."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import latentrt
import numpy as np
import pytest
from helpers.pipeline_insides import graph_cache_of
from helpers.tiny_requests import SEEDED_CALL
from latentrt.runtime import budget
from latentrt.runtime.graph_cache import DEFAULT_LIMIT

Load = Callable[..., latentrt.Pipeline]


def test_a_warm_up_of_more_than_may_be_kept_says_so(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    pipe = load(graphs=True, loop_memory="1GB")
    with caplog.at_level(logging.WARNING, "latentrt"):
        pipe.warmup([(32, 32)], sampler="euler-a")
        assert not caplog.messages
        graph_cache_of(pipe).limit = room = graph_cache_of(pipe).nbytes
        pipe.warmup([(40, 32)], sampler="euler-a")
    assert 0 < graph_cache_of(pipe).nbytes <= room
    assert re.search(
        r"\d+ graphs were evicted again \([\d.]+ [kM]B stored, limit [\d.]+ [kM]B\); .* raise loop_memory=$",
        caplog.messages[-1],
    )


def test_how_much_may_be_kept_can_be_said(load: Load) -> None:
    assert graph_cache_of(load(loop_memory="5MB")).limit == 5_000_000
    assert graph_cache_of(load()).limit == DEFAULT_LIMIT


def test_more_than_eight_kinds_are_kept_where_there_is_room(load: Load, captures: list[str]) -> None:
    pipe = load(graphs=True)
    alone = {"num_inference_steps": 1, "high_noise_frac": 1.0, "guidance_scale": 1.0, "output_type": "latent"}
    kinds = [{**SEEDED_CALL, **alone, "height": 8 * k, "width": 32} for k in range(4, 13)]
    for kind in kinds:
        pipe(**kind)
    assert sum("unet" in what for what in captures) == len(kinds)
    captures.clear()
    for kind in kinds:
        pipe(**kind)
    assert captures == []


def test_what_cannot_be_kept_is_not_recorded_but_for_the_steps_of_a_loop(
    load: Load, image_of_call: Any, captures: list[str]
) -> None:
    """Text and pictures would be recorded anew at each call."""
    pipe = load(graphs=True, loop_memory=0)
    for _ in range(2):
        assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)
        assert captures == ["a denoising step of unet"] * 2  # the base's and the refiner's
        assert len(graph_cache_of(pipe)) == 0
        captures.clear()


def test_a_plan_says_how_much_may_be_kept(load: Load, between: int) -> None:
    pipe = load(memory_limit=between, graphs=True)
    pipe(**SEEDED_CALL)
    planned = pipe._budget.planner.plan(height=64, width=48, sampler="euler-a", high_noise_frac=0.5)
    room = between - planned.peak("resident") + planned.buffer_bytes
    assert graph_cache_of(pipe).limit == room
    assert 0 < graph_cache_of(pipe).nbytes <= room


def test_the_graph_cache_limit_follows_the_current_device(
    load: Load, between: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a pipeline that moved to the CPU."""
    free: list[int | None] = [between]
    monkeypatch.setattr(budget, "free_memory", lambda _: free[0])
    pipe = load()
    pipe(**SEEDED_CALL)
    assert graph_cache_of(pipe).limit < between
    free[0] = None
    pipe(**SEEDED_CALL)
    assert graph_cache_of(pipe).limit == DEFAULT_LIMIT
