"""`runtime/models/vae.py`: both halves of the VAE against diffusers' AutoencoderKL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.tiny_checkpoints import VAE, randomize
from latentrt.errors import UnsupportedConfigError
from latentrt.runtime.models.vae import VAEConfig, VAEDecoder, VAEEncoder, rename_legacy_vae_keys
from tolerances import MODEL, MODEL_HALF_VERSUS_THEIRS, relative_error

CONFIGS: dict[str, dict[str, Any]] = {
    "published": VAE,
    "no quantisation convolutions": {**VAE, "use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": {**VAE, "mid_block_add_attention": False},
    "other sizes": {
        **VAE,
        "block_out_channels": (8, 24, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 6,
        "in_channels": 1,
        "out_channels": 2,
    },
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The largest of a few hundred rounding errors is a matter of luck: one draw in a hundred is unlucky."""
    torch.manual_seed(0)


def trio(config: dict[str, Any]) -> tuple[AutoencoderKL, VAEEncoder, VAEDecoder]:
    """diffusers' autoencoder and our halves, with the same random weights."""
    theirs = AutoencoderKL(**config).eval()
    randomize(theirs, seed=1)
    ours = VAEConfig.from_dict(dict(theirs.config))
    with torch.device("meta"):
        encoder, decoder = VAEEncoder(ours), VAEDecoder(ours)
    state = theirs.state_dict()
    for half in (encoder, decoder):
        wanted = half.state_dict().keys()
        half.load_state_dict({k: state.pop(k) for k in wanted}, assign=True)
    assert not state  # between them they take every weight, each once
    return theirs, encoder.eval(), decoder.eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.inference_mode()
def test_output_is_diffusers(kind: str, batch: int) -> None:
    theirs, encoder, decoder = trio(CONFIGS[kind])
    config = decoder.config
    height, width = 3, 5
    latents = torch.randn(batch, config.latent_channels, height, width)
    image = torch.rand(batch, config.in_channels, height * config.scale, width * config.scale) * 2 - 1

    assert decoder(latents).shape == (batch, config.out_channels, height * config.scale, width * config.scale)
    assert relative_error(decoder(latents), theirs.decode(latents).sample) <= MODEL
    moments = encoder(image)
    distribution = theirs.encode(image).latent_dist
    assert relative_error(moments, distribution.parameters) <= MODEL
    assert torch.equal(moments.chunk(2, dim=1)[0], moments[:, : config.latent_channels])
    assert relative_error(moments.chunk(2, dim=1)[0], distribution.mean) <= MODEL


@torch.inference_mode()
def test_one_latent_pixel() -> None:
    theirs, encoder, decoder = trio(VAE)
    latents, image = torch.randn(1, 4, 1, 1), torch.rand(1, 3, 8, 8)
    assert relative_error(decoder(latents), theirs.decode(latents).sample) <= MODEL
    assert relative_error(encoder(image), theirs.encode(image).latent_dist.parameters) <= MODEL


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_half_precision_is_no_worse_than_diffusers(dtype: torch.dtype) -> None:
    theirs, _, decoder = trio(VAE)
    latents = torch.randn(2, 4, 6, 4)
    exact = theirs.decode(latents).sample
    got = decoder.to(dtype)(latents.to(dtype))
    their_own = theirs.to(dtype).decode(latents.to(dtype)).sample
    assert got.dtype == dtype
    assert relative_error(got, exact) <= MODEL_HALF_VERSUS_THEIRS * relative_error(their_own, exact)


def test_configuration() -> None:
    config = VAEConfig.from_dict({**VAE, "scaling_factor": 0.13025, "force_upcast": False, "shift_factor": 0})
    assert (config.scaling_factor, config.force_upcast) == (0.13025, False)
    assert config.scale == 8
    published = VAEConfig.from_dict(VAE)
    assert (published.scaling_factor, published.force_upcast) == (0.18215, True)


UNSUPPORTED: dict[str, Any] = {
    "act_fn": "relu",
    "latents_mean": [0.0, 0.0, 0.0, 0.0],
    "latents_std": [1.0, 1.0, 1.0, 1.0],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [],
    "norm_num_groups": 7,
    "layers_per_block": [1, 2, 1, 1],
    "in_channels": "3",
    "out_channels": 0,
    "latent_channels": None,
    "scaling_factor": "0.13",
    "shift_factor": 0.1,
    "force_upcast": 1,
    "use_quant_conv": "true",
    "use_post_quant_conv": 0,
    "mid_block_add_attention": 2,
    "a_field_of_tomorrow": True,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_an_unsupported_value_is_refused_by_name(field: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=f"^vae configuration: {field}="):
        VAEConfig.from_dict({**VAE, field: UNSUPPORTED[field]})


def test_a_depth_that_would_never_be_built_is_refused() -> None:
    with pytest.raises(
        UnsupportedConfigError, match=r"layers_per_block=10000000 .* an integer from 1 to 100$"
    ):
        VAEConfig.from_dict({**VAE, "layers_per_block": 10_000_000})


def test_every_field_of_diffusers_has_been_considered() -> None:
    fields = {f for f in AutoencoderKL(**VAE).config if not f.startswith("_")}
    assert fields - {"sample_size"} == UNSUPPORTED.keys() - {"a_field_of_tomorrow"}


def test_the_size_it_was_trained_for_is_passed_over() -> None:
    assert VAEConfig.from_dict({**VAE, "sample_size": [8, "of tomorrow"]}) == VAEConfig.from_dict(VAE)


def test_attention_of_older_checkpoints_gets_todays_names() -> None:
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key in AutoencoderKL(**VAE).state_dict():
        old = key
        for new_part, old_part in older.items():
            old = old.replace(f".{new_part}.", f".{old_part}.")
        assert (old != key) == (".to_" in key)
        assert rename_legacy_vae_keys(old) == key
        assert rename_legacy_vae_keys(key) == key
