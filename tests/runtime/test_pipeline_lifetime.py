"""`runtime/residency.py`: two pipelines that share parts make room for each other, and one that was dropped is
gone."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.pipeline_insides import checked, plan_of
from helpers.tiny_requests import SEEDED_CALL
from latentrt.runtime import budget, flow
from latentrt.runtime.engines.eager import EagerEngine
from latentrt.runtime.latents import NoiseSource
from latentrt.runtime.residency import Residency
from latentrt.runtime.text_encoder import PromptEncoding

CPU = torch.device("cpu")
Load = Callable[..., latentrt.Pipeline]
Tiny = Callable[..., Path]

FORM = {"prompt": "storm", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 1}
BASE = {**FORM, "denoising_end": 0.5, "output_type": "latent"}
REFINER = {**FORM, "denoising_start": 0.5, "output_type": "np"}


def two(tiny: Tiny, memory: str, **options: Any) -> tuple[latentrt.Pipeline, latentrt.Pipeline]:
    """A base and a refiner as README has them."""
    common = {"backend": "triton", "device": "cpu", "memory": memory, **options}
    base = latentrt.Pipeline.from_pretrained(tiny("sdxl"), **common)
    shared = {"text_encoder_2": base.text_encoder_2, "vae": base.vae}
    refiner = latentrt.Pipeline.from_pretrained(tiny("refiner"), **common, **shared)
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    return base, refiner


def there(*pipes: latentrt.Pipeline) -> dict[int, int]:
    """Bytes of each engine that is on the device."""
    engines = [x for pipe in pipes for x in pipe._parts.engines()]
    return {id(x): x.component.weight_bytes for x in engines if x.present}


def peak(pipe: latentrt.Pipeline, call: dict[str, Any]) -> int:
    return plan_of(pipe, call).peak("low")


def test_noise_is_on_the_device_once(load: Load) -> None:
    """In the loops' own tensors, which are what a plan counts."""
    pipe = load()
    request, stages = checked(pipe, SEEDED_CALL)
    noise = NoiseSource(request.generators, request.batch)
    latents = torch.empty(1, 4, 8, 6, device="meta")  # as of a device that is not the host
    encode = PromptEncoding(CPU)
    told = [stage.expert.condition(request, encode, from_image=stage.from_image) for stage in stages]
    loops = flow._loops(request, stages, told, latents, noise)
    assert [loop.noise.device for _, loop in loops if loop.noise is not None] == [CPU, CPU]


@contextmanager
def uncollected() -> Iterator[None]:
    """Only what nothing refers to goes."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_two_pipelines_that_share_parts_have_one_network_on_the_device(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what each of them needs by plan is enough, however often they take turns."""
    base, refiner = two(tiny, "low")
    latents = base(**BASE).images
    refiner(**REFINER, image=latents)
    total = max(peak(base, BASE), peak(refiner, {**REFINER, "image": latents})) + 2_000_000
    base, refiner = two(tiny, "low")
    monkeypatch.setattr(budget, "free_memory", lambda _: total - sum(there(base, refiner).values()))
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(len(there(base, refiner)))

    for _ in range(2):
        latents = base(**BASE, callback_on_step_end=look).images
        refiner(**REFINER, image=latents, callback_on_step_end=look)
    assert seen == [1, 1, 1, 1]


def test_what_stays_beside_a_pipeline_s_own_is_not_given_to_it(tiny: Tiny) -> None:
    for memory, given in (("low", {"another unet"}), ("balanced", set())):
        base, refiner = two(tiny, memory)
        base(**BASE)
        assert base.text_encoder_2.engine.residency is refiner._parts.base.unet.residency
        held = refiner._budget.held()
        assert {name for name in held if name.startswith("another")} == given
        if given:
            unet = base._parts.base.unet
            assert held["another unet"] == unet.held_bytes + unet.graph_cache.nbytes
            assert unet.held_bytes >= unet.component.weight_bytes
            assert unet.graph_cache.nbytes > 0


