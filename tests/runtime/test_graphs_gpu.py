"""`runtime/graph.py`: CUDA graphs on a GPU: the demo in float32, whose images are known from the CPU."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from latentrt.errors import CaptureError
from latentrt.kernels._dispatch import arch_of
from latentrt.kernels._triton import counted
from latentrt.runtime.engines.base import Component, Timesteps, example_inputs, output_shapes
from latentrt.runtime.engines.triton import TritonBackend
from latentrt.runtime.footprint import follow
from latentrt.runtime.graph import Graphs
from latentrt.runtime.loading import load_components
from latentrt.runtime.memory import RESERVE, format_bytes
from latentrt.runtime.models.layers import GroupNorm, GroupNormSiLU
from latentrt.runtime.models.unet_blocks import TransformerBlock
from latentrt.runtime.offload import OffloadableWeights
from latentrt.runtime.planner import Planner
from latentrt.runtime.previews import Previewer
from latentrt.runtime.weights import open_checkpoint, open_outline
from tolerances import PIPELINE_GPU
from torch import nn

pytestmark = pytest.mark.gpu

CALL: dict[str, Any] = {
    "prompt": "a red circle above a blue square",
    "num_inference_steps": 8,
    "output_type": "np",
}


def load(**options: Any) -> latentrt.Pipeline:
    pipe = latentrt.Pipeline.from_pretrained(
        "demo", "demo", **{"dtype": "float32", "device": "cuda", **options}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def graphed() -> Iterator[latentrt.Pipeline]:
    """Where bits may be compared: cuDNN's transposed convolutions may add up by atomics, in any order."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield load(backend="triton")
    torch.backends.cuda.matmul.allow_tf32 = allowed


def test_work_is_replayed_over_what_the_static_tensors_hold() -> None:
    graphs = Graphs(torch.device("cuda"))
    x, y = torch.zeros(1 << 16, device="cuda"), torch.zeros(1 << 16, device="cuda")
    first = graphs.capture(lambda: y.copy_((2 * x + 1).relu()), "first")
    second = graphs.capture(lambda: y.add_(x.sin()), "second")
    for value in (-3.0, 5.0):
        x.fill_(value)
        with graphs.exclusive():
            first.replay()
            second.replay()
        wanted = max(0.0, 2 * value + 1) + np.sin(value)
        torch.testing.assert_close(y, torch.full_like(y, wanted))


def test_what_cannot_be_recorded_is_named() -> None:
    x, y = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    graphs, stream = Graphs(x.device), torch.cuda.current_stream()
    with pytest.raises(CaptureError, match=r"the work.*aten::_local_scalar_dense.*--no-graphs"):
        graphs.capture(lambda: float(x.sum()), "the work")
    assert torch.cuda.current_stream() == stream
    torch.randn(4, device="cuda")  # PyTorch 2.11 by itself refuses to draw after a capture that failed
    graphs.capture(lambda: y.copy_(x * 2), "other work").replay()  # the device is none the worse for it
    assert float(y.sum()) == 8
    cached = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    del cached
    held = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()  # does nothing while the allocator believes that a capture goes on
    assert torch.cuda.memory_reserved() <= held - (1 << 28)


def test_a_capture_that_another_thread_breaks_is_made_again() -> None:
    x, y = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    captures: list[int] = []

    def wait() -> None:
        with suppress(RuntimeError):  # in some versions it is refused
            torch.cuda.synchronize()

    def work() -> None:
        if torch.cuda.is_current_stream_capturing():
            captures.append(1)
            if len(captures) == 1:
                waiting = threading.Thread(target=wait)
                waiting.start()
                waiting.join()
        y.copy_(x * 2)

    Graphs(x.device).capture(work, "the work").replay()
    assert float(y.sum()) == 8
    assert len(captures) <= 2


def test_a_graph_outlives_the_thread_that_captured_it(graphed: latentrt.Pipeline) -> None:
    """cuDNN's plans are kept for each thread."""
    pipe = load(backend="triton")
    thread = threading.Thread(target=pipe, kwargs={**CALL, "seed": 1})
    thread.start()
    thread.join()
    gc.collect()
    torch.cuda.empty_cache()
    assert np.array_equal(pipe(**CALL, seed=2).images, graphed(**CALL, seed=2).images)


