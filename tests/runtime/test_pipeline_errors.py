"""`runtime/pipeline.py` and `request.py`: what is refused, and what the message says: the value, and what to do
instead."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latentrt
import numpy as np
import pytest
import torch
from helpers.parity import Rig
from latentrt.errors import (
    BackendError,
    BackendUnavailableError,
    CacheError,
    CheckpointError,
    LatentRTError,
    OutOfMemoryError,
    RequestError,
    UnknownBackendError,
    UnsafeWeightsError,
)
from latentrt.runtime import flow
from tolerances import PIPELINE_ONNXRUNTIME

SMALL: dict[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "output_type": "np"}
ENOUGH = {**SMALL, "num_inference_steps": 5}  # of fewer with leading spacing a warning tells


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is an empty list; give at least one"),
        ({"prompt": 3}, "prompt must be a string or a list of strings; got int: 3"),
        ({"prompt": ["a", None]}, "prompt must be a string or a list of strings"),
        ({"prompt": "a \udcff"}, r"prompt is not text: 'a \\udcff' holds half a character; give UTF-8"),
        ({"sampler": "heun"}, "no sampler 'heun'; there are euler, euler-a, ddim, ddpm, pndm"),
        ({"sampler": ["euler"]}, r"no sampler \['euler'\]"),
        ({"sampler": np.array(["euler", "ddim"])}, r"no sampler array\(\['euler', 'ddim'\]"),
        ({"output_type": np.array(["pil", "np"])}, r"no output_type array\(\['pil', 'np'\]"),
        ({"tiled_vae": [True]}, r"tiled_vae is \[True\]; it can be True or False"),
        ({"tiled_vae": torch.ones(2)}, r"tiled_vae is tensor\(\[1., 1.\]\); it can be True or False"),
        ({"previewer": "yes"}, "previewer is 'yes'; give what fit_previewer returns"),
        ({"seed": b"7"}, "seed must be a whole number; got b'7'"),
        ({"height": 60}, "height is 60; it must be a multiple of 8, such as 64"),
        ({"width": 1}, "width is 1; it must be 8 to 16384"),
        ({"width": 64.0}, "width must be a whole number; got 64.0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"num_inference_steps": 1001}, "1001 steps were asked for; this schedule has 1 to 1000"),
        ({"num_inference_steps": 51, "sampler": "lcm"}, "51 steps .* distilled on 50"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number; got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number; got inf"),
        ({"guidance_scale": 10**400}, "guidance_scale is 1000.*; it must be between"),
        ({"guidance_scale": "7"}, "guidance_scale must be a finite number; got '7'"),
        ({"guidance_scale": [7.0, 5.0]}, "guidance_scale has 2 entries for 1 images; give one for each"),
        (
            {"prompt": ["a", "b"], "guidance_scale": [7.0, 1.0]},
            r"guidance_scale is \[7.0, 1.0\]: 1 or less turns guidance off, .* make them in two calls",
        ),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it must be between 0 and 1"),
        ({"eta": -0.1}, "eta is -0.1; it must be between 0 and 1"),
        ({"clip_skip": 3}, "clip_skip is 3; this text encoder has 3 layers, so it can be 0 to 2"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 prompts"),
        ({"prompt": ["a", "b"], "prompt_2": ["c"]}, "prompt_2 has 1 entries for 2 prompts"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "3 seeds for 2 images"),
        ({"prompt": ["a", "b"], "original_size": [(8, 8)]}, "original_size has 1 pairs for 2 prompts"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"seed": 1, "generator": torch.Generator()}, "seed= or generator=, not both"),
        ({"seed": -1}, "seed is -1; it must be 0 to"),
        ({"seed": "1"}, "seed must be a whole number; got '1'"),
        ({"target_size": (64,)}, r"target_size must be a pair of whole numbers .* got \(64,\)"),
        ({"crops_coords_top_left": (-8, 0)}, "crops_coords_top_left is -8; it must be 0 to"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; it must be 1 to"),
        ({"output_type": "jpeg"}, "no output_type 'jpeg'; there are pil, np, pt, latent"),
        ({"denoising_start": 0.5}, "denoising_start=0.5 continues from latents; pass them as image="),
        ({"denoising_end": 1.1}, "denoising_end is 1.1; it must be between 0 and 1"),
        (
            {"denoising_start": -0.1, "image": torch.zeros(1, 4, 8, 6)},
            "denoising_start is -0.1; it must be between 0 and 1",
        ),
        ({"latents": torch.zeros(3, 4, 8, 6)}, "latents has 3 rows for 1 images"),
        ({"latents": torch.zeros(1, 3, 8, 6)}, "latents have 3 channels; this model's have 4"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "width is 48, but the image or latents given are 64"),
        ({"latents": torch.full((1, 4, 8, 6), torch.nan)}, "latents cannot hold NaN"),
        (
            {"image": torch.full((1, 3, 64, 48), 255.0)},
            r"pixels must be in \[0, 1\]; got 255 to 255 .* x / 255",
        ),
        (
            {"image": torch.zeros(1, 4, 8, 6), "latents": torch.zeros(1, 4, 8, 6)},
            "image= or latents=, not both",
        ),
        (
            {"image": torch.zeros(1, 3, 64, 48), "strength": 1.5},
            "strength is 1.5; it must be between 0 and 1",
        ),
        ({"image": "cat.png"}, "image must be a PIL image, an array, a tensor or a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_requests_that_cannot_be_met(
    arguments: dict[str, Any], message: str, pipe: latentrt.Pipeline
) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(**{"prompt": "a cat", **SMALL, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (64, 64)}, r"sizes must be a list, such as \[\(1024, 1024\).* got 64"),
        ({"sizes": 64}, r"sizes must be a list, such as \[\(1024, 1024\).* got 64"),
        ({"sizes": "64x64"}, "sizes must be a list, such as .* got '64x64'"),
        ({"sizes": [(64, 64, 64)]}, r"sizes must be pairs \(height, width\), .* got \[\(64, 64, 64\)\]"),
        ({"sizes": [(64, 64), (64, "x")]}, "sizes must be a whole number; got 'x'"),
        ({"sizes": [(64, 64), (60, 64)]}, "sizes is 60; it must be a multiple of 8, such as 64"),
        ({"batches": 2}, r"batches must be a list, such as \(1, 4\); got 2"),
        ({"batches": [1, 0]}, "batches is 0; it must be at least 1"),
        ({"batches": [1, 1.5]}, "batches must be a whole number; got 1.5"),
    ],
    ids=str,
)
def test_warm_ups_that_cannot_be_made(
    arguments: dict[str, Any], message: str, pipe: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several sizes or batches, none is made before one is refused."""
    monkeypatch.setattr(pipe._calls, "make", None)
    with pytest.raises(RequestError, match=message):
        pipe.warmup(**arguments)


