"""Plans from a model's own shapes: exact parameters, counted work, and nothing read or loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.original_layout import to_original
from helpers.tiny_checkpoints import SCHEDULERS
from latentrt.errors import CheckpointNotFoundError, RequestError, WeightsMismatchError
from latentrt.kernels import as_nodes
from latentrt.runtime import weight_set
from latentrt.runtime.denoise import DenoiseState, LoopKind
from latentrt.runtime.digests import DigestMemory
from latentrt.runtime.engines.triton import TritonBackend
from latentrt.runtime.footprint import Tracker
from latentrt.runtime.loading import load_components
from latentrt.runtime.memory import POLICIES, Network, Plan
from latentrt.runtime.planner import Planner
from latentrt.runtime.sampler import SamplerConfig, build_table
from latentrt.runtime.weights import open_checkpoint
from safetensors.torch import load_file, save_file

Run = Callable[..., tuple[int, str, str]]
Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def full() -> Planner:
    """SDXL's base and refiner at their published sizes."""
    return Planner.of("sdxl", "sdxl")


@pytest.fixture(scope="module")
def single(full: Planner) -> Plan:
    """One image of 1024x1024 without guidance: one row everywhere."""
    return full.plan(guidance_scale=1.0, from_image=True)


@pytest.fixture(scope="module")
def pair(tiny: Tiny) -> Planner:
    """The tiny SDXL base and refiner."""
    return Planner.of(tiny("sdxl"), tiny("refiner"))


def test_full_size_parameters_are_exact(single: Plan) -> None:
    found = {name: network.footprint for name, network in single.networks.items()}
    assert {name: f.parameters for name, f in found.items()} == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "refiner unet": 2_259_526_660,
        "vae_encoder": 34_163_664,
        "vae_decoder": 49_490_199,
    }
    for name, f in found.items():
        assert f.weight_bytes == 2 * f.parameters
        assert single.networks[name].dtype == ("bfloat16" if name.startswith("vae") else "float16")
        assert single.networks[name].rows == 1


def test_full_size_work_is_as_counted_before(single: Plan) -> None:
    """TFLOP of one forward at 1024x1024; an operator that is not counted would be missing here."""
    table = {
        "text_encoder": 0.0133,
        "text_encoder_2": 0.0979,
        "unet": 6.761,
        "refiner unet": 7.286,
        "vae_encoder": 4.879,
        "vae_decoder": 10.470,
    }
    found = {name: n.footprint.flops / 1e12 for name, n in single.networks.items()}
    assert found == pytest.approx(table, rel=0.01)


def test_the_decoder_holds_no_more_than_it_needs_to(single: Plan) -> None:
    """The most is live in the first block of the last level: its input, that input's norm, and what is convolved of it.
    A doubling holds less, since no doubled image comes before the convolution."""
    pixels = 1024 * 1024
    channels = 256 + 256 + 128
    decoder = single.networks["vae_decoder"].footprint
    assert decoder.activation_bytes == pytest.approx(2 * channels * pixels, rel=1e-3)


def test_full_size_loop(full: Planner) -> None:
    plan = full.plan(guidance_scale=1.0, sampler="dpm++2m")
    room, image = 64, 4 * 128 * 128
    crossed = 10 * 640 + 60 * 1280  # channels of its cross-attentions
    shifted = 5 * 320 + 5 * 640 + 7 * 1280  # and of its residual blocks
    base = {name: nbytes for name, nbytes in plan.buffers.items() if name.startswith("base ")}
    assert base == {
        # Latents and three earlier ones; what the UNet takes and gives; the table; where the loop is in it.
        "base loop": 4 * 4 * image + 2 * 2 * image + 4 * room * (15 + 1) + 4 + 8,
        "base conditioning": 2 * (77 * 2048 + 1280) + 4 * 6,
        "base keys, values, times": 2 * (77 * 2 * crossed + room * shifted),
    }
    assert [stage.name for stage in plan.stages] == ["text", "base", "refiner", "decode"]
    assert plan.stages[0].calls == {
        "text_encoder": 1,
        "text_encoder_2": 1,
    }  # both experts are given the prompt


def test_what_a_sampler_keeps_and_draws_is_counted(pair: Planner) -> None:
    euler, ancestral, pndm = (
        pair.plan(height=64, width=64, batch=3, sampler=sampler).buffers["base loop"]
        for sampler in ("euler", "euler-a", "pndm")
    )
    latents = 4 * 3 * 4 * 8 * 8
    assert ancestral - euler == 64 * latents
    assert pndm - euler == 3 * latents


