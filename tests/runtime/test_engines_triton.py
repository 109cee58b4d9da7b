"""`runtime/engines/triton.py`: the back end over the project's kernels: on the CPU, where its operators are their
references."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_components
from latentrt.kernels._dispatch import forced
from latentrt.kernels._triton import counted
from latentrt.runtime.engines.base import Component, Timesteps, example_inputs
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.engines.lazy import EngineLoader
from latentrt.runtime.engines.triton import TritonBackend
from latentrt.runtime.graph import Graphs
from latentrt.runtime.loading import load_vae
from latentrt.runtime.models.layers import GroupNorm, GroupNormSiLU
from latentrt.runtime.models.unet_blocks import TransformerBlock
from latentrt.runtime.weights import open_checkpoint
from tolerances import MODEL, relative_error
from torch import Tensor

CPU = torch.device("cpu")
LCM = {**tiny_components.UNET, "time_cond_proj_dim": 12}
MAKERS = [tiny_components.unet, tiny_components.vae_decoder, tiny_components.vae_encoder]
MAKERS += [tiny_components.text_encoder]
UNETS = [pytest.param(tiny_components.UNET, id="sdxl"), pytest.param(LCM, id="lcm")]


def load(component: Component, backend: Any) -> Any:
    return backend.load(component, device=CPU, cache_dir=None)


def inputs_of(component: Component, seed: int = 0) -> dict[str, Tensor]:
    sizes = {**component.example_sizes, "batch": 2}
    return {
        spec.name: x for spec, x in zip(component.inputs, example_inputs(component, sizes, seed), strict=True)
    }


@pytest.mark.parametrize(
    "make",
    [
        tiny_components.unet,
        tiny_components.vae_decoder,
        tiny_components.vae_encoder,
        tiny_components.text_encoder,
    ],
)
def test_a_call_is_eager_pytorch(make: Any) -> None:
    component = make()
    inputs = inputs_of(component)
    wanted = load(component, EagerBackend())(inputs)
    found = load(component, TritonBackend())(inputs)
    for name, value in wanted.items():
        assert relative_error(found[name], value) < MODEL, name


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("config", UNETS)
def test_a_bound_unet_is_eager_pytorch_at_every_timestep_and_for_another_prompt(
    config: dict[str, Any], recorded: bool
) -> None:
    component = tiny_components.unet(config=config)
    reference, engine = load(component, EagerBackend()), load(component, TritonBackend())
    static = {name: torch.zeros_like(x) for name, x in inputs_of(component).items()}
    name = component.outputs[0].name
    outputs = {name: torch.zeros_like(static["sample"])}
    timesteps = Timesteps(torch.zeros(5), torch.zeros(1, dtype=torch.int64))
    program = engine.bind(static, outputs, timesteps=timesteps)
    program.prepare()
    run = Graphs(CPU).capture(program.run, "a step").replay if recorded else program.run
    for prompt in (1, 2):
        inputs = inputs_of(component, seed=prompt)
        for key, x in inputs.items():
            static[key].copy_(x)
        timesteps.values.copy_(torch.tensor([999.0, 731.5, 400.0, 1.0, 0.0]))
        program.prepare()
        for step, value in enumerate(timesteps.values):
            timesteps.index.fill_(step)
            static["sample"].normal_()
            run()
            now = {**inputs, "sample": static["sample"], "timestep": value.expand(2)}
            assert relative_error(outputs[name], reference(now)[name]) < MODEL


def test_shifts_of_many_steps_are_those_of_a_few() -> None:
    """They are made some at a time, as all at once would take their memory twice."""
    component = tiny_components.unet()
    engine, inputs = load(component, TritonBackend()), inputs_of(component)
    values, index = torch.linspace(999, 0, 150), torch.zeros(1, dtype=torch.int64)
    outputs = {component.outputs[0].name: torch.zeros_like(inputs["sample"])}

    def shifts(some: Tensor) -> Tensor:
        program = engine.bind(inputs, outputs, timesteps=Timesteps(some, index))
        program.prepare()
        return program._shifts  # type: ignore[no-any-return]

    assert torch.equal(shifts(values), torch.cat([shifts(part) for part in values.split(64)]))


def test_what_a_step_does_beside_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text's products and the time's are not in it, and of all blocks' shifts it is one copy."""
    component = tiny_components.unet()
    engine, inputs = load(component, TritonBackend()), inputs_of(component)
    seen: list[Tensor] = []

    def network(sample: Tensor, shifts: Iterable[Tensor], texts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        seen.extend(shifts)
        seen.extend(x for pair in texts for x in pair)
        return torch.zeros_like(sample)

    monkeypatch.setattr(engine._module, "step", network)
    outputs = {component.outputs[0].name: torch.zeros_like(inputs["sample"])}
    timesteps = Timesteps(torch.full((2,), 500.0), torch.zeros(1, dtype=torch.int64))
    program = engine.bind(inputs, outputs, timesteps=timesteps)
    graph: Any = Graphs(CPU).capture(program.run, "a step")
    views = ("view", "split", "select", "detach")
    names = [func.overloadpacket.__name__ for func, *_ in graph._operations]
    copies = [name for name in names if not name.startswith(views)]
    # The shifts, the channels put last, the network and its output.
    assert copies == ["index_select", "contiguous", "zeros_like", "copy_"]
    assert len(seen) > 4
    assert all(x.is_contiguous() for x in seen if x.ndim == 2)


def test_weights_are_packed_without_a_second_copy() -> None:
    engine = load(tiny_components.unet(), TritonBackend())
    block = next(m for m in engine._module.modules() if isinstance(m, TransformerBlock))
    own = {
        linear.weight.untyped_storage().data_ptr()
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
    }
    assert own == {block.attn1.to_qkv.untyped_storage().data_ptr()}
    crossed = {
        linear.weight.untyped_storage().data_ptr()
        for m in engine._module.modules()
        if isinstance(m, TransformerBlock)
        for linear in (m.attn2.to_k, m.attn2.to_v)
    }
    assert len(crossed) == 1


def test_images_have_their_channels_last() -> None:
    engine = load(tiny_components.vae_decoder(), TritonBackend())
    convolutions = [m.weight for m in engine._module.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)


def test_a_step_through_the_kernels_themselves() -> None:
    """In Triton's interpreter: every operator of a step is launched, and the step computes the same."""
    component = tiny_components.unet()
    engine, inputs = load(component, TritonBackend()), inputs_of(component)
    name = component.outputs[0].name
    outputs = {name: torch.zeros_like(inputs["sample"])}
    timesteps = Timesteps(torch.full((2,), 500.0), torch.zeros(1, dtype=torch.int64))
    program = engine.bind(inputs, outputs, timesteps=timesteps)
    program.prepare()
    program.run()
    wanted = outputs[name].clone()
    with forced(), counted() as counts:
        program.run()
    assert relative_error(outputs[name], wanted) < MODEL
    modules = list(engine._module.modules())
    blocks = sum(isinstance(m, TransformerBlock) for m in modules)
    norms = sum(isinstance(m, GroupNorm | GroupNormSiLU) for m in modules)
    launches = {"attention": 2 * blocks, "geglu": blocks, "layer_norm": 3 * blocks, "apply": norms}
    assert {kind: sum(n for key, n in counts.items() if kind in key) for kind in launches} == launches


def test_a_vae_that_overflows_in_float16_runs_in_bfloat16(tiny: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny("sdxl"))
    half, whole = (
        load_vae(checkpoint, EngineLoader(name, CPU, dtype, None))
        for name, dtype in (("triton", torch.float16), ("eager", torch.float32))
    )
    assert half.dtype == torch.bfloat16
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, wanted = half.decode(latents), whole.decode(latents)
    assert (found - wanted).abs().max() < 8 * torch.finfo(torch.bfloat16).eps  # of an image in [0, 1]
