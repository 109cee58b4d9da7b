"""A pipeline on another GPU than the current one: everything it launches and waits for is on its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import latentrt
import pytest
import torch
from helpers.threads import in_threads
from latentrt.runtime.memory import POLICIES
from PIL import Image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA GPU"),
]

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def first_is_current() -> Iterator[None]:
    """With an attention of PyTorch's that `bench/null_cuda` has too, which can be as many devices as one likes."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.set_device(FIRST)
    yield
    assert torch.cuda.current_device() == FIRST.index
    torch.backends.cuda.enable_cudnn_sdp(enabled)


def load(device: torch.device | str = SECOND, **options: Any) -> latentrt.Pipeline:
    options = {"backend": "triton", "dtype": "float16", "device": device, **options}
    pipe = latentrt.Pipeline.from_pretrained("demo", "demo", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: latentrt.Pipeline, seed: int | None = 0, **options: Any) -> Any:
    """The images, which are on the pipeline's device; the current device is the one it was."""
    options = {"num_inference_steps": 4, "high_noise_frac": 0.7, "output_type": "pt", **options}
    current = torch.cuda.current_device()
    images = pipe("a red circle", seed=seed, **options).images
    assert torch.cuda.current_device() == current
    if isinstance(images, torch.Tensor):
        assert images.device == pipe.device
    return images


@pytest.mark.parametrize(
    "options",
    [*({"memory": policy} for policy in POLICIES), {"graphs": False}, {"backend": "eager"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_it_makes_images(options: dict[str, Any]) -> None:
    pipe = load(**options)
    assert call(pipe, output_type="latent").device == SECOND
    assert len(call(pipe, num_images_per_prompt=2)) == 2
    assert call(pipe, output_type="np").shape == (1, 128, 128, 3)


def test_it_does_all_that_a_call_may_ask_for() -> None:
    pipe = load()
    pipe.warmup(sizes=[(64, 64)])
    devices: set[torch.device] = set()

    def halved(pipe: latentrt.Pipeline, step: int, timestep: float, found: dict[str, Any]) -> dict[str, Any]:
        devices.add(found["latents"].device)
        return {"latents": 0.5 * found["latents"]}

    call(pipe, previewer=pipe.fit_previewer(), callback_on_progress=lambda *_: None)
    call(pipe, callback_on_step_end=halved)
    assert devices == {SECOND}
    call(pipe, tiled_vae=True)
    call(pipe, image=Image.new("RGB", (128, 128)), strength=0.5)
    for device in (FIRST, SECOND, "cpu"):
        call(pipe, None, generator=torch.Generator(device).manual_seed(1), sampler="euler-a")
    for device in (FIRST, SECOND):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            call(pipe)


def test_two_pipelines_on_two_devices() -> None:
    pipes = [load(FIRST), load(SECOND)]

    def work(pipe: latentrt.Pipeline) -> None:
        for seed in range(3):
            call(pipe, seed)

    in_threads(partial(work, pipe) for pipe in pipes)


def test_it_moves_between_them() -> None:
    pipe = load(FIRST)
    for device in (FIRST, SECOND, FIRST):
        assert call(pipe.to(device), output_type="latent").device == device


def test_cuda_is_the_device_that_is_current_when_it_is_loaded() -> None:
    with torch.cuda.device(SECOND):
        pipe = load("cuda")
        call(pipe)
    assert pipe.device == SECOND
    assert call(pipe, output_type="latent").device == SECOND
