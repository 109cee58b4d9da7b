"""Loops that stay ready: recorded steps equal plain ones, and no request leaves anything for the next."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from helpers.fake_stream import FakeStream
from helpers.loops import Hooks, denoise, run_loop
from helpers.sampler_oracle import CLASSES, config_of, generators, make_scheduler, noise_like
from latentrt.errors import CaptureError
from latentrt.runtime.denoise import LoopRequest
from latentrt.runtime.denoiser import Denoiser, all_ready
from latentrt.runtime.engines.base import Component, example_inputs
from latentrt.runtime.engines.lazy import EngineLoader, LazyEngine
from latentrt.runtime.latents import NoiseSource
from latentrt.runtime.sampler import SamplerTable, build_table
from torch import Tensor

CPU = torch.device("cpu")
SIZES = ((8, 8), (6, 10), (9, 7))


@pytest.fixture(scope="module")
def component() -> Component:
    return tiny.unet()


def engine(component: Component, backend: str = "triton", *, graphs: bool) -> LazyEngine:
    return EngineLoader(backend, CPU, torch.float32, None, graphs).engine(component)


class Request:
    """Everything a loop is asked for, from a seed."""

    def __init__(
        self, component: Component, seed: int, sampler: str | None = None, batch: int | None = None
    ) -> None:
        rng = random.Random(seed)
        self.sampler = sampler or rng.choice(list(CLASSES))
        self.steps = rng.randint(1, 7)
        batch = batch or rng.randint(1, 3)
        size = rng.choice(SIZES) if sampler is None else SIZES[0]
        guided = True if sampler is not None else rng.random() < 0.7
        rows = 2 * batch if guided else batch
        self.table: SamplerTable = build_table(config_of(make_scheduler(self.sampler)), self.steps)
        self.latents = noise_like(batch, 4, *size, seed=seed) * self.table.init_noise_sigma
        sizes = {**component.example_sizes, "batch": rows}
        inputs = zip(component.inputs, example_inputs(component, sizes, seed), strict=True)
        self.constants = {spec.name: x for spec, x in inputs if spec.name not in ("sample", "timestep")}
        noise = NoiseSource(generators(batch, seed), batch).draw_steps(self.table, (4, *size), CPU)
        scale = torch.tensor([rng.uniform(1.5, 9.0) for _ in range(batch)])
        self.options: dict[str, Any] = {
            "guidance_scale": scale if guided else None,
            "guidance_rescale": rng.choice([0.0, 0.3, 0.7]),
            "noise": noise,
        }

    def asked(self) -> LoopRequest:
        B, C, h, w = self.latents.shape
        return LoopRequest((B, C, h, w), self.table, self.constants, **self.options)

    def run(self, loop: Denoiser, **options: Any) -> Tensor:
        return run_loop(loop, self.latents, self.table, self.constants, **self.options, **options)


@pytest.mark.parametrize("sampler", CLASSES)
def test_one_recording_serves_every_prompt_scale_rescale_seed_and_number_of_steps(
    component: Component, captures: list[str], sampler: str
) -> None:
    recorded, plain = (Denoiser(engine(component, graphs=graphs)) for graphs in (True, False))
    for seed in range(4):
        request = Request(component, seed, sampler, batch=2)
        assert request.run(recorded).equal(request.run(plain))
    assert captures == ["a denoising step of unet"]


def test_a_loop_is_the_plain_loop_over_the_called_engine(component: Component) -> None:
    """Nothing of the static tensors shows: the same as calling the engine on fresh ones."""
    lazy = engine(component, "eager", graphs=False)
    name = component.outputs[0].name
    for seed in range(6):
        request = Request(component, seed)

        def unet(sample: Tensor, timestep: Tensor, request: Request = request) -> Tensor:
            return lazy({"sample": sample, "timestep": timestep, **request.constants})[name]

        wanted = denoise(unet, request.latents, request.table, **request.options)
        assert request.run(Denoiser(lazy)).equal(wanted)


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_random_sequences_of_requests_leave_nothing_behind(component: Component, first: int) -> None:
    """Fifty sequences in all; each result equals that of a loop that has done nothing before."""
    fresh = engine(component, graphs=False)  # records nothing: each call is of a loop of its own
    for sequence in range(first, first + 10):
        rng = random.Random(f"sequence {sequence}")
        loop = Denoiser(engine(component, graphs=True))
        for _ in range(3):
            request = Request(component, rng.randrange(1000))
            stop_after = rng.choice([None, None, 0, 1, 2])
            counts = [0, 0]

            def stop(which: int, limit: int | None = stop_after, counts: list[int] = counts) -> bool:
                counts[which] += 1
                return limit is not None and counts[which] > limit

            found = request.run(loop, should_stop=lambda stop=stop: stop(0))
            wanted = request.run(Denoiser(fresh), should_stop=lambda stop=stop: stop(1))
            assert found.equal(wanted)


def test_an_interruption_at_any_step_leaves_the_loop_usable(component: Component) -> None:
    loop = Denoiser(engine(component, graphs=True))
    request = Request(component, 3, "dpm++2m", batch=1)
    whole = request.run(loop)
    for last in range(request.steps + 1):
        done: list[Tensor] = []
        request.run(
            loop, on_step=lambda i, t, x, d=done: d.append(x), should_stop=lambda d=done, n=last: len(d) == n
        )
        assert len(done) == min(last, request.steps)
        assert request.run(loop).equal(whole)


def test_an_error_in_a_callback_leaves_the_loop_usable(component: Component) -> None:
    loop = Denoiser(engine(component, graphs=True))
    request = Request(component, 3, "pndm", batch=1)
    whole = request.run(loop)

    def fail(i: int, t: float, x: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        request.run(loop, on_step=fail)
    assert request.run(loop).equal(whole)


def test_callbacks_replace_the_latents_of_recorded_steps(component: Component) -> None:
    recorded, plain = (Denoiser(engine(component, graphs=graphs)) for graphs in (True, False))
    request = Request(component, 5, "euler", batch=1)
    other = torch.ones_like(request.latents)
    found, wanted = (
        request.run(loop, on_step=lambda i, t, x: other if i == 0 else None) for loop in (recorded, plain)
    )
    assert found.equal(wanted)
    assert not found.equal(request.run(plain))


def test_a_step_that_reads_a_value_back_cannot_be_recorded(component: Component) -> None:
    """What would make the host wait for the GPU in every step."""
    lazy = engine(component, graphs=True)
    loaded = lazy.load()
    bind = loaded.bind

    def reading(*args: Any, **options: Any) -> Any:
        program = bind(*args, **options)
        run = program.run
        program.run = lambda: (run(), float(args[0]["timestep"][0]))  # type: ignore[method-assign]
        return program

    loaded.bind = reading  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match=r"a denoising step of unet.*_local_scalar_dense"):
        Request(component, 0).run(Denoiser(lazy))


def test_threads_take_loops_of_their_own(component: Component) -> None:
    lazy = engine(component, "eager", graphs=False)
    loop = Denoiser(lazy)
    requests = [Request(component, seed, "euler-a", batch=1) for seed in range(6)]
    alone = [request.run(Denoiser(lazy)) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda request: request.run(loop), requests))
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


def test_threads_record_no_more_loops_than_run_at_once(component: Component, captures: list[str]) -> None:
    """Two requests at a time, six times: both have a loop before either sets its own free, and both have done so before
    the next."""
    loop = Denoiser(engine(component, "eager", graphs=True))
    request = Request(component, 3, "euler-a", batch=1)
    wanted = request.run(Denoiser(engine(component, "eager", graphs=False)))
    both = threading.Barrier(2, timeout=60)

    def run_some() -> list[Tensor]:
        made = []
        for _ in range(6):
            with loop.ready(request.asked()) as run:
                both.wait()
                made.append(run(request.latents, Hooks()))
            both.wait()
        return made

    with ThreadPoolExecutor(2) as pool:
        found = [future.result() for future in [pool.submit(run_some) for _ in range(2)]]
    assert len(captures) == 2
    assert all(x.equal(wanted) for made in found for x in made)


def test_few_loops_are_kept(component: Component) -> None:
    lazy = engine(component, "eager", graphs=False)
    lazy.graph_cache.limit = 300_000
    loop = Denoiser(lazy)
    for seed in range(40):
        Request(component, seed).run(loop)
        assert lazy.graph_cache.nbytes <= lazy.graph_cache.limit
    assert len(lazy.graph_cache) > 1
    assert lazy.graph_cache.evicted > 1


@pytest.mark.parametrize("graphs", [False, True])
def test_a_caller_s_inference_mode_does_not_mark_what_is_kept(component: Component, graphs: bool) -> None:
    loop = Denoiser(engine(component, graphs=graphs))
    request = Request(component, 3, "euler", batch=1)
    with torch.inference_mode():
        first = request.run(loop)
    assert request.run(loop).equal(first)


def test_a_closed_engine_is_let_go(component: Component) -> None:
    """With its weights: a pipeline that moved would keep them on the device it left."""
    lazy = engine(component, graphs=True)
    loop = Denoiser(lazy)
    request = Request(component, 3, "euler", batch=1)
    first = request.run(loop)
    module = weakref.ref(lazy.load()._module)  # type: ignore[attr-defined]
    lazy.close()
    gc.collect()
    assert module() is None
    assert request.run(loop).equal(first)


def test_a_loop_whose_engine_is_closed_while_it_is_in_use_is_let_go(component: Component) -> None:
    lazy = engine(component, graphs=True)
    loop = Denoiser(lazy)
    request = Request(component, 3, "euler", batch=1)
    with loop.ready(request.asked()) as run:
        module = weakref.ref(lazy.load()._module)  # type: ignore[attr-defined]
        lazy.close()
        first = run(request.latents, Hooks())
    del run
    assert request.run(loop).equal(first)
    gc.collect()
    assert module() is None


@pytest.mark.parametrize("made", [False, True])
def test_what_failed_is_freed_once_the_device_is_done(
    component: Component, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    """Before its memory is anybody else's: whether it failed while it was made or while it was used."""
    lazy, stream = engine(component, graphs=True), FakeStream()
    monkeypatch.setattr("latentrt.runtime.engines.lazy.current_stream", lambda device: stream)
    kept: Any = SimpleNamespace(engine=lazy.load(), nbytes=1)

    def fail() -> None:
        stream.log.append("failed")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), lazy.kept("key", lazy.load(), lambda: kept if made else fail()):
        fail()
    assert stream.log == ["failed", "record 1", "wait 1"]
    assert len(lazy.graph_cache) == 0


