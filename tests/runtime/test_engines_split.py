"""`runtime/engines/split.py`: a UNet as three engines: together they are the whole, in a call and in the loop, on a
stand-in for TensorRT too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from helpers.fake_tensorrt import FakeCuda, FakeTensorRT, install
from helpers.loops import run_loop
from latentrt.errors import BackendError, RequestError
from latentrt.runtime.denoiser import Denoiser
from latentrt.runtime.engine_store import EngineTarget, StoredEngine
from latentrt.runtime.engines import tensorrt as backends
from latentrt.runtime.engines.base import STEPS_AT_ONCE, Availability, Component, Engine, Timesteps
from latentrt.runtime.engines.eager import EagerBackend, EagerEngine
from latentrt.runtime.engines.lazy import EngineLoader
from latentrt.runtime.engines.products import product
from latentrt.runtime.engines.scratch import Scratch
from latentrt.runtime.engines.sizes import Axis, Profile, SizePolicy, profiles_for
from latentrt.runtime.engines.split import SplitUNet, in_parts
from latentrt.runtime.engines.tensorrt import TensorRTEngine
from latentrt.runtime.graph import Graphs
from latentrt.runtime.loading import load_components
from latentrt.runtime.sampler import build_table
from latentrt.runtime.sampler_config import SamplerConfig
from latentrt.runtime.weights import open_checkpoint
from tolerances import MODEL, relative_error

CPU = torch.device("cpu")
CONFIGS = {
    "sdxl": tiny.UNET,
    "lcm": {**tiny.UNET, "time_cond_proj_dim": 12},
    "plain": {
        **tiny.UNET,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    },
}
ANY = Profile({name: Axis(1, 2, 10_000) for name in ("batch", "height", "width", "tokens")})


def eager(parts: Sequence[Component]) -> list[Engine]:
    return [EagerEngine(part, CPU) for part in parts]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeTensorRT, FakeCuda]:
    return install(monkeypatch, {})


@pytest.fixture
def tensorrt(stand_in: tuple[FakeTensorRT, FakeCuda], tmp_path: Path) -> Callable[..., list[Engine]]:
    """Engines of TensorRT's, which share their scratch memory."""
    scratch = Scratch(CPU)

    def load(parts: Sequence[Component]) -> list[Engine]:
        engines: list[Engine] = []
        for part in parts:
            plan = tmp_path / part.name / "model.plan"
            plan.parent.mkdir()
            plan.write_text(part.fingerprint)
            stand_in[0].plans[part.fingerprint.encode()] = part
            axes = {d: ANY.axes[d] for spec in part.inputs for d in spec.dims if isinstance(d, str)}
            stored = StoredEngine("0", plan, (Profile(axes),), {}, {}, False)
            engines.append(TensorRTEngine(part, stored, product("tensorrt"), CPU, scratch))
        return engines

    return load


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_parts_share_out_the_parameters(config: dict[str, Any]) -> None:
    component = tiny.unet(config=config)
    prompt, time, step = in_parts(component)
    assert [part.name for part in (prompt, time, step)] == ["unet.prompt", "unet.time", "unet.step"]
    assert len({part.fingerprint for part in (component, prompt, time, step)}) == 4
    names = [
        {key.removeprefix("unet."): x for key, x in part.build().state_dict().items()}
        for part in (prompt, time, step)
    ]
    whole = component.build().state_dict()
    assert sorted(key for each in names for key in each) == sorted(whole)
    assert all(torch.equal(x, whole[key]) for each in names for key, x in each.items())
    # A step takes nothing that needs the text or the time but what was made of them.
    given = {spec.name for spec in step.inputs}
    assert given - {spec.name for part in (prompt, time) for spec in part.outputs} == {"sample"}
    blocks = [key for key in whole if key.endswith("attn2.to_k.weight")]
    assert sum(spec.name.startswith("keys_") for spec in step.inputs) == len(blocks) == 4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_call_is_the_whole(config: dict[str, Any]) -> None:
    component = tiny.unet(config=config)
    engine = SplitUNet(component, eager(in_parts(component)))
    inputs = tiny.named_inputs(component, batch=3, height=7)
    wanted = EagerEngine(component, CPU)(inputs)
    found = engine(inputs)
    assert list(found) == list(wanted)
    assert torch.equal(found["out_sample"], wanted["out_sample"])
    with pytest.raises(BackendError, match=r"unet takes sample, timestep, .*; got sample"):
        engine({"sample": inputs["sample"]})
    engine.close()
    with pytest.raises(BackendError, match="was closed"):
        engine(inputs)