def test_a_planned_step_is_live_as_a_real_one(pair: Planner, tiny: Tiny) -> None:
    plan = pair.plan(height=64, width=64)
    component = load_components(open_checkpoint(tiny("sdxl")), torch.float16)["unet"]
    cpu = torch.device("cpu")
    engine = TritonBackend().load(component, device=cpu, cache_dir=None)
    told = {
        spec.name: torch.zeros(spec.shape({"batch": 2}), dtype=spec.dtype) for spec in component.inputs[2:]
    }
    table = build_table(SamplerConfig.from_dict(SCHEDULERS["sdxl"], None), 30)
    kind = LoopKind.of((1, 4, 8, 8), table, True, torch.float16)
    with torch.no_grad(), as_nodes(), Tracker() as bound:
        state = DenoiseState(kind, cpu)
        inputs = {"sample": state.sample, "timestep": state.timestep, **told}
        program = engine.bind(inputs, {"prediction": state.prediction}, timesteps=state.timesteps)
    with torch.no_grad(), as_nodes(), Tracker() as prepared:
        program.prepare()
    with torch.no_grad(), as_nodes(), Tracker() as tracker:
        state.step(program.run)
    buffers = {part: n for part, n in plan.buffers.items() if part.startswith("base ")}
    assert bound.live == buffers["base loop"] + buffers["base keys, values, times"]
    assert tracker.peak == plan.networks["unet"].footprint.activation_bytes
    (stage,) = (stage for stage in plan.stages if stage.name == "base")
    assert stage.extra_bytes == prepared.peak > 0


def test_what_a_loop_prepares_is_not_there_twice(full: Planner) -> None:
    """Keys and values of the text, and the shifts of a thousand steps, are made where they stay."""
    for steps in (30, 900):
        plan = full.plan(batch=8, steps=steps)
        made = {stage.name: stage.extra_bytes for stage in plan.stages}
        for name, least in (("base", 430e6), ("refiner", 140e6)):
            assert plan.buffers[f"{name} keys, values, times"] > least
            assert 0 < made[name] < 60e6


def test_a_plan_does_not_depend_on_those_before_it(tiny: Tiny) -> None:
    """Two rows of the UNet are two images, or one that is guided, whose step holds other temporaries."""

    def plans(*order: int) -> dict[int, Network]:
        planner = Planner.of(tiny("sdxl"))
        found: dict[int, Network] = {}
        for batch in order:
            plan = planner.plan(height=64, width=64, batch=batch, guidance_scale=1.0 if batch == 2 else 5.0)
            found[batch] = plan.networks["unet"]
        return found

    assert plans(1, 2) == plans(2, 1)


def stored_numbers(folder: Path) -> int:
    """How many numbers the weights of a component are, from its files themselves."""
    state = {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}
    return sum(t.numel() for key, t in state.items() if not key.endswith("position_ids"))


def component_bytes(plan: Plan) -> dict[str, int]:
    found = {name: network.footprint.weight_bytes for name, network in plan.networks.items()}
    found["vae"] = found.pop("vae_encoder") + found.pop("vae_decoder")
    return found


def test_bytes_of_a_checkpoint_are_exact(pair: Planner, tiny: Tiny) -> None:
    whole = component_bytes(Planner.of(tiny("sd15"), dtype=torch.float32).plan(height=64, width=64))
    assert set(whole) == {"text_encoder", "unet", "vae"}
    for name, nbytes in whole.items():
        assert nbytes == 4 * stored_numbers(tiny("sd15") / name), name
    half = component_bytes(pair.plan(height=64, width=64))
    assert set(half) == {"text_encoder", "text_encoder_2", "unet", "refiner unet", "vae"}
    for name, nbytes in half.items():
        folder = tiny("refiner" if name == "refiner unet" else "sdxl") / name.removeprefix("refiner ")
        assert nbytes == 2 * stored_numbers(folder), name


def test_bytes_of_the_demo_are_exact() -> None:
    folder = Path(weight_set.__file__).parent / "demo"
    found = component_bytes(Planner.of("demo", "demo", dtype=torch.float32).plan(height=64, width=64))
    assert set(found) == {"text_encoder", "text_encoder_2", "unet", "refiner unet", "vae"}
    for name, nbytes in found.items():
        assert nbytes == 4 * stored_numbers(folder / name.replace(" ", "/")), name


@pytest.mark.usefixtures("tiny_configs")
def test_a_single_file_is_planned_like_its_folder(tiny: Tiny, tmp_path: Path) -> None:
    folder, file = tiny("sdxl"), tmp_path / "model.safetensors"
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    states = {name: load_file(next((folder / name).glob("*.safetensors"))) for name in names}
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae")}
    save_file(to_original(states, configs), file)
    outline = open_checkpoint(file).unread()
    for name, component in load_components(outline, torch.float16).items():
        module = component.build()
        assert {p.device.type for p in module.parameters()} == {"meta"}, name
        assert {p.dtype for p in module.parameters()} == {component.dtype}


