"""`engines/onnxruntime.py`: a session bound to the caller's tensors, and its streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_components as tiny
from helpers.loops import denoise, run_loop
from helpers.sampler_oracle import config_of, make_scheduler, noise_like
from latentrt.errors import BackendError
from latentrt.runtime.denoiser import Denoiser
from latentrt.runtime.engines import onnxruntime as ort_engine
from latentrt.runtime.engines.base import Component, Engine, example_inputs
from latentrt.runtime.engines.lazy import EngineLoader
from latentrt.runtime.engines.onnxruntime import OnnxRuntimeBackend
from latentrt.runtime.sampler import build_table
from latentrt.runtime.streams import ordered_with_current
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


def load(component: Component, cache_dir: Path) -> Engine:
    return OnnxRuntimeBackend().load(component, device=CPU, cache_dir=cache_dir)


class Operations(TorchDispatchMode):
    """What PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_bound_session_copies_nothing(cache_dir: Path) -> None:
    component = tiny.affine()
    engine = load(component, cache_dir)
    static, out = {"x": torch.zeros(3, 4)}, {"y": torch.full((3, 4), torch.nan)}
    address = out["y"].data_ptr()
    program = engine.bind(static, out)
    program.prepare()
    for seed in range(3):
        inputs = tiny.named_inputs(component, seed, batch=3)
        static["x"].copy_(inputs["x"])
        with Operations() as asked:
            program.run()
        assert asked.names == []
        assert torch.equal(out["y"], engine(inputs)["y"])
    assert out["y"].data_ptr() == address


def test_a_loop_over_a_bound_session_is_the_loop_over_calls_to_the_bit(cache_dir: Path) -> None:
    component = tiny.unet()
    lazy = EngineLoader("onnxruntime", CPU, torch.float32, cache_dir).engine(component)
    table = build_table(config_of(make_scheduler("dpm++2m")), 4)
    x = noise_like(2, 4, 5, 7) * table.init_noise_sigma
    sizes = {**component.example_sizes, "batch": 4}
    drawn = zip(component.inputs, example_inputs(component, sizes), strict=True)
    constants = {spec.name: value for spec, value in drawn if spec.name not in ("sample", "timestep")}

    def unet(sample: Tensor, timestep: Tensor) -> Tensor:
        return lazy({"sample": sample, "timestep": timestep, **constants})[component.outputs[0].name]

    wanted = denoise(unet, x, table, guidance_scale=4.0)
    loop = Denoiser(lazy)
    for _ in range(2):
        assert run_loop(loop, x, table, constants, guidance_scale=4.0).equal(wanted)


def test_what_lies_in_another_order_is_called_and_recorded(cache_dir: Path) -> None:
    """An image that was a picture has its channels last; a session is bound to contiguous tensors."""
    component = tiny.unet()
    inputs = tiny.named_inputs(component)
    turned = {name: x.t().contiguous().t() if x.dim() == 2 else x for name, x in inputs.items()}
    turned["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    assert sum(not x.is_contiguous() for x in turned.values()) > 1
    plain, recorded = (
        EngineLoader("onnxruntime", CPU, torch.float32, cache_dir, graphs).engine(component)
        for graphs in (False, True)
    )
    name = component.outputs[0].name
    assert torch.equal(recorded(turned)[name], plain(inputs)[name])
    table = build_table(config_of(make_scheduler("euler")), 2)
    x = noise_like(1, 4, *inputs["sample"].shape[2:], seed=3)
    found, wanted = (
        run_loop(
            Denoiser(plain),
            x,
            table,
            {k: v for k, v in values.items() if k not in ("sample", "timestep")},
            guidance_scale=4.0,
        )
        for values in (turned, inputs)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            torch.zeros(3, 4).double(),
            torch.zeros(3, 4),
            "x is torch.float64; .* needs it as torch.float32",
        ),
        (torch.zeros(4, 3).T, torch.zeros(3, 4), "x is torch.float32, not contiguous; .* contiguous"),
        (torch.zeros(3, 4), torch.zeros(3, 4).half(), "y is torch.float16; .* needs it as torch.float32"),
        (torch.zeros(3, 5), torch.zeros(3, 4), r"x has shape \[3, 5\]"),
    ],
)
def test_what_cannot_be_bound(x: Tensor, y: Tensor, message: str, cache_dir: Path) -> None:
    with pytest.raises(BackendError, match=message):
        load(tiny.affine(), cache_dir).bind({"x": x}, {"y": y})


def test_a_closed_engine_is_not_bound(cache_dir: Path) -> None:
    engine = load(tiny.affine(), cache_dir)
    engine.close()
    with pytest.raises(BackendError, match="affine was closed"):
        engine.bind({"x": torch.zeros(2, 4)}, {"y": torch.zeros(2, 4)})


class FakeSession:
    """Logs what it is bound to and how it is run."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def io_binding(self) -> Any:
        return SimpleNamespace(
            bind_input=lambda *a: self.log.append(("in", *a)),
            bind_output=lambda *a: self.log.append(("out", *a)),
        )

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        keys = ("disable_synchronize_execution_providers", "gpu_graph_id")
        self.log.append(("run", *(options.get_run_config_entry(key) for key in keys)))


class FakeStream:
    cuda_stream = 4711

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        self.device = torch.device("cuda", 1)
        self.name, self._log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append((self.name, "waits for", other.name))


@pytest.mark.parametrize("captures", [False, True])
def test_on_a_gpu_streams_wait_for_each_other_and_the_host_for_none(
    captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = FakeSession()
    own, current = FakeStream("the session", session.log), FakeStream("torch", session.log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)

    @contextmanager
    def of(device: torch.device) -> Iterator[None]:
        session.log.append(("current", device.index))
        yield
        session.log.append(("current", 0))

    monkeypatch.setattr(torch.cuda, "device", of)
    x, y = torch.zeros(2, 4), torch.zeros(2, 4)
    made = [
        ort_engine._Program(tiny.affine(), session, {"x": x}, {"y": y}, own.device, own, captures=captures)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    assert session.log == 2 * [
        ("in", "x", "cuda", 1, np.float32, [2, 4], x.data_ptr()),
        ("out", "y", "cuda", 1, np.float32, [2, 4], y.data_ptr()),
    ]
    ids = []
    for program in made:
        session.log.clear()
        program.run()
        assert session.log[:2] == [("current", 1), ("the session", "waits for", "torch")]
        assert session.log[3:] == [("torch", "waits for", "the session"), ("current", 0)]
        assert session.log[2][:2] == ("run", "1")
        ids.append(session.log[2][2])
    assert len(set(ids)) == (2 if captures else 1)  # each its own graph, or none
    assert ("-1" in ids) is not captures


def test_a_run_that_fails_leaves_streams_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of its work may be on the device."""
    session = FakeSession()
    own, current = FakeStream("the session", session.log), FakeStream("torch", session.log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    with pytest.raises(RuntimeError), ordered_with_current(own):  # type: ignore[arg-type]
        raise RuntimeError
    assert session.log[-1] == ("torch", "waits for", "the session")