@pytest.mark.parametrize("steps", [3, STEPS_AT_ONCE + 5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["eager", "tensorrt"])
def test_a_loop_is_the_whole_at_every_timestep_and_for_another_prompt(
    kind: str, config: dict[str, Any], steps: int, tensorrt: Any, stand_in: tuple[FakeTensorRT, FakeCuda]
) -> None:
    component = tiny.unet(config=config)
    reference = EagerEngine(component, CPU)
    parts = in_parts(component)
    engine = SplitUNet(component, {"eager": eager, "tensorrt": tensorrt}[kind](parts))
    inputs = tiny.named_inputs(component, batch=2)
    static = {name: torch.zeros_like(x) for name, x in inputs.items()}
    outputs = {"out_sample": torch.zeros_like(static["sample"])}
    timesteps = Timesteps(torch.zeros(steps), torch.zeros(1, dtype=torch.int64))
    program = engine.bind(static, outputs, timesteps=timesteps)
    fake = stand_in[0]
    for prompt in (1, 2):
        inputs = tiny.named_inputs(component, prompt, batch=2)
        for key, x in inputs.items():
            static[key].copy_(x)
        timesteps.values.copy_(torch.linspace(999, 0, steps))
        fake.calls.clear()
        program.prepare()
        prepared = len(fake.named("execute_async_v3"))
        chosen = (0, 1, steps - 1)
        for step in chosen:
            timesteps.index.fill_(step)
            static["sample"].normal_()
            program.run()
            now = {**inputs, "sample": static["sample"], "timestep": timesteps.values[step].expand(2)}
            assert relative_error(outputs["out_sample"], reference(now)["out_sample"]) < MODEL
        if (
            kind == "tensorrt"
        ):  # the text once, the times in two runs where they are many, then the steps alone
            assert program.capturable
            assert prepared == 1 + (2 if steps > STEPS_AT_ONCE else 1)
            assert len(fake.named("execute_async_v3")) == prepared + len(chosen)
            assert fake.named("set_tensor_address") == []


def test_what_a_step_reads_is_aligned(tensorrt: Any) -> None:
    component = tiny.unet(torch.float16)
    engine = SplitUNet(component, tensorrt(in_parts(component)))
    static = tiny.named_inputs(component, batch=3)
    timesteps = Timesteps(torch.zeros(4), torch.zeros(1, dtype=torch.int64))
    program: Any = engine.bind(
        static, {"out_sample": torch.zeros_like(static["sample"])}, timesteps=timesteps
    )
    places = program._places.values()
    assert len(places) == 8
    assert all(place.start * 2 % 256 == 0 for place in places)
    assert all(a.stop <= b.start for a, b in zip(list(places), list(places)[1:], strict=False))


def test_a_step_is_recorded_and_replayed_for_other_prompts_and_times() -> None:
    component = tiny.unet()
    engine = SplitUNet(component, [_capturable(part) for part in in_parts(component)])
    static = tiny.named_inputs(component, batch=2)
    outputs = {"out_sample": torch.zeros_like(static["sample"])}
    timesteps = Timesteps(torch.zeros(5), torch.zeros(1, dtype=torch.int64))
    program = engine.bind(static, outputs, timesteps=timesteps)
    program.prepare()
    graph = Graphs(CPU).capture(program.run, "a step")
    reference = EagerEngine(component, CPU)
    for seed in (1, 2):
        for name, x in tiny.named_inputs(component, seed, batch=2).items():
            static[name].copy_(x)
        timesteps.values.copy_(torch.tensor([900.0, 500.0, 20.0, 1.0, 0.0]))
        program.prepare()
        for step in (0, 3):
            timesteps.index.fill_(step)
            graph.replay()
            now = {**static, "timestep": timesteps.values[step].expand(2)}
            assert relative_error(outputs["out_sample"], reference(now)["out_sample"]) < MODEL


def _capturable(part: Component) -> Engine:
    return EagerBackend().load(part, device=CPU, cache_dir=None)


def test_the_denoiser_runs_the_parts() -> None:
    """Through the loop of a pipeline, its steps recorded: equal to the whole, for runs of different lengths."""
    component = tiny.unet()

    class Split(EagerBackend):
        def load(self, component: Component, *, device: torch.device, cache_dir: Path | None) -> Engine:
            return SplitUNet(component, eager(in_parts(component)))

    loaders = [EngineLoader("eager", CPU, torch.float32, None, graphs) for graphs in (False, True)]
    loaders[1].backend = Split()
    whole, parts = (Denoiser(loader.engine(component)) for loader in loaders)
    for seed, steps in enumerate((2, 5)):
        table = build_table(SamplerConfig.from_dict({"_class_name": "EulerDiscreteScheduler"}), steps)
        latents = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(seed))
        constants = tiny.named_inputs(component, seed, batch=2)
        del constants["sample"], constants["timestep"]
        found, wanted = (
            run_loop(loop, latents, table, constants, guidance_scale=5.0) for loop in (parts, whole)
        )
        assert relative_error(found, wanted) < MODEL


