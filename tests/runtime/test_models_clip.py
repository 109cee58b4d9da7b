"""`runtime/models/clip.py`: the text encoder against transformers': every layer, the pooled state, and both ways to
find the end token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.published_configs import SD21_TEXT_ENCODER, sdxl
from helpers.tiny_checkpoints import randomize
from latentrt.errors import UnsupportedConfigError
from latentrt.runtime.models.clip import CLIPTextConfig, CLIPTextEncoder, rename_clip_keys
from tolerances import MODEL, relative_error
from torch import Tensor
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 24,
    "bos_token_id": 97,
    "pad_token_id": 1,
}
END = 98
CONFIGS = {
    "clip": (CLIPTextModel, {"hidden_act": "quick_gelu", "eos_token_id": END}),
    "clip, end token 2": (CLIPTextModel, {"hidden_act": "quick_gelu", "eos_token_id": 2}),
    "openclip": (CLIPTextModelWithProjection, {"hidden_act": "gelu", "eos_token_id": END}),
    "openclip, end token 2": (CLIPTextModelWithProjection, {"hidden_act": "gelu", "eos_token_id": 2}),
    "other eps": (CLIPTextModel, {"hidden_act": "gelu", "eos_token_id": END, "layer_norm_eps": 1e-2}),
}


def prompts() -> Tensor:
    """[4, 77]: padded with the end token, with 0, not at all, and nothing but start and end."""
    ids = torch.randint(3, END - 1, (4, 77), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = END - 1
    ids[0, 9:] = END
    ids[1, 30], ids[1, 31:] = END, 0
    ids[2, 76] = END
    ids[3, 1:] = END
    return ids


def pair(kind: str, *, normalize: bool) -> tuple[Any, CLIPTextEncoder]:
    """transformers' model and ours, with the same random weights."""
    model, fields = CONFIGS[kind]
    theirs = model(TheirConfig(**SIZES, **fields)).eval()
    randomize(theirs, seed=1)
    raw = {**theirs.config.to_dict(), "architectures": [model.__name__]}
    with torch.device("meta"):
        ours = CLIPTextEncoder(CLIPTextConfig.from_dict(raw), normalize_sequence=normalize)
    renamed = {rename_clip_keys(key): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict({key: value for key, value in renamed.items() if key is not None}, assign=True)
    return theirs, ours.eval()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.inference_mode()
def test_every_layer_is_transformers(kind: str, normalize: bool) -> None:
    theirs, ours = pair(kind, normalize=normalize)
    ids = prompts()
    want = theirs(ids, output_hidden_states=True)
    pooled = want.text_embeds if "text_embeds" in want else want.pooler_output
    assert len(want.hidden_states) == SIZES["num_hidden_layers"] + 1
    for layer, states in enumerate(want.hidden_states):
        sequence, got_pooled = ours(ids, torch.tensor(layer))
        assert (
            relative_error(sequence, ours.text_model.final_layer_norm(states) if normalize else states)
            <= MODEL
        )
        assert relative_error(got_pooled, pooled) <= MODEL  # whichever layer the sequence comes from
    if normalize:
        assert relative_error(sequence, want.last_hidden_state) <= MODEL


@torch.inference_mode()
def test_shorter_sequences_and_one_row_alone() -> None:
    theirs, ours = pair("openclip", normalize=False)
    ids = prompts()[:, :40].clone()
    ids[:, -1] = END
    sequence, pooled = ours(ids, torch.tensor(2))
    want = theirs(ids, output_hidden_states=True)
    assert relative_error(sequence, want.hidden_states[2]) <= MODEL
    assert relative_error(pooled, want.text_embeds) <= MODEL
    assert relative_error(ours(ids[1:2], torch.tensor(2))[1], pooled[1:2]) <= MODEL


@torch.inference_mode()
def test_no_token_sees_what_follows_it() -> None:
    _, ours = pair("clip", normalize=True)
    ids = prompts()
    other = ids.clone()
    other[:, 50:76] = 5
    before, after = (ours(given, torch.tensor(3))[0] for given in (ids, other))
    assert relative_error(after[:, :50], before[:, :50]) <= MODEL
    assert relative_error(after[:, 50:], before[:, 50:]) > 100 * MODEL


def test_a_layer_that_is_not_there_is_an_error() -> None:
    _, ours = pair("clip", normalize=True)
    with pytest.raises(IndexError):
        ours(prompts(), torch.tensor(4))


def test_projection_is_decided_by_the_architecture() -> None:
    raw = {**SIZES, "architectures": ["CLIPTextModel"]}
    assert CLIPTextConfig.from_dict(raw).projection_dim is None
    raw["architectures"] = ["CLIPTextModelWithProjection"]
    assert CLIPTextConfig.from_dict(raw).projection_dim == 24
    assert CLIPTextConfig.from_dict({**SIZES, "architectures": None}).projection_dim is None


def test_keys_of_any_transformers_release() -> None:
    _, ours = pair("openclip", normalize=False)
    for key in ours.state_dict():
        assert rename_clip_keys(key) == key
        assert rename_clip_keys(key.removeprefix("text_model.")) == key
    assert rename_clip_keys("vision_model.post_layernorm.weight") == "vision_model.post_layernorm.weight"


@pytest.mark.parametrize(
    "raw",
    [
        sdxl("base", "text_encoder"),
        sdxl("base", "text_encoder_2"),
        SD21_TEXT_ENCODER,
        TheirConfig().to_dict(),
    ],
    ids=["CLIP-L", "OpenCLIP bigG", "OpenCLIP H", "transformers 5"],
)
def test_published_configurations_are_read(raw: dict[str, Any]) -> None:
    config = CLIPTextConfig.from_dict(raw)
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "eos_token_id"):
        assert getattr(config, field) == raw[field]


UNSUPPORTED: dict[str, Any] = {
    "hidden_act": "relu",
    "hidden_size": 33,  # four heads
    "num_attention_heads": 0,
    "eos_token_id": [2, 98],
    "projection_dim": None,
    "vocab_size": "99",
    "intermediate_size": 80.0,
    "num_hidden_layers": True,
    "max_position_embeddings": -77,
    "layer_norm_eps": "1e-5",
    "is_decoder": True,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "pruned_heads": {"1": [0]},
    "model_type": "bert",
    "a_field_of_tomorrow": 1,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_an_unsupported_value_is_refused_by_name(field: str) -> None:
    raw = {**SIZES, "architectures": ["CLIPTextModelWithProjection"], field: UNSUPPORTED[field]}
    named = "num_attention_heads" if field == "hidden_size" else field
    with pytest.raises(UnsupportedConfigError, match=f"^text encoder configuration: {named}="):
        CLIPTextConfig.from_dict(raw)


def test_a_depth_that_would_never_be_built_is_refused() -> None:
    raw = {**SIZES, "architectures": ["CLIPTextModelWithProjection"], "num_hidden_layers": 101}
    with pytest.raises(UnsupportedConfigError, match=r"num_hidden_layers=101 .* an integer from 1 to 100$"):
        CLIPTextConfig.from_dict(raw)