def test_no_weight_is_read(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weight_set, "_read", read)
    monkeypatch.setattr(DigestMemory, "digest", read)
    Planner.of(tiny("sdxl"), tiny("refiner")).plan(height=64, width=64)


def test_weights_that_do_not_fit_are_reported(tiny: Tiny, tmp_path: Path) -> None:
    for item in tiny("sdxl").rglob("*"):
        if item.is_file():
            target = tmp_path / item.relative_to(tiny("sdxl"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(item)
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    state = load_file(file)
    del state["conv_in.bias"]
    file.unlink()
    save_file(state, file)
    with pytest.raises(WeightsMismatchError, match=r"1 missing: conv_in\.bias"):
        Planner.of(tmp_path).plan(height=64, width=64)


def test_work_and_memory_grow_with_the_batch(pair: Planner) -> None:
    one, three = (pair.plan(height=64, width=64, batch=batch) for batch in (1, 3))
    for name in ("text_encoder", "text_encoder_2", "unet", "refiner unet"):
        a, b = one.networks[name].footprint, three.networks[name].footprint
        assert (b.flops, b.weight_bytes) == (3 * a.flops, a.weight_bytes)
        # All but the mask of the text encoders' attention.
        assert 2.7 * a.activation_bytes < b.activation_bytes <= 3 * a.activation_bytes
    assert one.networks["vae_decoder"] == three.networks["vae_decoder"]  # pictures pass one at a time
    assert three.flops(three.stages[-1]) == 3 * one.flops(one.stages[-1])
    assert three.peak("resident") > one.peak("resident")


def test_work_and_memory_grow_with_the_size(pair: Planner) -> None:
    small, large = (pair.plan(height=64 * k, width=64 * k) for k in (1, 2))
    for name in ("unet", "vae_decoder"):
        a, b = small.networks[name].footprint, large.networks[name].footprint
        # What is done to the text stays; self-attention grows with the square.
        assert (4 if name == "vae_decoder" else 2) * a.flops < b.flops < 16 * a.flops
        assert b.activation_bytes == pytest.approx(4 * a.activation_bytes, rel=0.1)
    assert small.networks["text_encoder"] == large.networks["text_encoder"]


def test_the_vae_is_upcast_where_it_would_overflow(pair: Planner, tiny: Tiny) -> None:
    """To what the back end has for that."""
    eager = Planner.of(tiny("sdxl"), backend="eager").plan(height=64, width=64).networks
    triton = pair.plan(height=64, width=64).networks
    for name, dtype in (("vae_decoder", "float32"), ("vae_encoder", "float32"), ("unet", "float16")):
        assert eager[name].dtype == dtype
    assert {triton[name].dtype for name in ("vae_decoder", "vae_encoder")} == {"bfloat16"}
    assert eager["vae_decoder"].footprint.weight_bytes == 2 * triton["vae_decoder"].footprint.weight_bytes
    # What triton makes once for a prompt, eager makes in every step.
    assert eager["unet"].footprint.activation_bytes > triton["unet"].footprint.activation_bytes


def test_guidance_doubles_the_rows(tiny: Tiny) -> None:
    planner = Planner.of(tiny("sd15"))
    with_, without = (planner.plan(height=64, width=64, guidance_scale=scale) for scale in (7.5, 1.0))
    assert (with_.networks["unet"].rows, without.networks["unet"].rows) == (2, 1)
    assert (with_.stages[0].calls, without.stages[0].calls) == ({"text_encoder": 2}, {"text_encoder": 1})


def test_steps_are_split_as_the_pipeline_splits_them(pair: Planner) -> None:
    stages = pair.plan(height=64, width=64, steps=30, high_noise_frac=0.8).stages
    # diffusers cuts at the timestep 200, where "leading" spacing of 30 steps has passed 23 of them.
    assert [dict(stage.calls) for stage in stages[1:3]] == [{"unet": 23}, {"refiner unet": 7}]
    alone = pair.plan(height=64, width=64, steps=10, high_noise_frac=1.0)
    assert [stage.name for stage in alone.stages] == ["text", "base", "decode"]
    assert "refiner unet" not in alone.networks


def test_a_refiner_alone(tiny: Tiny) -> None:
    plan = Planner.of(tiny("refiner")).plan(height=64, width=64, from_image=True)
    assert [stage.name for stage in plan.stages] == ["text", "encode", "refiner", "decode"]
    assert set(plan.stages[2].calls) == {"unet"}


def test_a_second_encoder_of_other_shapes_is_not_shared(tiny: Tiny) -> None:
    plan = Planner.of(tiny("sdxl"), "demo-refiner").plan(height=64, width=64)
    assert plan.stages[0].calls == {"text_encoder": 1, "text_encoder_2": 1, "refiner text_encoder_2": 2}


def test_what_is_on_disk_comes_before_a_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sdxl").symlink_to(tiny("sdxl"))
    plan = Planner.of("sdxl").plan()
    assert plan.subject == "sdxl at 128x128, batch 1, float16"
    assert plan.networks["unet"].footprint.parameters < 10**7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 60}, "width is 60; it must be a multiple of 8, such as 64"),
        ({"height": 0}, "height is 0; it must be 8 to 16384"),
        ({"batch": 0}, "batch is 0; it must be 1 to 1024"),
        ({"steps": 0}, "0 steps were asked for"),
        ({"sampler": "heun"}, "there is no sampler 'heun'"),
        ({"high_noise_frac": 1.5}, r"^high_noise_frac is 1\.5; it must be between 0 and 1$"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number; got nan"),
    ],
)
def test_requests_that_cannot_be_met(arguments: dict[str, Any], message: str, pair: Planner) -> None:
    with pytest.raises(RequestError, match=message):
        pair.plan(**arguments)