def test_graphs_take_the_memory_of_one_run_however_many_are_recorded() -> None:
    """While they are recorded, too; and when all of them have gone others are."""
    size = 1 << 30
    x, y = torch.zeros(size, dtype=torch.uint8, device="cuda"), torch.zeros(1, device="cuda")
    graphs = Graphs(x.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        made = [graphs.capture(lambda: y.copy_((x + 1).max()), "work") for _ in range(3)]
        assert torch.cuda.max_memory_reserved() - before < 1.5 * size
        x.fill_(6)
        made[-1].replay()
        assert float(y) == 7
        del made
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before < 0.5 * size


def test_the_memory_of_graphs_begins_as_one_piece() -> None:
    """Of the smallest that the allocator serves the work from: what it asks for bit by bit does not grow together."""
    x, y = torch.zeros(1 << 24, device="cuda"), torch.zeros(1, device="cuda")

    def work() -> None:
        first, second = x[: 1 << 22] + 1, x[: 1 << 22] + 2
        del first
        y.copy_((x + second[0]).max())

    tracker = follow(work, 90)
    graphs = Graphs(x.device)
    graphs.first_block = tracker.pool_bytes
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph = graphs.capture(work, "work")
    taken = torch.cuda.memory_reserved() - before
    assert taken <= tracker.pool_bytes + (40 << 20)  # cuBLAS's workspace, and the segments of small tensors
    del graph


def zeros(component: Component) -> nn.Module:
    """The component's module without a checkpoint: no memory depends on the weights' values."""
    module = component.on_meta().to_empty(device="cpu")
    with torch.no_grad():
        for x in (*module.parameters(), *module.buffers()):
            x.zero_()
    return module


@pytest.mark.parametrize("benchmark", [False, True], ids=["cuDNN's choice", "measured choice"])
@pytest.mark.parametrize(("name", "rows"), [("vae_decoder", 1), ("unet", 2)])
def test_what_libraries_take_at_full_size_fits_the_reserve(name: str, rows: int, benchmark: bool) -> None:
    """Workspaces and padded copies of cuDNN, most of all: they are in no plan."""
    device = torch.device("cuda")
    planner = Planner.of("sdxl", arch=arch_of(device))
    component = load_components(open_outline("sdxl"), torch.float16, upcast=TritonBackend.upcast)[name]
    loaded = replace(component, build=partial(zeros, component))
    engine = TritonBackend().load(loaded, device=device, cache_dir=None)
    for side in (1024, 1536):
        sizes = {"batch": rows, "height": side // 8, "width": side // 8}
        inputs = {
            spec.name: torch.zeros(spec.shape(sizes), dtype=spec.dtype, device=device)
            for spec in component.inputs
        }
        (written,) = component.outputs
        shape = output_shapes(component, inputs)[written.name]
        outputs = {written.name: torch.empty(shape, dtype=written.dtype, device=device)}
        index = torch.zeros(1, dtype=torch.int64, device=device)
        steps = Timesteps(torch.full((4,), 500.0, device=device), index)
        graphs = Graphs(device)
        graphs.first_block = planner.plan(height=side, width=side).pool_bytes({name})
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
            program = engine.bind(inputs, outputs, timesteps=steps)
            program.prepare()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = graphs.capture(program.run, name)
        torch.cuda.empty_cache()
        beside = torch.cuda.memory_reserved() - before - graphs.first_block
        assert beside <= RESERVE, f"{format_bytes(beside)} at {side}x{side}"
        del graph, program


def drawn(component: Component) -> nn.Module:
    """The component's module with random weights."""
    module = zeros(component)
    for x in module.parameters():
        nn.init.normal_(x, std=0.05)
    return module


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "as it comes"])
@pytest.mark.parametrize(("model", "name", "side"), [("demo", "unet", 32), ("sdxl", "vae_decoder", 128)])
def test_replays_over_the_same_inputs_give_the_same_bits(
    model: str, name: str, side: int, deterministic: bool
) -> None:
    """Where cuDNN is asked for it. Else it is printed how often they do not: transposed convolutions may add by
    atomics."""
    device = torch.device("cuda")
    component = load_components(open_outline(model), torch.float16, upcast=TritonBackend.upcast)[name]
    torch.manual_seed(0)
    loaded = replace(component, build=partial(drawn, component))
    engine = TritonBackend().load(loaded, device=device, cache_dir=None)
    sizes = {**component.example_sizes, "batch": 1, "height": side, "width": side}
    given = zip(component.inputs, example_inputs(component, sizes), strict=True)
    inputs = {spec.name: x.to(device) for spec, x in given}
    (spec,) = component.outputs
    written = torch.empty(output_shapes(component, inputs)[spec.name], dtype=spec.dtype, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    steps = Timesteps(torch.full((4,), 500.0, device=device), index)
    with torch.backends.cudnn.flags(enabled=True, deterministic=deterministic):
        program = engine.bind(inputs, {spec.name: written}, timesteps=steps)
        program.prepare()
        graph = Graphs(device).capture(program.run, name)
    results = []
    for _ in range(20):
        graph.replay()
        results.append(written.clone())
    assert results[0].isfinite().all()
    assert results[0].std() > 0
    others = sum(not result.equal(results[0]) for result in results)
    if deterministic:
        assert others == 0
    else:
        print(f"{name}: {others} of 19 replays gave other bits than the first")


def test_weights_that_leave_give_their_memory_back() -> None:
    weights = OffloadableWeights([torch.zeros(1 << 28)], torch.device("cuda"))
    for _ in range(2):
        there = torch.cuda.memory_reserved()
        weights.offload()
        assert torch.cuda.memory_reserved() <= there - (1 << 30)
        weights.onload()


def test_the_images_are_those_of_the_cpu(graphed: latentrt.Pipeline) -> None:
    cpu = load(backend="eager", device="cpu")
    for seed in range(3):
        found, wanted = (pipe(**CALL, seed=seed, guidance_scale=3.0).images for pipe in (graphed, cpu))
        assert np.abs(found - wanted).max() <= PIPELINE_GPU


def test_graphs_change_nothing(graphed: latentrt.Pipeline) -> None:
    """For prompts, scales, seeds, steps, sizes and samplers in any order, interruptions between them."""
    plain = load(backend="triton", graphs=False)
    rng = random.Random(0)
    for _ in range(20):
        request: dict[str, Any] = {
            **CALL,
            "prompt": rng.choice(["a green star", "a cyan ring left of a red cross on black"]),
            "seed": rng.randrange(100),
            "num_inference_steps": rng.choice([2, 5, 9]),
            "guidance_scale": rng.choice([1.0, 2.0, 4.0]),
            "num_images_per_prompt": rng.choice([1, 2]),
            "sampler": rng.choice([None, "euler-a", "dpm++2m"]),
        }
        request["height"], request["width"] = rng.choice([(128, 128), (160, 96)])
        if rng.random() < 0.3:
            graphed(**request, callback_on_step_end=lambda p, i, t, k: {"interrupt": i == 1})
        found, wanted = graphed(**request).images, plain(**request).images
        assert np.array_equal(found, wanted), request


def test_the_same_seed_gives_the_same_image_after_recording_anew(graphed: latentrt.Pipeline) -> None:
    first = graphed(**CALL, seed=7).images
    assert np.array_equal(load(backend="triton")(**CALL, seed=7).images, first)
    assert np.array_equal(graphed(**CALL, seed=7).images, first)


def test_pictures_of_the_steps_come_from_beside_the_loop(graphed: latentrt.Pipeline) -> None:
    previewer = Previewer.fit(graphed.vae, 128, 128, graphed.device)
    told: list[tuple[int, torch.Tensor]] = []
    waited: list[torch.Tensor] = []
    plain = graphed(**CALL, seed=7).images
    made = graphed(
        **CALL,
        seed=7,
        previewer=previewer,
        callback_on_progress=lambda _, done, values: told.append((done, values["preview"])),
    ).images
    graphed(
        **CALL, seed=7, callback_on_step_end=lambda p, i, t, k: waited.append(previewer(k["latents"]).cpu())
    )
    assert np.array_equal(made, plain)
    assert [done for done, _ in told] == list(range(1, 9))
    for (_, picture), wanted in zip(told, waited, strict=True):
        assert picture.equal(wanted)


def test_a_step_launches_our_kernels_once_each() -> None:
    component = load_components(open_checkpoint("demo"), torch.float16)["unet"]
    engine: Any = TritonBackend().load(component, device=torch.device("cuda"), cache_dir=None)
    sizes = {**component.example_sizes, "batch": 2, "height": 16, "width": 16}
    drawn = zip(component.inputs, example_inputs(component, sizes), strict=True)
    inputs = {spec.name: x.to("cuda") for spec, x in drawn}
    outputs = {component.outputs[0].name: torch.zeros_like(inputs["sample"])}
    steps = Timesteps(
        torch.full((4,), 500.0, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    )
    program = engine.bind(inputs, outputs, timesteps=steps)
    program.prepare()
    with counted() as counts:
        program.run()
    modules = list(engine._module.modules())
    blocks = sum(isinstance(m, TransformerBlock) for m in modules)
    norms = sum(isinstance(m, GroupNorm | GroupNormSiLU) for m in modules)
    wanted = {"attention": 2 * blocks, "geglu": blocks, "layer_norm": 3 * blocks, "apply": norms}
    assert {kind: sum(n for name, n in counts.items() if kind in name) for kind in wanted} == wanted
