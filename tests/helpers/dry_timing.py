"""A small operator, a timer that needs no GPU, and the clocks of one, for tests of measuring and tuning kernels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latentrt.kernels import tuning
from latentrt.kernels.registry import Case, OpSpec, specs

__all__ = [
    "ATTENTION",
    "BF16",
    "FALLEN",
    "FIRST",
    "SECOND",
    "SMALL",
    "SMALL_WIDE",
    "SimulatedGpu",
    "fake_timer",
    "small_attention",
]

BF16 = [torch.bfloat16]
ATTENTION = specs(["attention"])[0]
SMALL = [
    {"BLOCK_M": 16, "BLOCK_N": n, "num_warps": 4, "num_stages": 1} for n in (48, 16, 32)
]  # 48 cannot be compiled
SMALL_WIDE = [{**small, "BLOCK_D": 64, "BLOCK_V": 64} for small in SMALL]
FIRST, SECOND = "attention, one", "attention, two"
FALLEN = "neither a kernel of ours ran nor the libraries in its place"


def small_attention(**changes: Any) -> OpSpec:
    """Attention with two cases of 20 rows; `changes` of its fields."""

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        return torch.randn(1, 20, 3, 1, 64, dtype=dtype, device=device).unbind(2)

    def fails(*_: object) -> None:
        raise RuntimeError("no such back end")

    # The second is called so often that it is the greater part of a forward.
    fields = {
        **vars(ATTENTION),
        "cases": [Case(name, inputs, 1e6, 5120, calls) for name, calls in (("one", 1), ("two", 3))],
        "candidates": {"attention_wide": SMALL_WIDE, "attention": SMALL},
        "baselines": {"itself": ATTENTION.reference, "broken": fails},
        **changes,
    }
    return OpSpec(**fields)


def fake_timer(
    calls: Mapping[str, Callable[..., Any]], inputs: Sequence[tuple[Any, ...]], seconds: float
) -> dict[str, float | str]:
    """Runs each once; blocks of 32 are the quickest. Of several candidates each is named by its constants."""
    tried = next((c for name, c, _ in tuning._trials if name == "attention"), {})
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        trial = json.loads(name) if name.startswith("{") else tried
        try:
            for args in inputs:
                call(*args)
            found[name] = 10.0 if trial.get("BLOCK_N") == 32 else 19.0
        except RuntimeError as error:
            found[name] = f"RuntimeError: {error}"
    return found


class SimulatedGpu:
    """Clocks of a host and a device in microseconds, in the place of what `kernel_timing` calls in `torch.cuda`.

    Whatever is launched starts when the host has launched it and the device is done with what came before. The first
    launch of a graph takes both of them longer.
    """

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.recording: list[float] | None = None
        self.rounds: list[list[float]] = []
        """Microseconds of the graphs, in the order of their replays, after each sleep."""
        self.left: list[Any] = []
        """What a capture that failed set back."""

    def kernel(self, us: float) -> None:
        """A call of so many microseconds."""
        if self.recording is None:
            self.launch(us)
        else:
            self.recording.append(us)

    def launch(self, us: float, host_us: float = 10.0) -> None:
        self.host += host_us
        self.device = max(self.device, self.host) + us

    def synchronize(self) -> None:
        if self.recording is not None:
            raise RuntimeError("not while a stream is captured")
        self.host = self.device = max(self.host, self.device) + 5.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self
        place = torch.device("cuda", 0)
        stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=gpu.synchronize, device=place)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.launch(0.0, host_us=2.0)
                self.at = gpu.device

            def elapsed_time(self, stop: Event) -> float:
                return (stop.at - self.at) * 1e-3

        class Graph:
            kernels: list[float]

            def __init__(self) -> None:
                self.upload_us = 100.0

            def replay(self) -> None:
                gpu.rounds[-1].append(sum(self.kernels))
                gpu.launch(1.0 + sum(self.kernels) + self.upload_us, 10.0 + self.upload_us)
                self.upload_us = 0.0

        @contextmanager
        def capture(graph: Graph, stream: object) -> Iterator[None]:
            gpu.recording = graph.kernels = []
            try:
                yield
            finally:
                gpu.recording = None

        @contextmanager
        def on(stream: object) -> Iterator[None]:
            yield

        def sleep(cycles: int) -> None:
            gpu.rounds.append([])
            gpu.launch(cycles / 2000)

        fakes = {
            "Stream": lambda: stream,
            "current_stream": lambda: "the current stream",
            "set_stream": gpu.left.append,
            "stream": on,
            "graph": capture,
            "CUDAGraph": Graph,
            "Event": Event,
            "synchronize": gpu.synchronize,
            "_sleep": sleep,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
