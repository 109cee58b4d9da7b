"""`runtime/models/unet.py`: the UNet against diffusers': outputs of every kind of configuration, at any size, and in
half precision."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.tiny_checkpoints import UNETS, randomize
from latentrt.errors import UnsupportedConfigError
from latentrt.runtime.models import unet_blocks
from latentrt.runtime.models.layers import join_channels
from latentrt.runtime.models.unet import UNet, UNetConfig, input_names
from tolerances import MODEL, MODEL_HALF_VERSUS_THEIRS, relative_error
from torch import Tensor, nn

Inputs = dict[str, Tensor]

ODD = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-3,
    "block_out_channels": (40, 48, 64),
    "layers_per_block": (1, 2, 3),
    "time_embedding_dim": 52,
    "attention_head_dim": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    **UNETS,
    "inpainting": {**UNETS["sd15"], "in_channels": 9},
    "learned variance": {**UNETS["sd15"], "out_channels": 8},
    "lcm": {**UNETS["sd15"], "time_cond_proj_dim": 12},
    "sdxl lcm": {**UNETS["sdxl"], "time_cond_proj_dim": 12},
    "odd fields": {**UNETS["sdxl"], **ODD},
    "odd sinusoids": {
        **UNETS["sdxl"],
        "addition_time_embed_dim": 9,
        "projection_class_embeddings_input_dim": 94,
    },
    "one level": {
        **UNETS["sd15"],
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
}


def pair(config: dict[str, Any]) -> tuple[UNet2DConditionModel, UNet]:
    """diffusers' model and ours, with the same random weights."""
    theirs = UNet2DConditionModel(**config).eval()
    randomize(theirs, seed=1)
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.eval()


def inputs_for(config: UNetConfig, batch: int, height: int, width: int) -> Inputs:
    """Everything the model takes, every row of its own."""
    draw = torch.Generator().manual_seed(2)
    inputs = {
        "sample": torch.randn(batch, config.in_channels, height, width, generator=draw),
        "timestep": torch.tensor([421.3, 0.0, 999.0])[:batch],  # float16 has no 421.3
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, generator=draw),
    }
    if config.addition_embed_type:
        channels, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        assert channels is not None
        assert each is not None
        numbers = (channels - 40) // each  # pooled text has 40 channels
        inputs["text_embeds"] = torch.randn(batch, 40, generator=draw)
        inputs["time_ids"] = torch.randint(0, 5000, (batch, numbers), generator=draw).float()
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.randn(batch, config.time_cond_proj_dim, generator=draw)
    assert tuple(inputs) == input_names(config)
    return inputs


@torch.inference_mode()
def expected(theirs: UNet2DConditionModel, inputs: Inputs) -> Tensor:
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    out: Tensor = theirs(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        timestep_cond=inputs.get("timestep_cond"),
        added_cond_kwargs=added or None,
    ).sample
    return out


@torch.inference_mode()
def computed(ours: UNet, inputs: Inputs) -> Tensor:
    out: Tensor = ours(*inputs.values())
    return out


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_output_is_diffusers(kind: str, batch: int) -> None:
    theirs, ours = pair(CONFIGS[kind])
    inputs = inputs_for(ours.config, batch, 8, 12)
    want = expected(theirs, inputs)
    assert want.std() > 0.3  # of a size to compare
    assert relative_error(computed(ours, inputs), want) <= MODEL


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 7), (6, 6), (13, 8), (16, 3)], ids=str)
def test_any_latent_size(size: tuple[int, int]) -> None:
    """Sizes that do not halve evenly grow back to what they were; four levels halve three times."""
    theirs, ours = pair(CONFIGS["refiner"])
    inputs = inputs_for(ours.config, 2, *size)
    assert relative_error(computed(ours, inputs), expected(theirs, inputs)) <= MODEL


def test_what_an_up_block_takes_is_gone_when_its_residual_block_runs() -> None:
    """At the finest level that is the upsampled image and the tensor kept: a fifth of a step's memory."""
    ours = UNet(UNetConfig.from_dict(CONFIGS["sdxl"])).eval()
    taken: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> None:
        taken[:] = [weakref.ref(image) for image in args[0][-2:]]

    def count(*_: object) -> None:
        alive.append(sum(image() is not None for image in taken))

    for up in ours.up_blocks:
        up.register_forward_pre_hook(take)
        up.resnets[0].norm1.register_forward_pre_hook(count)
    computed(ours, inputs_for(ours.config, 1, 8, 8))
    assert alive == [0, 0, 0]