@pytest.mark.parametrize("model", ["demo", "demo-refiner"])
def test_the_parts_of_a_checkpoint_read_only_their_weights(model: str) -> None:
    components = load_components(open_checkpoint(model), torch.float32)
    whole = components["unet"].build().state_dict()
    found = [part.build().state_dict() for part in in_parts(components["unet"])]
    assert sum(len(each) for each in found) == len(whole)
    assert all(not x.is_meta for each in found for x in each.values())
    assert [name for name, component in components.items() if len(in_parts(component)) > 1] == ["unet"]


def test_the_sizes_of_the_parts() -> None:
    component = load_components(open_checkpoint("demo"), torch.float16)["unet"]
    asked = SizePolicy.parse(["64..128 step 8"], "2..4")
    prompt, time, step = (profiles_for(part, asked)[0].axes for part in in_parts(component))
    assert list(prompt) == list(time) == ["batch"]
    assert str(prompt["batch"]) == "1..8"
    assert (time["batch"].low, time["batch"].high) == (1, 8 * STEPS_AT_ONCE)
    assert str(step["batch"]) == "2..8"
    assert str(step["height"]) == "8..16"


@pytest.mark.parametrize("split", [False, True])
def test_a_back_end_takes_the_engines_that_are_asked_for(
    split: bool, stand_in: tuple[FakeTensorRT, FakeCuda], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    component, asked = tiny.unet(), []

    def engine(part: Component, target: EngineTarget, **options: Any) -> StoredEngine:
        asked.append(part.name)
        plan = tmp_path / part.name
        plan.write_text(part.fingerprint)
        stand_in[0].plans[part.fingerprint.encode()] = part
        return StoredEngine("0", plan, (ANY,), {}, {}, False)

    monkeypatch.setattr(backends, "find_or_build_engine", engine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(
        backends.TensorRTBackend, "availability", lambda self, device, dtype: Availability(True)
    )
    monkeypatch.setenv("LATENTRT_SPLIT", str(int(split)))
    loaded = backends.TensorRTBackend().load(component, device=CPU, cache_dir=None)
    names = ["unet.prompt", "unet.time", "unet.step"]
    assert asked == (names if split else ["unet"])
    assert isinstance(loaded, SplitUNet) == split
    assert loaded.entry == tmp_path
    backends.TensorRTBackend(split=not split).load(component, device=CPU, cache_dir=None)
    assert asked[-1] == ("unet" if split else "unet.step")


def test_a_switch_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_SPLIT", "yes")
    with pytest.raises(RequestError, match="LATENTRT_SPLIT is 'yes'; it can be 0 or 1"):
        backends._switch("LATENTRT_SPLIT")
