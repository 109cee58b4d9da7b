"""`runtime/engines/tensorrt.py`: the TensorRT engines on a GPU: built there, against PyTorch, captured, at several
sizes, from several threads."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.engine_checks import assert_replays, inputs
from latentrt.export.measures import relative_error
from latentrt.runtime.engines.base import Component, Engine, Timesteps
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.engines.tensorrt import TensorRTBackend, TensorRTRTXBackend
from latentrt.runtime.graph import Graphs
from tolerances import ENGINE_FLOAT16

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

BACKENDS = {"tensorrt": TensorRTBackend, "tensorrt-rtx": TensorRTRTXBackend}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="module", params=[*BACKENDS])
def name(request: pytest.FixtureRequest, device: torch.device) -> str:
    found = BACKENDS[request.param]().availability(device, torch.float16)
    if not found.ok:
        pytest.skip(f"{request.param}: {found.reason}; {found.remedy}")
    return str(request.param)


@pytest.fixture(scope="module")
def engine(
    name: str, demo_unet: Component, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    return BACKENDS[name]().load(demo_unet, device=device, cache_dir=tmp_path_factory.mktemp(name))


def test_it_computes_what_pytorch_computes(
    engine: Engine, demo_unet: Component, device: torch.device
) -> None:
    eager = EagerBackend().load(demo_unet, device=device, cache_dir=None)
    for which in (0, 1, 0):
        x = inputs(demo_unet, device, which)
        assert relative_error(engine(x)["prediction"], eager(x)["prediction"]) < ENGINE_FLOAT16


def test_the_same_inputs_give_the_same_bits(
    engine: Engine, demo_unet: Component, device: torch.device
) -> None:
    x = inputs(demo_unet, device, 0)
    first = engine(x)["prediction"]
    engine(inputs(demo_unet, device, 1))
    assert torch.equal(first, engine(x)["prediction"])


def test_it_is_captured_and_replayed(engine: Engine, demo_unet: Component, device: torch.device) -> None:
    assert_replays(engine, demo_unet, device)


def test_a_unet_in_three_engines(
    name: str, engine: Engine, demo_unet: Component, device: torch.device
) -> None:
    """Its step, captured and replayed for other times and prompts, is what the whole engine gives."""
    parts = BACKENDS[name](split=True).load(demo_unet, device=device, cache_dir=None)
    x = inputs(demo_unet, device, 0)
    out = {"prediction": torch.zeros_like(x["sample"])}
    timesteps = Timesteps(torch.zeros(4, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    program = parts.bind(x, out, timesteps=timesteps)
    assert program.capturable
    graphs = Graphs(device)
    program.prepare()
    step = graphs.capture(program.run, "a step")
    for seed in (1, 2):
        for key, value in inputs(demo_unet, device, 0, seed).items():
            x[key].copy_(value)
        timesteps.values.copy_(torch.tensor([900.0, 400.0, 3.0, 0.0]))
        program.prepare()
        for index in (0, 2):
            timesteps.index.fill_(index)
            step.replay()
            wanted = engine({**x, "timestep": timesteps.values[index].expand(2)})["prediction"]
            assert relative_error(out["prediction"], wanted) < ENGINE_FLOAT16


def test_threads_with_streams_of_their_own(
    engine: Engine, demo_unet: Component, device: torch.device
) -> None:
    wanted = [engine(inputs(demo_unet, device, which))["prediction"] for which in (0, 1)]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = inputs(demo_unet, device, which)
            for _ in range(50):
                if not torch.equal(engine(x)["prediction"], wanted[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