def test_transformers_of_faint_activations() -> None:
    """Their variance is about the layer norms' eps, which is seen nowhere else."""
    theirs, ours = pair(CONFIGS["sdxl"])
    with torch.no_grad():  # the two models share their weights
        for name, parameter in theirs.named_parameters():
            if "proj_in" in name or "to_out" in name:
                parameter *= 3e-3
            if "proj_out" in name:
                parameter *= 3e2
    inputs = inputs_for(ours.config, 2, 8, 8)
    assert relative_error(computed(ours, inputs), expected(theirs, inputs)) <= MODEL


@pytest.mark.parametrize("kind", ["refiner", "sdxl lcm"])
def test_every_input_and_row_matters(kind: str) -> None:
    """Were an input ignored, or taken from another row, the comparisons above could not tell."""
    _, ours = pair(CONFIGS[kind])
    inputs = inputs_for(ours.config, 3, 8, 8)
    before = computed(ours, inputs)
    for name, tensor in inputs.items():
        changed = tensor.clone()
        changed[1] += 8 if name in ("time_ids", "timestep") else 0.1
        rows = (computed(ours, {**inputs, name: changed}) - before).abs().amax((1, 2, 3)) / before.abs().max()
        assert rows[1] > 100 * MODEL, name
        assert rows[[0, 2]].max() <= MODEL, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_no_worse_than_diffusers(dtype: torch.dtype) -> None:
    theirs, ours = pair(CONFIGS["sdxl"])
    inputs = inputs_for(ours.config, 2, 8, 8)
    exact = expected(theirs, inputs)
    full = ("timestep", "time_ids")
    half = {name: t if name in full else t.to(dtype) for name, t in inputs.items()}
    got, their_own = computed(ours.to(dtype), half), expected(theirs.to(dtype), half)
    assert got.dtype == dtype
    assert relative_error(got, exact) <= MODEL_HALF_VERSUS_THEIRS * relative_error(their_own, exact)


def test_upcast_attention_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.update(t.dtype for t in (q, k, v))
        return attention(q, k, v)

    attention = unet_blocks.attention
    monkeypatch.setattr(unet_blocks, "attention", spy)
    for upcast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        _, ours = pair({**CONFIGS["sd21"], "upcast_attention": upcast})
        inputs = inputs_for(ours.config, 1, 8, 8)
        half = {name: t if name == "timestep" else t.bfloat16() for name, t in inputs.items()}
        assert computed(ours.bfloat16(), half).dtype == torch.bfloat16
        assert seen == {dtype}
        seen.clear()