def test_the_command(run_cli: Run, tiny: Tiny) -> None:
    options = ("--refiner", str(tiny("refiner")), "--size", "64x48", "--batch", "2", "--memory-limit", "1GB")
    code, out, err = run_cli("plan", str(tiny("sdxl")), *options)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith("at 64x48, batch 2, float16")
    firsts = [line.split()[0] for line in lines[1:] if line]
    assert firsts == [
        *("one", "text_encoder", "text_encoder_2", "unet", "refiner", "vae_encoder", "vae_decoder"),
        *("stage", "text", "base", "refiner", "decode", "all"),
        *("device", "resident", "balanced", "low", "of"),
    ]


def test_the_command_refuses_what_does_not_fit_and_says_all_there_is(run_cli: Run, tiny: Tiny) -> None:
    options = ("--size", "64x64", "--gpu", "rtx 4090", "--memory-limit", "200MB", "--memory", "low", "--json")
    code, out, err = run_cli("plan", str(tiny("sd15")), *options)
    told = json.loads(out)
    assert (code, told["gpu"]["name"], told["networks"]["unet"]["rows"]) == (1, "RTX 4090", 2)
    assert set(told["policies"]) == {"resident", "balanced", "low"}
    assert err.startswith("latentrt: ")
    assert "of device memory with memory='low' (text " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "60x64"), "width is 60; it must be a multiple of 8, such as 64"),
        (("--gpu", "Voodoo"), "no ceilings are known for the GPU 'Voodoo'; there are H200"),
        (("--high-noise-frac", "nan"), "high_noise_frac must be a finite number; got nan"),
        (("--high-noise-frac", "2"), "high_noise_frac is 2.0; it must be between 0 and 1"),
        (
            ("--memory-limit", "much"),
            "--memory-limit: 'much' is no amount of memory; write such as 20GB or 500MB",
        ),
        (("--refiner", "/no/refiner"), "'/no/refiner' is not a local folder or file"),
    ],
)
def test_the_commands_refusals(arguments: tuple[str, ...], message: str, run_cli: Run, tiny: Tiny) -> None:
    code, out, err = run_cli("plan", str(tiny("sdxl")), *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("latentrt: ")
    assert message in err


def test_the_policies_of_the_command_line_are_those_there_are(run_cli: Run) -> None:
    code, out, err = run_cli("plan", "demo", "--memory", "fast")
    assert (code, out) == (2, "")
    for policy in POLICIES:
        assert policy in err.partition("choose from")[2]


def test_an_unknown_model() -> None:
    with pytest.raises(CheckpointNotFoundError, match="'sdxxl' is not a local folder or file"):
        Planner.of("sdxxl")


def test_attention_of_plain_pytorch_is_planned_as_fused() -> None:
    """No scores of all tokens beside all: at 1024x1024 one block's alone would be more than the whole."""
    scores = 2 * 10 * 4096**2 * torch.float16.itemsize  # two rows, ten heads
    found = {}
    for backend in ("triton", "eager"):
        planner = Planner.of("sdxl", backend=backend)  # type: ignore[arg-type]
        found[backend] = planner.plan().networks["unet"].footprint
    assert found["eager"].pool_bytes < scores
    assert found["eager"].flops == found["triton"].flops
