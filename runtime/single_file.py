"""Single-file SDXL checkpoints: from the key names of Stability AI's original code to those of diffusers.

    model.diffusion_model.*                       unet
    first_stage_model.*                           vae
    conditioner.embedders.0.transformer.*         text_encoder          (base: CLIP-L, as transformers names it)
    conditioner.embedders.1.model.*               text_encoder_2        (base: OpenCLIP bigG)
    conditioner.embedders.0.model.*               text_encoder_2        (refiner)

The names follow from the configuration (levels, layers a level, which levels attend), so that any checkpoint of
this anatomy is read. OpenCLIP stores query, key and value as one matrix and the projection transposed.
Source of the original names: Stability-AI/generative-models, `sgm/modules`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .weight_set import TensorRef

__all__ = ["convert", "recognise"]

_log = logging.getLogger(__name__)

Tensors = Mapping[str, TensorRef]
Configs = Mapping[str, Mapping[str, Any]]

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_CLIP = "conditioner.embedders.0.transformer."
_OPEN_CLIP = {"sdxl_base": "conditioner.embedders.1.model.", "sdxl_refiner": "conditioner.embedders.0.model."}

# Beside the weights: the noise schedule and marks (names without a dot), averages and losses of training, and
# CLIP's temperature.
_UNUSED = re.compile(
    r"[^.]+|model_ema\..*|denoiser\..*|first_stage_model\.loss\..*|conditioner\..*\.logit_scale"
)

# What other files are, by a key that only they have.
_OTHERS = (
    (re.compile(r"edm_vpred\..*"), "a CosXL checkpoint (EDM schedule)"),
    (re.compile(r"edm_mean"), "a Playground v2.5 checkpoint (EDM schedule)"),
    (re.compile(r"(double_blocks|model\.diffusion_model\.double_blocks)\..*"), "a FLUX checkpoint"),
    (re.compile(r"(joint_blocks|model\.diffusion_model\.joint_blocks)\..*"), "an SD 3 checkpoint"),
    (re.compile(r"lora_.*|.*\.lora_(A|B|up|down)\..*"), "a LoRA, which is no checkpoint of its own"),
    (
        re.compile(r"(down_blocks|mid_block|conv_in|encoder|decoder|text_model)\..*"),
        "one diffusers component",
    ),
)


def recognise(file: Path, tensors: Tensors) -> str:
    """`sdxl_base` or `sdxl_refiner`.

    Raises:
        CheckpointError: neither; says what the file looks like.
    """
    for pattern, description in _OTHERS:
        if any(pattern.fullmatch(key) for key in tensors):
            raise _refused(file, description)
    sdxl = any(key.startswith("conditioner.") for key in tensors)
    if not sdxl and any(key.startswith("cond_stage_model.") for key in tensors):
        raise _refused(file, "a single-file SD 1.x or 2.x checkpoint")
    prefixes = {"the UNet": _UNET, "the VAE": _VAE}
    has = {prefix: any(key.startswith(prefix) for key in tensors) for prefix in (_UNET, _VAE, _CLIP)}
    kinds = [kind for kind, prefix in _OPEN_CLIP.items() if f"{prefix}ln_final.weight" in tensors]
    absent = [name for name, prefix in prefixes.items() if not has[prefix]]
    if kinds == ["sdxl_base"] and not has[_CLIP]:
        absent.append("the first text encoder")
    if not kinds:
        absent.append("the text encoders")
    if absent == [*prefixes, "the text encoders"]:
        raise _refused(file, f"{len(tensors)} tensors such as {', '.join(sorted(tensors)[:3])}")
    if absent:
        raise _refused(file, f"an SDXL file without {' and '.join(absent)}")
    return kinds[0]


def _refused(file: Path, description: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is {description}; a single file must be a whole SDXL base or refiner checkpoint in the original "
        "key layout. Other models load from their diffusers folder"
    )


def convert(kind: str, tensors: Tensors, configs: Configs) -> dict[str, dict[str, TensorRef]]:
    """component -> diffusers' key -> tensor.

    Args:
        kind: as `recognise` says.
        tensors: every tensor of the file.
        configs: `config.json` of unet and vae.

    A key that the layout does not have keeps its name, so that filling the component reports it as surplus. A
    warning names tensors that belong to no component.
    """
    open_clip = _OPEN_CLIP[kind]
    unet, vae = _unet_modules(configs["unet"]), _vae_modules(configs["vae"])
    components: dict[str, dict[str, TensorRef]] = {"unet": {}, "vae": {}, "text_encoder_2": {}}
    if kind == "sdxl_base":
        components["text_encoder"] = {}
    strays = []
    for key, ref in tensors.items():
        if _UNUSED.fullmatch(key):
            continue
        if key.startswith(_UNET):
            components["unet"][_renamed(key.removeprefix(_UNET), unet)] = ref
        elif key.startswith(_VAE):
            name = _renamed(key.removeprefix(_VAE), vae)
            components["vae"][name] = _as_linear(ref) if ".attentions." in name else ref
        elif key.startswith(open_clip):
            components["text_encoder_2"].update(_open_clip(key.removeprefix(open_clip), ref))
        elif key.startswith(_CLIP) and kind == "sdxl_base":
            components["text_encoder"][key.removeprefix(_CLIP)] = ref
        else:
            strays.append(key)
    if strays:
        shown = ", ".join(sorted(strays)[:5])
        _log.warning("%d tensors belong to no component and are not used: %s ...", len(strays), shown)
    return components


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    """The key with its longest known module path replaced."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        module = modules.get(".".join(parts[:end]))
        if module is not None:
            return ".".join([module, *parts[end:]])
    return key