def test_a_refiner_in_the_pipeline_divides_the_schedule_itself(rig: Rig) -> None:
    with pytest.raises(
        RequestError, match="divides the schedule at high_noise_frac; load base and refiner as two"
    ):
        rig.pipeline("ensemble", "eager")("a cat", denoising_end=0.8, **SMALL)


def test_a_prompt_of_ten_thousand_characters_is_cut_and_quoted(
    pipe: latentrt.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    kept, cut = "red " * 75, "blue " * 2000
    assert len(kept + cut) > 10_000
    with caplog.at_level(logging.WARNING):
        image = pipe(kept + cut, **ENOUGH, seed=1).images
    (message, *_) = caplog.messages
    assert "tokens and the text encoder reads 75; cut off: 'blue blue" in message
    assert len(message) < 400
    caplog.clear()
    assert np.array_equal(pipe(kept, **ENOUGH, seed=1).images, image)
    assert not caplog.messages


def test_an_empty_prompt_is_one(pipe: latentrt.Pipeline) -> None:
    assert np.isfinite(pipe("", **SMALL).images).all()


@pytest.mark.parametrize("name", ["callback_on_step_end", "callback_on_progress"])
def test_a_callback_that_is_none(name: str, pipe: latentrt.Pipeline) -> None:
    with pytest.raises(RequestError, match=rf"{name} is 3; give a function"):
        pipe("a cat", **SMALL, **{name: 3})


def test_what_a_pipeline_consists_of_cannot_be_replaced(rig: Rig) -> None:
    pipe = rig.pipeline("sdxl", "eager")
    scheduler = rig.diffusers("sdxl").scheduler
    with pytest.raises(RequestError, match=r"choose one for each call with sampler= \(euler, .*scheduler=\{"):
        pipe.scheduler = type(scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(RequestError, match=r"give another one to from_pretrained\(\.\.\., vae=\)"):
        pipe.vae = pipe.vae
    for name in ("text_encoder", "text_encoder_2"):
        with pytest.raises(RequestError, match=rf"{name} cannot .* to from_pretrained\(\.\.\., {name}=\)"):
            setattr(pipe, name, getattr(pipe, name))
    for name in ("unet", "tokenizer", "tokenizer_2"):
        with pytest.raises(RequestError, match=rf"{name} cannot .*; load a checkpoint that has another one"):
            setattr(pipe, name, getattr(rig.diffusers("sdxl"), name))
    with pytest.raises(RequestError, match=r"safety_checker cannot .*; check the images that a call"):
        pipe.safety_checker = lambda images, **_: images
    pipe.safety_checker = None  # as it is
    with pytest.raises(RequestError, match=r"watermark cannot .*; mark the images that a call returns"):
        pipe.watermark = object()
    pipe.watermark = None
    pipe.label = "of the caller's own"
    assert pipe.label == "of the caller's own"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backend": "tensorflow"},
            UnknownBackendError,
            "no back end 'tensorflow'; there are onnxruntime, eager",
        ),
        (
            {"backend": "onnxruntime", "dtype": "bfloat16"},
            BackendUnavailableError,
            "'onnxruntime' cannot run here: .* no bfloat16 .*; use float32 or float16",
        ),
        (
            {"backend": np.array(["eager", "auto"])},
            UnknownBackendError,
            r"no back end array\(\['eager', 'auto'\]",
        ),
        ({"backend": ["eager"]}, UnknownBackendError, r"no back end \['eager'\]; there are onnxruntime"),
        ({"memory": np.array(["low", "low"])}, RequestError, r"no memory policy array\(\['low', 'low'\]"),
        ({"graphs": "no"}, RequestError, "graphs is 'no'; it can be True or False"),
        ({"graphs": np.array([True, True])}, RequestError, r"graphs is array\(\[ True,  True\]\); it can be"),
        ({"use_safetensors": []}, RequestError, r"use_safetensors is \[\]; it can be True or False"),
        *(({"dtype": x}, RequestError, "it can be float32, float16, bfloat16") for x in ("", False, 0, [])),
        ({"torch_dtype": ""}, RequestError, "dtype is ''; it can be float32, float16, bfloat16"),
        ({"device": 2**70}, RequestError, "device is 1180591620717411303424; it can be 'cpu'"),
        *(
            ({name: "x" * 5000}, RequestError, f"{name} is 'xxx.*xxx', as no file can be called")
            for name in ("refiner", "cache_dir", "variant", "revision")
        ),
        ({"variant": "x" * 210}, RequestError, "variant is 'xxx.*xxx', as no file can be called"),
        ({"cache_dir": "a\0b"}, RequestError, r"cache_dir is 'a\\x00b', as no file can be called"),
        ({"cache_dir": Path("\ud800")}, RequestError, r"cache_dir is '\\ud800', as no file can be called"),
        ({"dtype": "int8"}, RequestError, "dtype is 'int8'; it can be float32, float16, bfloat16"),
        ({"dtype": "float32", "torch_dtype": torch.float16}, RequestError, "give one of them"),
        ({"use_safetensors": False}, UnsafeWeightsError, "asks for pickled weights, which can run code"),
        ({"variant": "int4"}, CheckpointError, "nothing of variant 'int4'"),
        ({"device": "gpu"}, RequestError, "device is 'gpu'; it can be 'cpu', 'cuda'"),
        ({"device": "mps"}, RequestError, "device is 'mps'; latentrt runs on 'cpu' and 'cuda'"),
        ({"device": torch.float16}, RequestError, "device is torch.float16"),
    ],
)
def test_pipelines_that_cannot_be_made(
    options: dict[str, Any], error: type[LatentRTError], message: str, tiny: Callable[..., Path]
) -> None:
    with pytest.raises(error, match=message):
        latentrt.Pipeline.from_pretrained(tiny("sdxl"), **options)


