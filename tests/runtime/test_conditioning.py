"""Sizes, crops, scores and the guidance batch: what each row is told, and that rows of an image lie together."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from helpers.parity import Rig
from latentrt.runtime.conditioning import (
    Conditioning,
    MicroConditioning,
    guidance_batch,
    guidance_scale_embedding,
)
from latentrt.runtime.engines.base import CallProgram
from latentrt.runtime.text_encoder import TextEmbeddings
from tolerances import GUIDANCE_EMBEDDING, TEXT_ROWS
from torch import Tensor


def embeddings(*values: float) -> TextEmbeddings:
    column = torch.tensor(values)
    return TextEmbeddings(column.reshape(-1, 1, 1).expand(-1, 3, 2), column.reshape(-1, 1).expand(-1, 5))


def sizes(*heights: int, score: float | None = None) -> list[MicroConditioning]:
    return [MicroConditioning((h, h + 1), (h + 2, h + 3), (h + 4, h + 5), score) for h in heights]


def test_ids() -> None:
    (base,) = sizes(10)
    assert base.ids() == [10, 11, 12, 13, 14, 15]
    (refiner,) = sizes(10, score=6.0)
    assert refiner.ids() == [10, 11, 12, 13, 6.0]


def test_rows_of_an_image_lie_a_batch_apart_in_every_tensor() -> None:
    joined = guidance_batch(
        embeddings(1, 2, 3), embeddings(-1, -2, -3), (sizes(10, 20, 30), sizes(11, 21, 31)), torch.float32
    )
    wanted = [-1, -2, -3, 1, 2, 3]
    assert joined.encoder_hidden_states[:, 0, 0].tolist() == wanted
    assert joined.text_embeds is not None
    assert joined.text_embeds[:, 0].tolist() == wanted
    assert joined.time_ids is not None
    assert joined.time_ids[:, 0].tolist() == [11, 21, 31, 10, 20, 30]


def test_without_guidance_there_is_no_negative_row() -> None:
    joined = guidance_batch(embeddings(1, 2), None, (sizes(10, 20), sizes(11, 21)), torch.float32)
    assert joined.encoder_hidden_states.shape[0] == 2
    assert joined.time_ids is not None
    assert joined.time_ids[:, 0].tolist() == [10, 20]


def test_without_size_ids_the_unet_gets_only_the_text() -> None:
    joined = guidance_batch(embeddings(1), embeddings(-1), None, torch.float32)
    assert list(joined.named()) == ["encoder_hidden_states"]


def test_sizes_stay_exact_in_half_precision() -> None:
    """float16 counts in twos above 2,048; a crop of 2,049 is not 2,048."""
    joined = guidance_batch(embeddings(1), None, (sizes(2049), sizes(2049)), torch.float16)
    assert joined.encoder_hidden_states.dtype == torch.float16
    assert joined.time_ids is not None
    assert joined.time_ids.dtype == torch.float32
    assert joined.time_ids[0, :2].tolist() == [2049, 2050]


def test_named_leaves_out_what_there_is_not() -> None:
    some = Conditioning(torch.zeros(1), time_ids=torch.ones(1))
    assert list(some.named()) == ["encoder_hidden_states", "time_ids"]


def test_repeating_keeps_images_of_a_prompt_together() -> None:
    assert embeddings(1, 2).repeat(3).pooled[:, 0].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("dim", [20, 21, 256, 512])
@pytest.mark.parametrize("scale", [1.0, 7.5, 13.0])
def test_the_guidance_scale_is_embedded_as_in_diffusers(scale: float, dim: int) -> None:
    embed = diffusers.StableDiffusionXLPipeline.get_guidance_scale_embedding
    theirs = embed(None, torch.tensor([scale - 1, 4.0]), embedding_dim=dim)
    assert torch.equal(guidance_scale_embedding([scale, 5.0], dim), theirs)


def test_the_guidance_scale_embedding_is_its_formula() -> None:
    row = guidance_scale_embedding([1.5], 6)[0].double()
    angles = [500 * 10000 ** (-k / 2) for k in range(3)]
    wanted = [f(a) for f in (math.sin, math.cos) for a in angles]
    assert torch.allclose(row, torch.tensor(wanted, dtype=torch.float64), atol=GUIDANCE_EMBEDDING)


class Listener:
    """An engine that remembers what it is told."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen.append({name: x.clone() for name, x in inputs.items()})
        outputs: dict[str, Tensor] = self._engine(inputs)
        return outputs

    def bind(self, inputs: Any, outputs: Any, *, timesteps: Any = None) -> CallProgram:
        return CallProgram(self, inputs, outputs, capturable=False)  # type: ignore[arg-type]


def unet_inputs(rig: Rig, kind: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What our UNet is told at the first step of a call, beside the latents."""
    pipe = rig.pipeline(kind, "eager")
    engine = pipe._parts.base.unet.load()
    listener = Listener(engine)
    pipe._parts.base.unet._engine = listener
    try:
        pipe(**arguments, num_inference_steps=1, height=64, width=48, output_type="latent", seed=0)
    finally:
        pipe._parts.base.unet._engine = engine
    return listener.seen[0]


@pytest.mark.parametrize(
    ("arguments", "negative"),
    [
        ({}, [64, 48, 8, 16, 64, 48]),
        ({"negative_original_size": (9, 10), "negative_target_size": (11, 12)}, [9, 10, 0, 0, 11, 12]),
        ({"negative_original_size": (9, 10)}, [9, 10, 0, 0, 64, 48]),
        ({"negative_crops_coords_top_left": (1, 2)}, [64, 48, 1, 2, 64, 48]),
    ],
)
def test_default_size_ids_of_the_negative_rows(
    arguments: dict[str, Any], negative: list[float], rig: Rig
) -> None:
    ids = unet_inputs(rig, "sdxl", {"prompt": "storm", "crops_coords_top_left": (8, 16), **arguments})[
        "time_ids"
    ]
    assert ids.tolist() == [negative, [64, 48, 8, 16, 64, 48]]


def test_batch_rows_of_a_whole_call(rig: Rig) -> None:
    """Two prompts, two images of each: four negative rows, then four positive ones."""
    arguments = {"prompt": ["storm", "green"], "negative_prompt": "dark", "num_images_per_prompt": 2}
    inputs = unet_inputs(
        rig, "sdxl", {**arguments, "original_size": [(10, 10), (20, 20)], "negative_original_size": (5, 5)}
    )
    assert inputs["time_ids"][:, 0].tolist() == [5, 5, 5, 5, 10, 10, 20, 20]
    text = inputs["text_embeds"]
    assert torch.equal(text[4], text[5])
    assert torch.equal(text[6], text[7])
    assert not torch.equal(text[4], text[6])
    assert all(torch.allclose(text[0], text[k], atol=TEXT_ROWS) for k in (1, 2, 3))


def test_an_absent_negative_is_zeros_where_the_checkpoint_says_so(rig: Rig) -> None:
    assert not unet_inputs(rig, "sdxl", {"prompt": "storm"})["text_embeds"][0].any()
    assert unet_inputs(rig, "sdxl", {"prompt": "storm", "negative_prompt": ""})["text_embeds"][0].any()


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.0])
def test_no_guidance_no_negative_rows(scale: float, rig: Rig) -> None:
    inputs = unet_inputs(rig, "sdxl", {"prompt": "storm", "negative_prompt": "dark", "guidance_scale": scale})
    assert {len(tensor) for tensor in inputs.values()} == {1}