_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Original module path -> diffusers' path. Within attention blocks the two agree."""
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def resnet(original: str, name: str) -> None:
        modules.update({f"{original}.{old}": f"{name}.{new}" for old, new in _RESNET.items()})

    resnet("middle_block.0", "mid_block.resnets.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    layers = int(config["layers_per_block"])
    downs, ups = list(config["down_block_types"]), list(config["up_block_types"])
    block = 1
    for level, kind in enumerate(downs):
        for layer in range(layers):
            resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}")
            if kind.startswith("CrossAttn"):
                modules[f"input_blocks.{block}.1"] = f"down_blocks.{level}.attentions.{layer}"
            block += 1
        if level < len(downs) - 1:
            modules[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, kind in enumerate(ups):
        attends = kind.startswith("CrossAttn")
        for layer in range(layers + 1):
            resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                modules[f"output_blocks.{block}.1"] = f"up_blocks.{level}.attentions.{layer}"
            if layer == layers and level < len(ups) - 1:
                upsampler = f"output_blocks.{block}.{2 if attends else 1}.conv"
                modules[upsampler] = f"up_blocks.{level}.upsamplers.0.conv"
            block += 1
    return modules


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Original module path -> diffusers' path. The original counts the decoder's levels from the finest."""
    modules = {}
    levels, layers = len(config["down_block_types"]), int(config["layers_per_block"])

    def resnet(original: str, name: str) -> None:
        modules[original] = name
        modules[f"{original}.nin_shortcut"] = f"{name}.conv_shortcut"

    for half in ("encoder", "decoder"):
        modules[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        for old, new in attention.items():
            modules[f"{half}.mid.attn_1.{old}"] = f"{half}.mid_block.attentions.0.{new}"
    for level in range(levels):
        for layer in range(layers):
            resnet(f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}")
        modules[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        mirrored = levels - 1 - level
        for layer in range(layers + 1):
            resnet(f"decoder.up.{mirrored}.block.{layer}", f"decoder.up_blocks.{level}.resnets.{layer}")
        modules[f"decoder.up.{mirrored}.upsample.conv"] = f"decoder.up_blocks.{level}.upsamplers.0.conv"
    return modules


def _as_linear(ref: TensorRef) -> TensorRef:
    """[C, C, 1, 1] -> [C, C]: attention by 1x1 convolutions is attention by linear layers."""
    return replace(ref, shape=ref.shape[:2]) if len(ref.shape) == 4 else ref


_OPEN_CLIP_MODULES = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_OPEN_CLIP_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _open_clip(key: str, ref: TensorRef) -> Iterator[tuple[str, TensorRef]]:
    """One tensor of OpenCLIP's text tower -> transformers' names, of which the fused projection has three."""
    if key == "positional_embedding":
        yield "text_model.embeddings.position_embedding.weight", ref
    elif key == "text_projection":
        # x @ P there, a linear layer here.
        yield "text_projection.weight", replace(ref, shape=ref.shape[::-1], transpose=True)
    elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key):
        shape = (ref.shape[0] // 3, *ref.shape[1:])
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            part = replace(ref, shape=shape, part=(index, 3))
            yield f"text_model.encoder.layers.{match[1]}.self_attn.{name}.{match[2]}", part
    elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key):
        yield f"text_model.encoder.layers.{match[1]}.{_renamed(match[2], _OPEN_CLIP_LAYER)}", ref
    else:
        yield _renamed(key, _OPEN_CLIP_MODULES), ref