@pytest.mark.parametrize(
    ("cuda", "failure", "message"),
    [
        (None, "", "it is built for the CPU; install a CUDA build of PyTorch, or use device 'cpu'"),
        (
            "13.0",
            "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
            "The NVIDIA driver on your system is too old (found version 11040); update it (it is built for CUDA 13.0), "
            "or use device 'cpu'",
        ),
        (
            "13.0",
            "Found no NVIDIA driver on your system. Please check",
            "Found no NVIDIA driver on your system; see whether nvidia-smi lists a GPU (it is built for CUDA 13.0)",
        ),
        ("13.0", "", "it is built for CUDA 13.0; see whether nvidia-smi lists a GPU, or use device 'cpu'"),
    ],
    ids=["built for the CPU", "driver too old", "no driver", "no GPU"],
)
def test_a_gpu_that_cannot_be_used(
    cuda: str | None, failure: str, message: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        if failure:
            raise RuntimeError(failure)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(BackendUnavailableError, match=f"sees no CUDA device: {re.escape(message)}"):
        latentrt.Pipeline.from_pretrained(tiny("sdxl"), device="cuda")


def test_a_file_where_the_cache_should_be(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("")
    pipe = latentrt.Pipeline.from_pretrained(tiny("sdxl"), backend="onnxruntime", cache_dir=tmp_path / "file")
    with pytest.raises(CacheError, match=r"is not a folder .* set LATENTRT_CACHE or cache_dir"):
        pipe("a cat", **SMALL)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left .* free some, or set LATENTRT_CACHE"),
        (errno.EROFS, "cannot be written .* make it writable, or set LATENTRT_CACHE"),
    ],
)
def test_a_cache_that_takes_nothing(
    code: int, message: str, tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test may run as root, whom permissions do not stop; so the failure is planted where files are made."""
    root = tmp_path / "cache"
    pipe = latentrt.Pipeline.from_pretrained(tiny("sdxl"), backend="onnxruntime", cache_dir=root)
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.parent == root / "partial":
            raise OSError(code, os.strerror(code), str(self))
        mkdir(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(CacheError, match=message):
            pipe("a cat", **SMALL)
    assert [*(root / "entries").iterdir(), *(root / "partial").iterdir()] == []


@pytest.mark.timeout(900)
def test_a_damaged_export_is_made_again(
    tmp_path: Path, rig: Rig, shared_export_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its image is what it was before, and the cache is whole again."""
    call = {"prompt": "a cat", **ENOUGH, "seed": 4}
    image = rig.pipeline("sdxl", "onnxruntime")(**call).images
    copy = tmp_path / "cache"
    shutil.copytree(
        shared_export_cache / "entries", copy / "entries", ignore=shutil.ignore_patterns("*.json.*")
    )
    encoders = [
        model
        for model in copy.glob(
            "entries/*/model.onnx.data"
        )  # other tests keep engines of text encoders here too
        if '"name": "text_encoder"' in model.with_name("manifest.json").read_text("utf-8")
    ]
    assert encoders
    for model in encoders:
        damaged = bytearray(model.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        model.write_bytes(damaged)
    folder = rig.folder("sdxl")
    pipe = latentrt.Pipeline.from_pretrained(folder, backend="onnxruntime", cache_dir=copy)
    with caplog.at_level(logging.WARNING):
        again = pipe(**call).images
    assert np.abs(again - image).max() <= PIPELINE_ONNXRUNTIME
    assert "cached text_encoder is damaged (model.onnx.data has another SHA-256" in caplog.text
    assert "building it again" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        latentrt.Pipeline.from_pretrained(folder, backend="onnxruntime", cache_dir=copy)(**call)
    assert not caplog.messages


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore on that"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        BackendError("ONNX Runtime failed on unet: Failed to allocate memory for requested buffer of size 8"),
        BackendError("TensorRT 11, unet: failed (Error Code 2: OutOfMemory)"),
        BackendError(
            "TensorRT 11, unet: failed (There may not be enough free memory for allocation to succeed.)"
        ),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_no_memory_left(error: Exception, pipe: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(flow, "from_tensor", fail)
    why = re.escape(str(error).partition("\n")[0])
    with pytest.raises(
        OutOfMemoryError,
        match=rf"^no memory left on cpu in stage 'decode' \({why}\); ask for fewer images at once, a smaller size",
    ):
        pipe("a cat", **SMALL)


def test_other_failures_stay_what_they_are(pipe: latentrt.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(flow, "from_tensor", fail)
    with pytest.raises(RuntimeError, match=r"^shapes cannot be multiplied$"):
        pipe("a cat", **SMALL)
