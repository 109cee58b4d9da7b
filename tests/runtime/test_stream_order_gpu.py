"""`runtime/streams.py`: nothing on a GPU is read before it is written, or overwritten while it is read, on whatever
stream callers are."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import latentrt
import pytest
import torch
from helpers.stream_order import StreamOrder, following
from helpers.threads import in_threads
from latentrt.runtime.graph import Graphs
from latentrt.runtime.graph_cache import GraphCache
from latentrt.runtime.memory import POLICIES

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def order() -> Iterator[StreamOrder]:
    """With an attention of PyTorch's that `bench/null_cuda` has too; it is one operator whichever it is."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield StreamOrder()
    torch.backends.cuda.enable_cudnn_sdp(enabled)


def load(**options: Any) -> latentrt.Pipeline:
    options = {"backend": "triton", "dtype": "float16", "device": "cuda", **options}
    pipe = latentrt.Pipeline.from_pretrained("demo", "demo", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: latentrt.Pipeline, seed: int = 0, **options: Any) -> latentrt.PipelineOutput:
    options = {"num_inference_steps": 6, "high_noise_frac": 0.7, "output_type": "pt", **options}
    return pipe("a red circle", seed=seed, **options)


@pytest.mark.parametrize("waits", [True, False])
def test_the_checker_sees_replays_on_two_streams(order: StreamOrder, waits: bool) -> None:
    x, graph = torch.zeros(1000, device="cuda"), torch.cuda.CUDAGraph()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()

    def work() -> None:
        with torch.cuda.graph(graph):
            x.add_(1)
        torch.cuda.synchronize()
        with torch.cuda.stream(one):
            graph.replay()
        if waits:
            two.wait_stream(one)
        with torch.cuda.stream(two):
            graph.replay()
        torch.cuda.synchronize()

    expect(order, work, [] if waits else ["a graph writes what is in use"])


@pytest.mark.parametrize("waits", [True, False])
def test_the_checker_sees_memory_freed_under_another_stream(order: StreamOrder, waits: bool) -> None:
    side = torch.cuda.Stream()

    def work() -> None:
        x = torch.zeros(1000, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        if waits:
            x.record_stream(side)
        del x
        torch.cuda.synchronize()

    expect(order, work, [] if waits else ["memory is freed"])


@pytest.mark.parametrize("waits", [True, False])
def test_the_checker_sees_a_host_buffer_used_under_its_copy(order: StreamOrder, waits: bool) -> None:
    x, buffer = torch.zeros(1000, device="cuda"), torch.zeros(1000).pin_memory()

    def work() -> None:
        x.copy_(buffer, non_blocking=True)
        if waits:
            torch.cuda.current_stream().synchronize()
        buffer.fill_(1)
        buffer.copy_(x, non_blocking=True)
        if waits:
            torch.cuda.current_stream().synchronize()
        buffer.sum()

    expect(order, work, [] if waits else ["the host's aten::fill_", "the host's aten::sum"])


@pytest.mark.parametrize("tells", [True, False])
def test_the_checker_finds_threads_that_are_not_ordered(order: StreamOrder, tells: bool) -> None:
    x, waited = torch.zeros(1000, device="cuda"), list[bool]()

    def work() -> None:
        lock = threading.Lock()
        sides = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()

        def first() -> None:
            with torch.cuda.stream(sides[0]):
                x.add_(1)
                torch.cuda.current_stream().synchronize()
            with lock:
                waited.append(True)

        def second() -> None:
            while not waited:
                time.sleep(0.001)
            with lock if tells else nullcontext(), torch.cuda.stream(sides[1]):
                x.add_(1)
                torch.cuda.current_stream().synchronize()

        in_threads([first, second])
        x.add_(1)

    expect(order, work, [] if tells else ["aten::add_ writes what is in use"])


def expect(order: StreamOrder, work: Callable[[], None], races: list[str]) -> None:
    try:
        with following(order):
            work()
    except AssertionError:
        assert races
    assert [race for race in order.races if not any(race.startswith(r) for r in races)] == []
    assert all(any(race.startswith(r) for race in order.races) for r in races)


@pytest.mark.parametrize("memory", POLICIES)
def test_requests_on_one_stream_after_another(order: StreamOrder, memory: Any) -> None:
    """Loaded on one, called on others, without a wait between: latents are not read."""
    with following(order):
        pipe = load(memory=memory)
        for seed, stream in enumerate(
            [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        ):
            with torch.cuda.stream(stream):
                call(pipe, seed, output_type="latent")
                call(pipe, seed, num_images_per_prompt=2, sampler="ddpm")


@pytest.mark.parametrize(
    "options",
    [*({"memory": policy} for policy in POLICIES), {"graphs": False}, {"backend": "eager", "graphs": False}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_threads_with_streams_of_their_own(
    order: StreamOrder, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    exclusive, put = Graphs.exclusive, GraphCache.put

    def others_come_in() -> None:  # which they rarely do otherwise
        time.sleep(rng.uniform(0, 0.01))

    @contextmanager
    def exclusive_and_slow(self: Graphs) -> Iterator[None]:
        with exclusive(self):
            yield
        others_come_in()

    def put_and_slow(self: GraphCache, *args: Any) -> None:
        put(self, *args)
        others_come_in()

    monkeypatch.setattr(Graphs, "exclusive", exclusive_and_slow)
    monkeypatch.setattr(GraphCache, "put", put_and_slow)
    with following(order):
        pipe = load(**options)

        def work(first: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for seed in range(first, first + 3):
                    call(pipe, seed, num_images_per_prompt=1 + seed % 2)

        in_threads(partial(work, k) for k in range(3))


def test_previews_beside_the_loop(order: StreamOrder) -> None:
    with following(order):
        pipe = load()
        previewer, seen = pipe.fit_previewer(), list[Any]()
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                for seed in range(2):
                    call(pipe, seed, previewer=previewer, callback_on_progress=lambda *a: seen.append(a))
        assert len(seen) > 12


@pytest.mark.parametrize("memory", ["resident", "low"])
def test_callbacks_that_change_latents_or_fail(order: StreamOrder, memory: Any) -> None:
    def change(pipe: Any, step: int, timestep: float, found: dict[str, Any]) -> dict[str, Any]:
        return {"latents": 0.5 * found["latents"]} if step == 2 else {}

    def fail(pipe: Any, step: int, timestep: float, found: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with following(order):
        pipe = load(memory=memory)
        for seed in range(2):
            call(pipe, seed, callback_on_step_end=change)
            with pytest.raises(KeyboardInterrupt):
                call(pipe, seed, callback_on_step_end=fail)
            with torch.cuda.stream(torch.cuda.Stream()):
                call(pipe, seed)


def test_callbacks_that_decode_on_a_stream_of_their_own(order: StreamOrder) -> None:
    side = torch.cuda.Stream()

    with following(order):
        pipe = load()
        x = torch.zeros(1, 4, 16, 16, device="cuda")

        def decode(*_: Any) -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                pipe.vae.decode(x)

        for name in ("callback_on_step_end", "callback_on_progress"):
            call(pipe, **{name: decode})
            call(pipe, num_images_per_prompt=2)


def test_warm_up_and_two_pipelines(order: StreamOrder) -> None:
    with following(order):
        first = load(loop_memory="1GB")
        first.warmup(sizes=[(64, 64), (128, 128)], batches=[1, 2])
        second = load(graphs=False)
        for pipe in (first, second):
            with torch.cuda.stream(torch.cuda.Stream()):
                call(pipe, 1, output_type="latent")
                call(pipe, 2, num_images_per_prompt=2)
