"""Writes a diffusers SDXL checkpoint as a single file in the original key layout.

The way back from what `runtime/single_file.py` reads, written separately: it walks diffusers' module names one
component at a time, and is itself held to diffusers' single-file converters in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Config = Mapping[str, Any]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def to_original(states: Mapping[str, State], configs: Mapping[str, Config]) -> State:
    """All components' tensors, diffusers' (published) names -> one file's tensors."""
    base = "text_encoder" in states
    single: State = {}
    for key, value in states["unet"].items():
        single["model.diffusion_model." + _unet(key, configs["unet"])] = value
    for key, value in states["vae"].items():
        name, value = _vae(key, value, configs["vae"])
        single["first_stage_model." + name] = value
    for key, value in states.get("text_encoder", {}).items():
        single["conditioner.embedders.0.transformer." + key] = value
    prefix = f"conditioner.embedders.{1 if base else 0}.model."
    single |= {prefix + key: value for key, value in _open_clip(states["text_encoder_2"]).items()}
    return single


def _unet(key: str, config: Config) -> str:
    module, leaf = key.rsplit(".", 1)
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    per_level = config["layers_per_block"] + 1
    match = re.fullmatch(r"(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", key)
    assert match, key
    side, level, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        inner, leaf = rest.rsplit(".", 1)
        rest = f"{_RESNET[inner]}.{leaf}"
    if side == "mid":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * per_level}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{1 + level * per_level + layer}.{0 if kind == 'resnets' else 1}.{rest}"
    if kind == "upsamplers":
        attends = "CrossAttn" in config["up_block_types"][level]
        return f"output_blocks.{(level + 1) * per_level - 1}.{2 if attends else 1}.{rest}"
    return f"output_blocks.{level * per_level + layer}.{0 if kind == 'resnets' else 1}.{rest}"


def _vae(key: str, value: Tensor, config: Config) -> tuple[str, Tensor]:
    last = len(config["block_out_channels"]) - 1
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if ".attentions." in key:
        for new, old in {"group_norm": "norm", "to_out.0": "proj_out", "to_": ""}.items():
            key = key.replace(new, old)
        value = value[:, :, None, None] if value.ndim == 2 else value
        return key.replace("mid_block.attentions.0", "mid.attn_1"), value
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
    return key, value


def _open_clip(state: State) -> State:
    out: State = {}
    renames = {
        "text_model.encoder.layers": "transformer.resblocks",
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for key, value in state.items():
        if key.endswith("position_ids") or ".k_proj." in key or ".v_proj." in key:
            continue
        if key == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
            continue
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"])
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
        for new, old in renames.items():
            key = key.replace(new, old)
        out[key] = value
    out["logit_scale"] = torch.tensor(4.6)
    return out
