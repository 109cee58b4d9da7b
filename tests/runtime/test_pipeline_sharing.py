"""`runtime/loading.py`: two pipelines with parts in common, as diffusers' documentation has them, and life without
diffusers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import latentrt
import numpy as np
import pytest
import torch
from helpers.parity import Rig
from latentrt.errors import CheckpointError, RequestError
from latentrt.runtime.engines import registry
from latentrt.runtime.planner import Planner
from latentrt.runtime.stages import stages_of_request
from latentrt.runtime.text_encoder import PromptEncoding, TextEmbeddings, TextEncoder
from tolerances import PIPELINE_EAGER

PROMPT = "storm over the old town"


def documented_example(pipeline: Any, base_model: Path, refiner_model: Path, dtype: torch.dtype) -> Any:
    """Base and refiner as in diffusers' SDXL guide; only checkpoints, device, steps and generators are ours."""
    base = pipeline.from_pretrained(base_model, torch_dtype=dtype, variant="fp16", use_safetensors=True).to(
        "cpu"
    )
    refiner = pipeline.from_pretrained(
        refiner_model,
        text_encoder_2=base.text_encoder_2,
        vae=base.vae,
        torch_dtype=dtype,
        use_safetensors=True,
        variant="fp16",
    ).to("cpu")
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    n_steps = 4
    high_noise_frac = 0.8
    image = base(
        prompt=PROMPT,
        num_inference_steps=n_steps,
        denoising_end=high_noise_frac,
        output_type="latent",
        generator=torch.manual_seed(0),
        height=64,
        width=64,
    ).images
    return refiner(
        prompt=PROMPT,
        num_inference_steps=n_steps,
        denoising_start=high_noise_frac,
        image=image,
        generator=torch.manual_seed(0),
    ).images[0]