@pytest.mark.full
def test_tracing_keeps_sizes_free_and_dtypes_apart() -> None:
    """Traced once in float16, at one size: other batches and odd sizes run, and nothing mixes dtypes."""
    small = {"block_out_channels": (16, 32), "attention_head_dim": 2, "layers_per_block": 1}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    _, ours = pair({**UNETS["sdxl"], **small, **blocks, "transformer_layers_per_block": 1})
    ours.half()
    names = ("batch", "height", "width")
    batch, height, width = (
        torch.export.Dim(name, min=low) for name, low in zip(names, (1, 5, 5), strict=True)
    )

    def inputs(b: int, h: int, w: int) -> tuple[Tensor, ...]:
        drawn = inputs_for(ours.config, b, h, w)
        return tuple(t if name in ("timestep", "time_ids") else t.half() for name, t in drawn.items())

    shapes = ({0: batch, 2: height, 3: width}, *({0: batch},) * 4)
    program = torch.export.export(
        ours, inputs(2, 8, 12), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    for node in program.graph.nodes:
        if node.target == torch.ops.aten.cat.default:
            assert len({t.meta["val"].dtype for t in node.args[0]}) == 1, node
    with torch.inference_mode():
        for size in ((1, 7, 9), (3, 8, 8)):
            given = inputs(*size)
            assert relative_error(program.module()(*given), ours(*given)) <= MODEL


def test_missing_and_surplus_inputs_are_refused() -> None:
    _, ours = pair(CONFIGS["sdxl"])
    inputs = list(inputs_for(ours.config, 1, 8, 8).values())
    for wrong in (inputs[:3], inputs[:4], [*inputs, inputs[3]]):
        with pytest.raises(TypeError, match=f"text_embeds, time_ids: 5 inputs, not {len(wrong)}"):
            ours(*wrong)


def test_a_consistency_model_takes_its_guidance_by_position_or_by_name() -> None:
    _, ours = pair(CONFIGS["lcm"])
    inputs = inputs_for(ours.config, 2, 8, 8)
    with torch.inference_mode():
        assert torch.equal(ours(*inputs.values()), ours(**inputs))


@cache
def full_config(kind: str) -> dict[str, Any]:
    """With every field that diffusers knows."""
    return dict(UNet2DConditionModel(**UNETS[kind]).config)


# Fields that change nothing at inference, whatever they hold.
INERT = {"dropout": 0.1, "addition_embed_type_num_heads": 32}
UNSUPPORTED: dict[str, Any] = {
    "act_fn": "gelu",
    "attention_type": "gated",
    "center_input_sample": True,
    "class_embed_type": "projection",
    "class_embeddings_concat": True,
    "conv_in_kernel": 1,
    "conv_out_kernel": 5,
    "cross_attention_norm": "layer_norm",
    "downsample_padding": 0,
    "dual_cross_attention": True,
    "encoder_hid_dim": 768,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_only_cross_attention": True,
    "mid_block_scale_factor": 1.4,
    "mid_block_type": "UNetMidBlock2D",
    "num_attention_heads": 8,
    "num_class_embeds": 10,
    "only_cross_attention": [False, True, False],
    "resnet_out_scale_factor": 1.4,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": [[1], [1], [1]],
    "time_embedding_act_fn": "silu",
    "time_embedding_type": "fourier",
    "timestep_post_act": "silu",
    "addition_embed_type": "text_image",
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, "48", 64],
    "layers_per_block": [2, 2],
    "transformer_layers_per_block": [1, [1, 2], 2],
    "attention_head_dim": [2, 5, 4],
    "cross_attention_dim": [80, 80, 81],
    "norm_num_groups": 12,
    "norm_eps": "small",
    "flip_sin_to_cos": 1,
    "freq_shift": True,
    "in_channels": 0,
    "out_channels": 4.0,
    "sample_size": [64, 64, 64],
    "time_cond_proj_dim": -256,
    "time_embedding_dim": "512",
    "upcast_attention": "yes",
    "use_linear_projection": "no",
    "a_field_of_tomorrow": 3,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_an_unsupported_value_is_refused_by_name(field: str) -> None:
    config = {**full_config("sdxl"), field: UNSUPPORTED[field]}
    with pytest.raises(UnsupportedConfigError, match=f"^unet configuration: {field}="):
        UNetConfig.from_dict(config)


@pytest.mark.parametrize("field", ["layers_per_block", "transformer_layers_per_block"])
@pytest.mark.parametrize("value", [10_000_000, [1, 2, 101]], ids=str)
def test_depths_that_would_never_be_built_are_refused(field: str, value: int | list[int]) -> None:
    with pytest.raises(UnsupportedConfigError, match=rf"^unet configuration: {field}=.* from 1 to 100$"):
        UNetConfig.from_dict({**full_config("sdxl"), field: value})


def test_every_field_of_diffusers_has_been_considered() -> None:
    fields = {f for f in full_config("sd15") if not f.startswith("_")}
    assert fields == (UNSUPPORTED.keys() | INERT.keys()) - {"a_field_of_tomorrow"}


def test_fields_that_say_nothing_of_the_network_are_passed_over() -> None:
    ema = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 1000, "use_ema_warmup": False}
    config = full_config("sdxl")
    more = {**INERT, **ema, "_name_or_path": "somewhere", "a_field_of_tomorrow": None}
    assert UNetConfig.from_dict(config | more) == UNetConfig.from_dict(config)


def test_null_means_off_where_published_files_write_it() -> None:
    flags = ("upcast_attention", "use_linear_projection", "dual_cross_attention", "only_cross_attention")
    config = full_config("sd15")
    assert UNetConfig.from_dict(config | dict.fromkeys(flags)) == UNetConfig.from_dict(config)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 1, 1), (3, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_are_joined_as_by_cat(shape: tuple[int, int, int, int], layout: torch.memory_format) -> None:
    batch, channels, *size = shape
    pair = [torch.randn(batch, c, *size).contiguous(memory_format=layout) for c in (channels, channels + 2)]
    joined, wanted = join_channels(*pair), torch.cat(pair, dim=1)
    assert joined.equal(wanted)
    assert joined.stride() == wanted.stride()
