"""`runtime/graph.py`: whole pipelines whose work is recorded: on the CPU, the same bits as without."""

from __future__ import annotations

from typing import Any

import latentrt
import numpy as np
import pytest
from helpers.parity import Rig
from latentrt.runtime import flow

CALL: dict[str, Any] = {"prompt": "a red cat on the hill", "height": 64, "width": 48, "output_type": "np"}
REQUESTS: list[dict[str, Any]] = [
    {"seed": 1, "num_inference_steps": 4, "guidance_scale": 5.0},
    {
        "seed": 2,
        "num_inference_steps": 7,
        "guidance_scale": 2.0,
        "prompt": "storm",
        "negative_prompt": "blurry",
    },
    {"seed": 3, "num_inference_steps": 3, "guidance_scale": 1.0},
    {"seed": 4, "num_inference_steps": 4, "guidance_scale": 5.0, "height": 48, "width": 64},
    {"seed": 5, "num_inference_steps": 5, "sampler": "euler-a", "high_noise_frac": 0.5},
    {"seed": 1, "num_inference_steps": 4, "guidance_scale": 5.0},
]


@pytest.fixture(scope="module")
def folders(rig: Rig) -> tuple[Any, Any]:
    return rig.folder("sdxl"), rig.folder("refiner")


def load(folders: tuple[Any, Any], **options: Any) -> latentrt.Pipeline:
    pipe = latentrt.Pipeline.from_pretrained(*folders, backend="triton", device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_recorded_pipeline_makes_the_same_images(folders: tuple[Any, Any]) -> None:
    recorded, plain = load(folders, graphs=True), load(folders, graphs=False)
    found = [recorded(**{**CALL, **request}).images for request in REQUESTS]
    wanted = [plain(**{**CALL, **request}).images for request in REQUESTS]
    for a, b in zip(found, wanted, strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(found[0], found[-1])


def test_after_an_interruption_it_makes_the_same_image(folders: tuple[Any, Any]) -> None:
    pipe = load(folders, graphs=True)
    request = {**CALL, **REQUESTS[0]}
    whole = pipe(**request).images
    for last in range(4):
        cut = pipe(**request, callback_on_step_end=lambda p, i, t, k, n=last: {"interrupt": i == n})
        assert cut.interrupted is (last < 3)
        assert np.array_equal(pipe(**request).images, whole)


def test_warming_up_records_every_size_the_largest_first(
    folders: tuple[Any, Any], captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(folders, graphs=True)
    sizes = [(32, 32), (64, 48)]
    shapes: list[Any] = []
    start = flow.first_latents

    def noting(parts: Any, request: Any, *rest: Any) -> Any:
        shapes.append((request.height, request.width, request.batch))
        return start(parts, request, *rest)

    monkeypatch.setattr(flow, "first_latents", noting)
    pipe.warmup(sizes, batches=(1, 2))
    assert shapes == [(64, 48, 2), (64, 48, 1), (32, 32, 2), (32, 32, 1)]
    assert sum("unet" in what for what in captures) == 8  # two experts
    assert captures[0] == "vae_decoder"  # the largest: the others then find room in its memory
    assert {"text_encoder", "text_encoder_2"} < set(captures)
    captures.clear()
    for height, width in sizes:
        pipe(**{**CALL, "height": height, "width": width}, num_inference_steps=3, seed=1)
    assert captures == []