@pytest.fixture
def eager_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example names no back end; exporting half-precision weights would take minutes."""
    monkeypatch.setattr(registry, "_PREFERENCE", {"cpu": ("eager",)})


@pytest.mark.usefixtures("eager_is_best")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        *(pytest.param(other, marks=pytest.mark.full) for other in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_the_documented_example_runs_with_another_class(
    dtype: torch.dtype, tiny: Callable[..., Path]
) -> None:
    folders = tiny("sdxl", variant="fp16"), tiny("refiner", variant="fp16")
    ours = np.asarray(documented_example(latentrt.Pipeline, *folders, dtype), np.int64)
    exact = documented_example(diffusers.DiffusionPipeline, *folders, torch.float32)
    exact = np.asarray(exact, np.int64)
    if dtype == torch.float32:
        assert np.abs(ours - exact).max() <= 1  # of 255: a rounding that tips over
        return
    theirs = np.asarray(documented_example(diffusers.DiffusionPipeline, *folders, dtype), np.int64)
    assert np.abs(ours - exact).mean() <= 2 * np.abs(theirs - exact).mean()


def test_shared_parts_are_the_same_and_loaded_once(tiny: Callable[..., Path]) -> None:
    base = latentrt.Pipeline.from_pretrained(tiny("sdxl"), backend="eager")
    refiner = latentrt.Pipeline.from_pretrained(
        tiny("refiner"), text_encoder_2=base.text_encoder_2, vae=base.vae, backend="eager"
    )
    assert refiner.vae is base.vae
    assert refiner.text_encoder_2 is base.text_encoder_2
    assert refiner.text_encoder is None
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 2}
    latents = base(**call, denoising_end=0.5, output_type="latent").images
    engine = base.text_encoder_2.engine.load()
    refiner(prompt=PROMPT, num_inference_steps=2, denoising_start=0.5, image=latents)
    assert refiner.text_encoder_2.engine.load() is engine
    assert refiner.vae.decoder.load() is base.vae.decoder.load()


def test_a_refiner_that_brings_the_same_encoder_uses_the_base_s(rig: Rig) -> None:
    both = rig.pipeline("ensemble", "eager")
    assert both._parts.refiner.text_encoder_2 is both._parts.base.text_encoder_2


def test_a_refiner_without_an_encoder_uses_the_base_s(tiny: Callable[..., Path]) -> None:
    """As in the demo's folder. The name "demo" reads it with the base's parts in any case."""
    demo = Path(latentrt.runtime.__file__).parent / "demo"
    call = {"num_inference_steps": 5, "seed": 1, "output_type": "pt"}
    pictures = [
        latentrt.Pipeline.from_pretrained(model, refiner, backend="eager")(PROMPT, **call).images
        for model, refiner in ((demo, demo / "refiner"), ("demo", "demo"))
    ]
    assert torch.equal(*pictures)
    plans = [Planner.of(demo, demo / "refiner"), Planner.of("demo", "demo")]
    assert plans[0].of_weights().networks == plans[1].of_weights().networks
    with pytest.raises(CheckpointError, match="refiner has no text encoder"):  # nor has the base a second one
        latentrt.Pipeline.from_pretrained(tiny("sd15"), demo / "refiner", backend="eager")


def test_a_refiner_s_own_encoder_is_kept_when_it_differs(tiny: Callable[..., Path]) -> None:
    """The refiner of another seed has other text weights; each expert must hear its own."""
    folders = tiny("sdxl"), tiny("refiner", seed=1)
    both = latentrt.Pipeline.from_pretrained(*folders, backend="eager")
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 4}
    ours = both(**call, seed=3, high_noise_frac=0.5, output_type="np").images
    base, refiner = (diffusers.DiffusionPipeline.from_pretrained(folder) for folder in folders)
    refiner.vae = base.vae
    generator = torch.Generator().manual_seed(3)
    latents = base(**call, generator=generator, denoising_end=0.5, output_type="latent").images
    theirs = refiner(
        prompt=PROMPT, num_inference_steps=4, image=latents, denoising_start=0.5, output_type="np"
    ).images
    assert np.abs(ours - theirs).max() <= PIPELINE_EAGER


def test_what_an_encoder_on_another_device_computes_comes_to_the_pipeline_s(
    tiny: Callable[..., Path],
) -> None:
    """Where only one of two is shared, the embeddings of both are joined."""
    pipe = latentrt.Pipeline.from_pretrained(tiny("sdxl"), backend="eager")
    own, other = torch.device("meta"), torch.device("cpu")

    def on(device: torch.device) -> Any:
        def engine(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            rows = len(inputs["input_ids"])
            return {
                "sequence": torch.zeros(rows, 77, 8, device=device),
                "pooled": torch.zeros(rows, 8, device=device),
            }

        return engine

    for devices in ((own, other), (other, own)):
        encoders = [replace(pipe.text_encoder, engine=on(device)) for device in devices]
        found = PromptEncoding(own)(encoders, [[PROMPT]] * 2, None)
        assert (found.sequence.device, found.pooled.device) == (own, own)
        assert found.sequence.shape == (1, 77, 16)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ({}, {"text_encoder": 1, "text_encoder_2": 2}),  # the prompt, and the refiner's empty negative one
        ({"guidance_scale": 1.0}, {"text_encoder": 1, "text_encoder_2": 1}),
        ({"negative_prompt": "blurry"}, {"text_encoder": 2, "text_encoder_2": 2}),
        ({"prompt_2": "green"}, {"text_encoder": 1, "text_encoder_2": 3}),  # only the base is given prompt_2
        ({"clip_skip": 1}, {"text_encoder": 1, "text_encoder_2": 2}),
    ],
)
def test_a_shared_encoder_encodes_each_text_of_a_request_once(
    texts: dict[str, Any], wanted: dict[str, int], rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = rig.pipeline("ensemble", "eager")
    base, refiner, loader = both._parts.base, both._parts.refiner, both._parts.loader
    own = replace(base.text_encoder_2, engine=loader.engine(base.text_encoder_2.engine.component))
    apart = latentrt.Pipeline(replace(both._parts, refiner=replace(refiner, text_encoder_2=own)))
    apart.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 3, "output_type": "np", **texts}
    encoded = Counter[str]()
    encode = TextEncoder.encode

    def counting(self: TextEncoder, *arguments: Any) -> TextEmbeddings:
        encoded[self.engine.component.name] += 1
        return encode(self, *arguments)

    monkeypatch.setattr(TextEncoder, "encode", counting)
    images = both(["storm", "a red cat"], **call).images
    assert encoded == wanted
    if texts.keys() <= {"guidance_scale"}:  # plans assume no other texts
        request, _ = both.check(["storm", "a red cat"], **call)
        stages = stages_of_request([base, refiner], request)
        assert both._budget.plan(request, stages).stages[0].calls == wanted
    encoded.clear()
    both(["storm", "a red cat"], **call)
    assert encoded == wanted  # nothing is cached from one request to the next
    assert np.array_equal(apart(["storm", "a red cat"], **call).images, images)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "vae"])
def test_parts_of_another_library_are_refused(name: str, rig: Rig) -> None:
    theirs = getattr(rig.diffusers("sdxl"), name)
    with pytest.raises(
        RequestError, match=f"a {type(theirs).__name__} was given to share; give the .* of a latentrt"
    ):
        latentrt.Pipeline.from_pretrained(rig.folder("sdxl"), backend="eager", **{name: theirs})


def test_unknown_keywords_are_named(rig: Rig) -> None:
    with pytest.raises(TypeError, match="guidance_scael"):
        rig.pipeline("sdxl", "eager")("a cat", guidance_scael=3)
    with pytest.raises(TypeError, match="use_safetensor'"):
        latentrt.Pipeline.from_pretrained(rig.folder("sdxl"), use_safetensor=True)


BLOCKED = """
import json, sys
for name in ("diffusers", "transformers", "accelerate"):
    sys.modules[name] = None
