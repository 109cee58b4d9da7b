"""`runtime/offload.py` and `residency.py` in whole pipelines: networks leave the device by policy, and come back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.pipeline_insides import graph_cache_of, networks_on_device
from helpers.tiny_requests import NO_SIZE, SEEDED_CALL
from latentrt.errors import RequestError
from latentrt.runtime import offload
from latentrt.runtime.memory import POLICIES
from torch import Tensor

Load = Callable[..., latentrt.Pipeline]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes of the blocks that hold weights, on the device or the host."""
    blocks: dict[int, int] = {}
    make = offload._allocate

    def allocate(nbytes: int, device: torch.device) -> Tensor:
        block = make(nbytes, device)
        key = block.untyped_storage()._cdata
        blocks[key] = nbytes
        weakref.finalize(block.untyped_storage(), blocks.pop, key)
        return block

    monkeypatch.setattr(offload, "_allocate", allocate)
    return blocks


TEXT = {"text_encoder", "text_encoder_2"}
WHILE = {
    "resident": (TEXT | {"unet", "refiner unet", "vae_decoder"},) * 2,
    "balanced": ({"unet", "refiner unet", "vae_decoder"},) * 2,
    "low": ({"unet"}, {"refiner unet"}),
}
AFTER = {
    "resident": TEXT | {"unet", "refiner unet", "vae_decoder"},
    "balanced": {"unet", "refiner unet", "vae_decoder"},
    "low": {"vae_decoder"},
}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_offloaded_networks_make_the_same_image(
    policy: str, graphs: bool, load: Load, image_of_call: Any, live: dict[int, int]
) -> None:
    pipe = load(memory=policy, graphs=graphs)
    there: list[set[str]] = []
    for _ in range(2):
        found = pipe(
            **SEEDED_CALL, callback_on_step_end=lambda p, i, t, k: there.append(networks_on_device(p))
        )
        assert np.array_equal(found.images, image_of_call)
        assert networks_on_device(pipe) == AFTER[policy]
        sizes = {name: n for name, n in pipe._budget.held().items() if name != "recorded"}
        # What was recorded over the UNets went with them.
        assert (graph_cache_of(pipe).nbytes == 0) == (policy == "low")
    assert there[2:] == list(WHILE[policy])
    # What came back is on the device once, and what may leave has a copy on the host.
    planner = pipe._budget.planner
    weights = {name: planner._engine(name, x.component).weight_bytes for name, x in planner.engines().items()}
    movers = {"resident": set(), "balanced": TEXT, "low": AFTER["resident"]}[policy]
    copies = sum(weights[name] for name in movers) + sum(sizes[name] for name in movers & set(sizes))
    padding = 512 * 400 * len(movers)
    assert copies <= sum(live.values()) <= copies + padding


def test_from_an_image_too(load: Load) -> None:
    """The VAE's encoder comes and goes as well."""
    start = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    call = {**NO_SIZE, "image": start, "strength": 0.7}
    images = [load(memory=policy)(**call).images for policy in POLICIES]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


@pytest.mark.parametrize("policy", ["balanced", "low"])
def test_threads_take_turns(policy: str, load: Load) -> None:
    """Or one would send the other's weights away while they are used."""
    pipe, plain = load(memory=policy), load()
    requests = [{**SEEDED_CALL, "seed": seed} for seed in range(3)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda call: pipe(**call).images, requests))
    for image, call in zip(found, requests, strict=True):
        assert np.array_equal(image, plain(**call).images)


def test_parts_that_are_shared_take_turns_too(
    load: Load, tiny: Callable[..., Path], image_of_call: Any
) -> None:
    one = load(memory="low")
    shared = {"text_encoder": one.text_encoder, "text_encoder_2": one.text_encoder_2, "vae": one.vae}
    two = load(**shared)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pipe: pipe(**SEEDED_CALL).images, [one, two, one]))
    assert all(np.array_equal(each, image_of_call) for each in found)


def test_an_engine_that_cannot_be_moved_is_closed_and_loaded_again(load: Load, image_of_call: Any) -> None:
    """As ONNX Runtime's and TensorRT's."""
    pipe = load(memory="low")
    loads: list[str] = []
    backend = pipe._loader.backend
    made = backend.load

    class Fixed:
        """Only what every engine has."""

        def __init__(self, engine: Any) -> None:
            self.entry, self.bind, self.close, self._engine = None, engine.bind, engine.close, engine

        def __call__(self, inputs: Any) -> Any:
            return self._engine(inputs)

    def load_one(component: Any, **options: Any) -> Any:
        loads.append(component.name)
        return Fixed(made(component, **options))

    backend.load = load_one  # type: ignore[method-assign]
    assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)
    once = len(loads)
    assert networks_on_device(pipe) == {"vae_decoder"}
    assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)
    assert len(loads) == 2 * once


ASKING: dict[str, Callable[[latentrt.Pipeline, Tensor], object]] = {
    "a decoded step": lambda pipe, latents: pipe.vae.decode(latents),
    "a previewer": lambda pipe, _: pipe.fit_previewer(),
    "another picture": lambda pipe, _: pipe(**SEEDED_CALL),
}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("asks", ASKING)
def test_a_callback_cannot_offload_the_unet_between_steps(
    asks: str, graphs: bool, load: Load, image_of_call: Any
) -> None:
    """Its recorded step would go on over memory that is others', and be kept for later requests."""
    pipe = load(memory="low", graphs=graphs)
    there: list[set[str]] = []

    def ask(_: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
        with pytest.raises(
            RequestError, match="while the unet takes its steps, and by memory='low' they are not"
        ):
            ASKING[asks](pipe, values["latents"])
        there.append(networks_on_device(pipe))

    assert np.array_equal(pipe(**SEEDED_CALL, callback_on_step_end=ask).images, image_of_call)
    assert there == list(WHILE["low"])
    assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)


@pytest.mark.parametrize("policy", ["resident", "balanced"])
def test_a_callback_may_ask_for_what_is_there_beside_the_unet(
    policy: str, load: Load, image_of_call: Any
) -> None:
    pipe = load(memory=policy, graphs=True)
    asked: list[Tensor] = []
    for ask in ASKING.values():

        def call(p: latentrt.Pipeline, i: int, t: float, values: dict[str, Any], ask: Any = ask) -> None:
            asked.append(ask(p, values["latents"]))

        assert np.array_equal(pipe(**SEEDED_CALL, callback_on_step_end=call).images, image_of_call)
    assert len(asked) == 2 * len(ASKING)


def test_moving_to_another_device_offloads_everything(load: Load, image_of_call: Any) -> None:
    pipe = load(memory="low")
    pipe(**SEEDED_CALL)
    pipe._loader.move(torch.device("cpu"))
    assert networks_on_device(pipe) == set()
    assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)
