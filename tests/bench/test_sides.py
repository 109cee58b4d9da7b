"""`bench/latentrt_side.py`, `diffusers_side.py` and `onnxruntime_side.py`: every side that runs on a CPU makes the
same pictures of the same checkpoint, and reports the same stages."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.planted_sides import planted
from latentrt.bench import latentrt_side, onnxruntime_side
from latentrt.bench.cases import Case, sides_named
from latentrt.bench.diffusers_side import DiffusersSide, load_pipelines, open_side
from latentrt.bench.gates import GATES, likeness
from latentrt.bench.latentrt_side import LatentrtSide
from latentrt.bench.random_checkpoint import PUBLISHED, write_checkpoint, write_weights
from latentrt.bench.results import CaseResult
from latentrt.bench.run import CaseRun, Plan
from latentrt.bench.side import factory
from latentrt.bench.worker import Job, Worker
from latentrt.errors import BackendUnavailableError, RequestError
from latentrt.runtime.engines.eager import EagerBackend
from latentrt.runtime.latents import NoiseSource
from latentrt.runtime.parts import load_parts

SMALL_UNET = {
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": 1,
    "attention_head_dim": [2, 4, 4],
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
SMALL_VAE = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1}
SMALL_TEXT = {"num_hidden_layers": 2}


def measured(case: Case, names: list[str], folder: Path) -> CaseResult:
    run = CaseRun(
        case,
        sides_named(names),
        Plan(["a cat", "a red dog"], GATES["eager"], rounds=2, pictures=2),
        steps={"base": 1, "refiner": 1},
        device="cpu",
        folder=folder,
        open_host=Worker,
    )
    run.measure()
    return run.result()


def check(result: CaseResult, stages: set[str]) -> None:
    for row in result.rows:
        assert (row.status, row.reason) == ("measured", ""), row.side
        for figures in row.batches:
            assert figures.stages.keys() >= stages, row.side
            assert sum(s for k, s in figures.stages.items() if not k.endswith("_step")) <= max(
                figures.seconds
            )
            assert figures.psnr > 100, row.side
    assert result.reference == "diffusers"


@pytest.fixture
def case(tiny: Callable[..., Path]) -> Case:
    model, refiner = (str(tiny(kind)) for kind in ("sdxl", "refiner"))
    return Case("tiny", "random", model, refiner, size=(64, 64), batches=(1, 2), steps=2, high_noise_frac=0.5)


@pytest.mark.parametrize(("share", "stages"), [(1.0, {"text", "base"}), (0.0, {"text", "refiner"})])
def test_diffusers_does_latentrts_work_where_one_expert_takes_all(
    share: float, stages: set[str], case: Case, tmp_path: Path
) -> None:
    """diffusers' own arguments would have the base take all steps at 0, and the refiner some at 1."""
    case = replace(case, high_noise_frac=share)
    prompts, seeds = ["a cat", "a red dog"], [3, 4]
    made = []
    for spec in sides_named(["diffusers", "latentrt-eager"]):
        side = factory(spec)(case, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
        assert side.settings.endswith(", VAE in float32")
        made.append(side(prompts, seeds))
    assert {span.name for span in made[0].spans} == {*stages, "decode"}
    assert likeness(made[0].images, made[1].images)[0] > 100


@pytest.mark.parametrize("upcast", [torch.float32, torch.bfloat16])
def test_a_vae_that_float16_would_overflow_is_upcast_once(case: Case, upcast: torch.dtype) -> None:
    base, refiner = load_pipelines(case, torch.device("cpu"), torch.float16, upcast=upcast)
    assert base.vae.config.force_upcast
    assert (base.unet.dtype, base.vae.dtype) == (torch.float16, upcast)
    assert refiner.vae is base.vae
    latents = torch.zeros((1, base.vae.config.latent_channels, 8, 8), dtype=torch.float16)
    with torch.no_grad():
        assert base.vae.decode(latents, return_dict=False)[0].dtype == upcast
    side = DiffusersSide(case, torch.device("cpu"), base, refiner, "eager")
    assert side.settings == f"eager, VAE in {str(upcast).removeprefix('torch.')}"
    # What the pipelines ask before they move it for a picture.
    assert not (base.vae.dtype == torch.float16 and base.vae.config.force_upcast)


@pytest.mark.parametrize(
    ("place", "there", "dtype"),
    [
        ("cuda", False, torch.bfloat16),
        ("cuda", True, torch.float32),
        ("cpu", False, torch.float32),
    ],
)
def test_the_eager_reference_decodes_as_triton_does_where_diffusers_is_not_there(
    place: str, there: bool, dtype: torch.dtype, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 its decoder would flatter every speedup."""
    monkeypatch.setattr(
        latentrt_side, "load_parts", lambda *args, **how: load_parts(*args, **{**how, "device": "cpu"})
    )
    monkeypatch.setattr("latentrt.bench.cases.find_spec", lambda name: object() if there else None)
    made = {}
    for name in ("latentrt-eager", "latentrt-eager@float32"):
        (spec,) = sides_named([name])
        exact = torch.float32 if spec.dtype else torch.float16
        made[name] = factory(spec)(case, torch.device(place), exact, tmp_path, **spec.options)
    half, exact = made.values()
    assert (half._pipe.vae.dtype, exact._pipe.vae.dtype) == (dtype, torch.float32)
    assert f"VAE in {str(dtype).removeprefix('torch.')}" in half.settings
    assert EagerBackend.upcast == torch.float32  # of any other pipeline
    images = half(["a cat"], [3]).images
    assert np.isfinite(images).all()


def test_plain_onnx_runtime_says_that_it_takes_no_bfloat16(case: Case, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="takes no bfloat16; measure it in float32 or float16"):
        onnxruntime_side.open_side(case, torch.device("cpu"), torch.bfloat16, tmp_path)
    assert not any(tmp_path.iterdir())


def test_plain_onnx_runtime_exports_nothing_that_it_could_not_run(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime_side, "load_pipelines", lambda *_: pytest.fail("minutes are spent"))
    with pytest.raises(BackendUnavailableError, match="this onnxruntime is built without CUDA"):
        onnxruntime_side.open_side(case, torch.device("cuda"), torch.float16, tmp_path)


@pytest.mark.parametrize(
    ("backend", "place", "tries"),
    [
        ("triton", "cuda", True),
        ("eager", "cuda", True),
        ("tensorrt", "cuda", False),
        ("triton", "cpu", False),
    ],
)
def test_convolutions_of_pytorch_are_set_up_alike_on_both_sides(
    backend: str, place: str, tries: bool, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    vae = SimpleNamespace(dtype=torch.float16)
    pipe: Any = SimpleNamespace(backend=backend, device=torch.device(place), vae=vae)
    side = LatentrtSide(case, pipe)
    assert torch.backends.cudnn.benchmark is tries
    assert ("cudnn.benchmark" in side.settings) is tries


def test_latentrts_eager_modules_run_as_diffusers_does(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand in for it: without CUDA graphs, which are the default on a GPU, and in the quicker layout, without
    the other one's weights."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        latentrt_side,
        "load_parts",
        lambda *args, **options: asked.update(options) or load_parts(*args, **options),
    )
    (spec,) = sides_named(["latentrt-eager"])
    side: Any = factory(spec)(case, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
    assert asked["graphs"] is False
    vae = SimpleNamespace(dtype=torch.float16)
    on_gpu: Any = SimpleNamespace(backend="eager", device=torch.device("cuda"), vae=vae)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert type(side)(case, on_gpu).settings.endswith(", no CUDA graphs")

    before = side(["a cat"], [3]).images
    seen: list[Any] = []

    def weight() -> torch.Tensor:
        engines = [lazy.load() for lazy in side._pipe._loader._engines if lazy.component.name == "unet"]
        assert len(engines) == 2  # base and refiner
        return engines[0]._module.conv_in.weight

    def seconds(place: torch.device) -> float:
        seen.append(weight().is_contiguous(memory_format=torch.channels_last))
        return time.perf_counter() + 1000 * (not seen[-1])

    monkeypatch.setattr("latentrt.bench.side.now", seconds)
    side.tune()
    assert seen == [False] * 3 + [True] * 3
    assert weight().is_contiguous(memory_format=torch.channels_last)
    assert side.settings.endswith(", channels_last")
    assert side._pipe.backend == "eager"
    assert likeness(side(["a cat"], [3]).images, before)[0] > 100


@pytest.mark.parametrize("name", ["diffusers", "latentrt-eager"])
def test_an_eager_side_is_laid_out_as_it_was_tuned_before(
    name: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the other layout would be quicker this time."""
    later = itertools.count()
    monkeypatch.setattr("latentrt.bench.side.now", lambda device: time.perf_counter() + 1000 * next(later))
    (spec,) = sides_named([name])
    side = factory(spec)(case, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
    before = side.settings
    side.tune("channels_last")
    assert side.settings == f"{before}, channels_last"
    assert side.memory_format == "channels_last"


def test_random_weights_are_drawn_where_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's stand-in: its numbers are the CPU's, and its memory is given back."""
    shapes = {"a.weight": torch.Size([8, 4]), "a.bias": torch.Size([8])}
    write_weights(tmp_path / "cpu", shapes)
    drawn: list[Any] = []
    plain, generator = torch.randn, torch.Generator

    def randn(shape: torch.Size, *, generator: Any, device: torch.device) -> torch.Tensor:
        drawn.append(device)
        return plain(shape, generator=generator)

    monkeypatch.setattr(torch, "Generator", lambda device: drawn.append(device) or generator())
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: drawn.append("given back"))
    cuda = torch.device("cuda")
    write_weights(tmp_path / "cuda", shapes, cuda)
    assert drawn == [cuda, cuda, "given back"]
    assert (tmp_path / "cuda").read_bytes() == (tmp_path / "cpu").read_bytes()


class StandIn:
    """As much of diffusers' pipeline as a side touches, and what was asked of it."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.compiled: dict[str, Any] = {}
        self.formats: list[Any] = []
        self.fused = 0
        self.asked: dict[str, Any] = {}
        config = SimpleNamespace(in_channels=4)
        self.unet = SimpleNamespace(
            dtype=dtype,
            config=config,
            to=self._to,
            compile=self.compiled.update,
            fuse_qkv_projections=self.fuse_qkv_projections,
        )
        self.vae = SimpleNamespace(dtype=dtype, to=self._to, decode=lambda latents: latents)
        self.scheduler = SimpleNamespace(scale_model_input=None)
        self.encode_prompt = lambda: None
        self.vae_scale_factor, self.default_sample_size = 8, 16

    def _to(self, memory_format: Any) -> None:
        self.formats.append(memory_format)

    def fuse_qkv_projections(self) -> None:
        self.fused += 1

    def __call__(self, **asked: Any) -> Any:
        self.asked = asked
        return SimpleNamespace(images=np.zeros((len(asked["prompt"]), 8, 8, 3), np.float32))


def test_every_side_begins_from_the_same_noise_in_half_precision() -> None:
    """Drawn in float32 and rounded; PyTorch draws float16 by another way."""
    case = Case("half", "", "none", size=(96, 128), dtype="float16", negative="blurry")
    base = StandIn()
    DiffusersSide(case, torch.device("cpu"), base, None, "")(["a", "b"], [3, 4])
    wanted = NoiseSource([torch.Generator().manual_seed(seed) for seed in (3, 4)], 2).draw((4, 12, 16))
    assert torch.equal(base.asked["latents"], wanted.half())
    assert base.asked["negative_prompt"] == ["blurry", "blurry"]
    # What the steps draw goes on from there.
    drawn = base.asked["generator"][0].get_state()
    assert not torch.equal(drawn, torch.Generator().manual_seed(3).get_state())
    DiffusersSide(replace(case, negative=None), torch.device("cpu"), base, None, "")(["a"], [3])
    assert base.asked["negative_prompt"] is None


def test_the_negative_prompt_reaches_every_side(case: Case, tmp_path: Path) -> None:
    case = replace(case, high_noise_frac=1.0, steps=1)
    made = {}
    for negative in (None, "a blurry dog"):
        for spec in sides_named(["diffusers", "latentrt-eager"]):
            asked = replace(case, negative=negative)
            side = factory(spec)(asked, torch.device("cpu"), torch.float32, tmp_path, **spec.options)
            made[spec.name, negative] = side(["a cat"], [3]).images
    assert likeness(made["diffusers", "a blurry dog"], made["latentrt-eager", "a blurry dog"])[0] > 100
    assert likeness(made["diffusers", "a blurry dog"], made["diffusers", None])[0] < 100


@pytest.mark.parametrize(
    ("place", "mode"),
    [("cpu", "default"), ("cuda", "default"), ("cuda", "reduce-overhead"), ("cuda", "max-autotune")],
)
def test_torch_compile_is_set_up_as_its_guides_say(
    place: str, mode: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, refiner = StandIn(), StandIn()
    decode: dict[str, Any] = {}
    upcasts: list[torch.dtype] = []
    monkeypatch.setattr(
        "latentrt.bench.diffusers_side.load_pipelines",
        lambda *_, upcast: upcasts.append(upcast) or (base, refiner),
    )
    monkeypatch.setattr(torch, "compile", lambda call, **how: decode.update(how) or call)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    case = replace(case, batches=(1, 2, 4, 8))
    with torch._dynamo.config.patch(recompile_limit=8):
        side = open_side(case, torch.device(place), torch.float16, tmp_path, mode=mode)
        # For both UNets and each size with room to spare, since a graph that is not compiled any more is an error.
        assert torch._dynamo.config.recompile_limit > 2 * 4
    assert base.compiled == refiner.compiled == decode
    assert (decode["dynamic"], decode["fullgraph"]) == (False, True)
    for name in decode["options"]:
        torch._inductor.config.patch({name: decode["options"][name]})  # which knows it
        assert f"{name}={decode['options'][name]}" in side.settings
    assert decode["options"].get("triton.cudagraphs", False) is (mode != "default")
    guided = (place, mode) == ("cuda", "max-autotune")
    assert (base.fused, refiner.fused) == ((1, 1) if guided else (0, 0))
    assert ("fused QKV" in side.settings) is guided
    assert ("conv_1x1_as_mm" in decode["options"]) is guided
    assert decode["options"].get("epilogue_fusion", True) is not guided
    assert upcasts == [torch.bfloat16 if place == "cuda" else torch.float32]  # as latentrt's own
    assert torch.backends.cudnn.benchmark is (place == "cuda")
    assert ("cudnn.benchmark" in side.settings) is (place == "cuda")


def test_freed_weights_are_no_memory_of_a_side(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sessions took their place, or another layout: PyTorch would keep them, and what an exporter left too."""
    held: list[weakref.ref[torch.nn.Module]] = []
    given_back: list[bool] = []

    def leave() -> None:
        module = torch.nn.Module()
        module.__dict__["itself"] = module  # as an exporter's graphs hold theirs
        held.append(weakref.ref(module))

    def loaded(*_: Any, **__: Any) -> tuple[StandIn, None]:
        leave()
        return StandIn(), None

    monkeypatch.setattr("latentrt.bench.diffusers_side.load_pipelines", loaded)
    for module in ("side", "diffusers_side"):
        monkeypatch.setattr(f"latentrt.bench.{module}.now", lambda device: time.perf_counter())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(held[-1]() is None))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    side = open_side(replace(case, refiner=None), torch.device("cuda"), torch.float16, tmp_path)
    assert given_back == [True]
    monkeypatch.setattr(side, "_drawn", lambda generators: None)
    leave()
    side.tune()
    assert given_back == [True, True]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allowed, as far as PyTorch allows it by itself or a user may have."""
    places = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = True
    yield
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


@pytest.mark.usefixtures("tf32")
def test_float32_is_no_tf32_in_a_sides_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("planted", "", "none", steps=1)
    half, exact = (
        Worker(Job(case, planted("a").at(dtype), "cpu", tmp_path)) for dtype in ("float16", "float32")
    )
    half.open()
    assert torch.backends.cudnn.allow_tf32
    assert exact.open() == "planted"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    asked = []
    session = SimpleNamespace(get_inputs=list, get_outputs=list)
    monkeypatch.setattr(onnxruntime_side, "open_session", lambda *_, tf32: asked.append(tf32) or session)
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        onnxruntime_side._Exported(tmp_path, torch.device("cpu"))
    assert asked == [False, True]  # plain ONNX Runtime has what diffusers has
    half._device = exact._device = torch.device("cuda")
    assert [side.tune()[0] for side in (half, exact)] == ["planted and tuned", "planted and tuned, no TF32"]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["latentrt-eager", "latentrt-onnxruntime", "onnxruntime", "diffusers-compile"]
)
def test_every_side_makes_the_same_pictures(name: str, case: Case, tmp_path: Path) -> None:
    result = measured(case, ["diffusers", name], tmp_path)
    check(result, {"text", "base", "refiner", "base_step", "refiner_step", "decode"})
    begins = "eager, SDPA, VAE in float32, "
    assert result.rows[0].settings in (f"{begins}contiguous", f"{begins}channels_last")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_random_weights_of_published_anatomy_run_on_both(tmp_path: Path) -> None:
    """As `--model sdxl-random` does, in small."""
    changes = {
        "unet": SMALL_UNET,
        "vae": SMALL_VAE,
        "text_encoder": SMALL_TEXT,
        "text_encoder_2": SMALL_TEXT,
    }
    refiner_unet = {**SMALL_UNET, "block_out_channels": [32, 64, 64, 64], "attention_head_dim": [2, 4, 4, 4]}
    refiner_changes = {**changes, "unet": refiner_unet}
    del refiner_changes["text_encoder"]
    models = [
        write_checkpoint(tmp_path / "base", PUBLISHED / "sdxl_base", changes),
        write_checkpoint(tmp_path / "refiner", PUBLISHED / "sdxl_refiner", refiner_changes),
    ]
    case = Case("random", "random", *map(str, models), size=(64, 64), steps=2, high_noise_frac=0.5)
    check(
        measured(case, ["diffusers", "latentrt-eager"], tmp_path / "work"),
        {"text", "base", "refiner", "decode"},
    )