def test_nothing_else_runs_while_a_loop_is_made(
    component: Component, captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors and its capture take memory that plans count for one at a time."""

    @contextmanager
    def exclusive(self: LazyEngine) -> Iterator[None]:
        captures.append("begin")
        yield
        captures.append("end")

    monkeypatch.setattr(LazyEngine, "exclusive", exclusive)
    spy = LazyEngineSpy(component, "unet", captures)
    with Denoiser(spy.engine).ready(Request(component, 3, "euler", batch=1).asked()):
        assert captures == [
            *("begin", "prepare unet", "a denoising step of unet", "end"),  # made
            *("begin", "prepare unet", "end"),  # started
        ]


def test_loops_are_recorded_largest_first_and_all_before_the_first_step(
    component: Component, captures: list[str]
) -> None:
    """What the second one needs of the host is done by then, too."""
    base = LazyEngineSpy(component, "base", captures)
    refiner = LazyEngineSpy(component, "refiner", captures)
    first, second = Request(component, 3, "euler-a", batch=1), Request(component, 4, "euler-a", batch=1)
    asked = [(Denoiser(base.engine, 32), first.asked()), (Denoiser(refiner.engine, 48), second.asked())]
    hooks = Hooks(on_step=lambda *_: captures.append("step"))
    with all_ready(asked) as runs:
        assert captures == [
            *("prepare refiner", "a denoising step of refiner", "prepare refiner"),
            *("prepare base", "a denoising step of base", "prepare base"),
        ]
        captures.clear()
        latents = first.latents
        for run in runs:
            latents = run(latents, hooks)
    assert captures == ["step"] * (first.steps + second.steps)
    plain = Denoiser(engine(component, graphs=False))
    between = first.run(plain)
    assert latents.equal(run_loop(plain, between, second.table, second.constants, **second.options))


class LazyEngineSpy:
    """An engine by another name, whose programs log when they are prepared."""

    def __init__(self, component: Component, name: str, log: list[str]) -> None:
        self.engine = engine(replace(component, name=name), graphs=True)
        loaded = self.engine.load()
        bind = loaded.bind

        def logged(*args: Any, **options: Any) -> Any:
            program = bind(*args, **options)
            prepare = program.prepare
            program.prepare = lambda: (log.append(f"prepare {name}"), prepare())  # type: ignore[method-assign]
            return program

        loaded.bind = logged  # type: ignore[method-assign]


def test_loops_whose_unets_are_not_there_together_are_made_ready_one_by_one(
    component: Component, captures: list[str]
) -> None:
    loops = [Denoiser(engine(replace(component, name=name), graphs=True)) for name in ("base", "refiner")]
    requests = [Request(component, seed, "euler-a", batch=1) for seed in (3, 4)]
    asked = [(loop, request.asked()) for loop, request in zip(loops, requests, strict=True)]
    found = []
    for together in (True, False):
        latents = requests[0].latents
        with all_ready(asked, together=together) as runs:
            for run in runs:
                latents = run(latents, Hooks(on_step=lambda *_: captures.append("step")))
        found.append(latents)
        captures.clear()
        for loop in loops:
            loop._unet.graph_cache.drop()
    assert found[0].equal(found[1])
    with all_ready(asked, together=False) as runs:
        assert captures == []
        for run in runs:
            latents = run(latents, Hooks(on_step=lambda *_: captures.append("step")))
    assert captures == [
        *("a denoising step of base", *["step"] * requests[0].steps),
        *("a denoising step of refiner", *["step"] * requests[1].steps),
    ]


@pytest.mark.parametrize("graphs", [False, True])
def test_an_error_in_one_of_two_loops_leaves_both_usable(component: Component, graphs: bool) -> None:
    first, second = Request(component, 3, "euler-a", batch=1), Request(component, 4, "pndm", batch=1)
    loops = [Denoiser(engine(component, graphs=graphs)) for _ in range(2)]
    wanted = [request.run(loop) for request, loop in zip((first, second), loops, strict=True)]

    def fail(i: int, t: float, x: Tensor) -> None:
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        all_ready([(loops[0], first.asked()), (loops[1], second.asked())]) as runs,
    ):
        runs[0](first.latents, Hooks(on_step=fail))
    assert first.run(loops[0]).equal(wanted[0])
    assert second.run(loops[1]).equal(wanted[1])


def test_a_loop_is_freed_after_its_engine_was_closed(
    component: Component, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which waits for what runs: a loop has contexts of TensorRT's, that must not go before."""
    lazy = engine(component, graphs=True)
    Request(component, 3, "euler-a").run(Denoiser(lazy))
    loaded, kept = lazy.load(), []
    close = loaded.close
    monkeypatch.setattr(loaded, "close", lambda: (kept.append(len(lazy.graph_cache)), close()))
    lazy.close()
    assert (kept, len(lazy.graph_cache)) == ([1], 0)