def test_another_policy_is_another_s(tiny: Tiny, load: Load) -> None:
    low = load(memory="low")
    shared = {"text_encoder": low.text_encoder, "vae": low.vae}
    assert load(memory="low", **shared)._loader.residency is low._loader.residency
    assert load(memory="balanced", **shared)._loader.residency is not low._loader.residency
    assert not load(**shared)._loader.residency.offloads


def test_engines_of_other_devices_stay() -> None:
    class Engine:
        present, looping = True, False

        def __init__(self, device: str) -> None:
            self.component: Any = type("Named", (), {"name": "unet"})
            self.device, self.residency, self.graph_cache = torch.device(device), held, None

        def offload(self) -> None:
            held.forget(self)

    held = Residency("low")
    first, elsewhere, second = Engine("cuda:0"), Engine("cuda:1"), Engine("cuda:0")
    for engine in (first, elsewhere, second):
        held.enter(engine)
    assert held.loaded == [elsewhere, second]


DROPPED = """
import gc, json, sys, weakref
import latentrt
folder, refiner, memory, graphs, limit = json.loads(sys.argv[1])
pipe = latentrt.Pipeline.from_pretrained(
    folder, refiner, backend="triton", device="cpu", memory=memory, graphs=graphs, memory_limit=limit
)
gc.collect()
gc.disable()
call = {"height": 64, "width": 64, "num_inference_steps": 2, "high_noise_frac": 0.5}
heard = []
options = {
    "callback_on_step_end": lambda *_: heard.append("step"),
    "callback_on_progress": lambda *_: heard.append("progress"),
    "previewer": pipe.fit_previewer(),
}
pipe("a cat", **call)
pipe("a cat", **call, **options)
modules = {weakref.ref(x._engine._module) for x in pipe._parts.engines() if x._engine is not None}
kept = weakref.ref(pipe._loader.graph_cache)
del pipe, options
print(json.dumps([len(heard), len(modules), sum(x() is not None for x in modules), kept() is None]))
"""


@pytest.mark.parametrize(
    ("memory", "graphs", "limit"), [("resident", True, None), ("low", False, None), ("balanced", True, "2GB")]
)
def test_a_dropped_pipeline_is_gone_at_once(memory: str, graphs: bool, limit: str | None, tiny: Tiny) -> None:
    """In a process of its own: what is imported in the first call may hold that for good."""
    argument = json.dumps([str(tiny("sdxl")), str(tiny("refiner")), memory, graphs, limit])
    done = subprocess.run(
        [sys.executable, "-c", DROPPED, argument], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [4, 5, 0, True]


@pytest.mark.parametrize("memory", ["resident", "low"])
def test_what_was_dropped_is_gone_though_parts_of_it_are_shared(memory: str, tiny: Tiny) -> None:
    base, refiner = two(tiny, memory, graphs=True)
    latents = base(**BASE).images
    unet = weakref.ref(base._parts.base.unet._engine._module)
    kept, residency = base._loader.graph_cache, refiner._loader.residency
    with uncollected():
        before = kept.nbytes
        del base
        assert unet() is None
        assert kept.nbytes < before
        assert residency.loaded == []
    refiner(**REFINER, image=latents)


def test_what_waits_for_the_garbage_collector_is_not_a_reason_to_refuse(
    load: Load, image_of_call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that was dropped by what refers to itself."""

    class Holder:
        def __init__(self) -> None:
            self.itself, self.pipe = self, load()

    waiting: list[weakref.ref[latentrt.Pipeline]] = []
    monkeypatch.setattr(
        budget, "free_memory", lambda _: 0 if any(pipe() is not None for pipe in waiting) else 10**9
    )
    with uncollected():
        waiting.append(weakref.ref(Holder().pipe))
        pipe = load()
        waiting.append(weakref.ref(Holder().pipe))
        assert np.array_equal(pipe(**SEEDED_CALL).images, image_of_call)


def test_a_departure_that_is_broken_off_is_made_up_for(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(memory="low")
    pipe(**SEEDED_CALL)

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "offload", broken)
        with pytest.raises(KeyboardInterrupt):
            pipe(**SEEDED_CALL)
    assert len(there(pipe)) == 1
    seen: list[int] = []
    pipe(**SEEDED_CALL, callback_on_step_end=lambda *_: seen.append(len(there(pipe))))
    assert seen == [1, 1]
