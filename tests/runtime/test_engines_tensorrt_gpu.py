"""The TensorRT engines on a GPU: built there, against PyTorch, captured, at several sizes, from several threads."""

from __future__ import annotations

import threading

import pytest
import tiny_components as tiny
import torch
from latentrt.export.check import relative_error
from latentrt.runtime.engines.base import Component, Engine
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.engines.registry import get_backend
from latentrt.runtime.loading import load_components
from latentrt.runtime.weights import open_checkpoint
from tolerances import ENGINE_FLOAT16
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

SIZES = [{"batch": 2, "height": 16, "width": 16}, {"batch": 4, "height": 12, "width": 20}]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="module")
def unet() -> Component:
    return load_components(open_checkpoint("demo"), torch.float16)["unet"]


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engine(
    request: pytest.FixtureRequest,
    unet: Component,
    device: torch.device,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    backend = get_backend(request.param)
    found = backend.availability(device, torch.float16)
    if not found.ok:
        pytest.skip(f"{request.param}: {found.reason}; {found.remedy}")
    return backend.load(unet, device=device, cache_dir=tmp_path_factory.mktemp(request.param))


def inputs(unet: Component, device: torch.device, which: int, seed: int = 0) -> dict[str, Tensor]:
    return {k: x.to(device) for k, x in tiny.named_inputs(unet, seed, **SIZES[which]).items()}


def test_it_computes_what_pytorch_computes(engine: Engine, unet: Component, device: torch.device) -> None:
    eager = EagerBackend().load(unet, device=device, cache_dir=None)
    for which in (0, 1, 0):
        x = inputs(unet, device, which)
        assert relative_error(engine(x)["prediction"], eager(x)["prediction"]) < ENGINE_FLOAT16


def test_the_same_inputs_give_the_same_bits(engine: Engine, unet: Component, device: torch.device) -> None:
    x = inputs(unet, device, 0)
    first = engine(x)["prediction"]
    engine(inputs(unet, device, 1))
    assert torch.equal(first, engine(x)["prediction"])


def test_it_is_captured_and_replayed(engine: Engine, unet: Component, device: torch.device) -> None:
    x = inputs(unet, device, 0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine(x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = engine(x)["prediction"]
        for seed in (1, 2):
            for name, value in inputs(unet, device, 0, seed).items():
                x[name].copy_(value)
            graph.replay()
            replayed = captured.clone()
            engine(inputs(unet, device, 1))  # other work in the same scratch, between replays
            assert torch.equal(replayed, engine(x)["prediction"])


def test_threads_with_streams_of_their_own(engine: Engine, unet: Component, device: torch.device) -> None:
    wanted = [engine(inputs(unet, device, which))["prediction"] for which in (0, 1)]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = inputs(unet, device, which)
            for _ in range(50):
                if not torch.equal(engine(x)["prediction"], wanted[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