import latentrt
folder, refiner, cache, backends = json.loads(sys.argv[1])
for backend in backends:
    pipe = latentrt.Pipeline.from_pretrained(folder, refiner, backend=backend, cache_dir=cache)
    image = pipe("a cat", height=64, width=48, num_inference_steps=2, high_noise_frac=0.5, seed=1).images[0]
    exporter = sorted({"torch.onnx", "onnx_ir", "onnx"} & set(sys.modules))
    print(json.dumps([backend, list(image.size), exporter]))
"""


@pytest.mark.timeout(900)
def test_generating_needs_neither_diffusers_nor_transformers(rig: Rig, shared_export_cache: Path) -> None:
    """And what was exported before is run without the exporter."""
    call = {"height": 64, "width": 48, "num_inference_steps": 2}
    rig.pipeline("ensemble", "onnxruntime")("a cat", **call, high_noise_frac=0.5)
    argument = json.dumps(
        [
            str(rig.folder("sdxl")),
            str(rig.folder("refiner")),
            str(shared_export_cache),
            ["onnxruntime", "eager"],
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, argument], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(backend, size) for backend, size, _ in told] == [("onnxruntime", [48, 64]), ("eager", [48, 64])]
    assert told[0][2] == []


def test_a_checkpoint_may_be_gone_once_it_is_loaded(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    """What a pipeline runs is in memory, or mapped: not read again for each image."""
    folder = tmp_path / "sd15"
    shutil.copytree(tiny("sd15"), folder)
    pipe = latentrt.Pipeline.from_pretrained(folder, backend="eager")
    call = {
        "prompt": PROMPT,
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "seed": 1,
        "output_type": "np",
    }
    before = pipe(**call).images
    shutil.rmtree(folder)
    assert np.array_equal(pipe(**call).images, before)
