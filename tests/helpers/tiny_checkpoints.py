"""Tiny random checkpoints with the anatomy of published ones, saved by diffusers.

    folder = save_tiny("sdxl", tmp_path / "sdxl")     # kinds: sdxl, refiner, sd15, sd21

Weights are drawn so that activations stay near 1, every norm and bias matters and the prompt moves the image.
diffusers and transformers save today's key names; `published=True` renames them to those of real checkpoints:
the `text_model.` prefix and `position_ids` buffer of text encoders, and the query/key/value/proj_attn
attention of SD 1.x VAEs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from latentrt.runtime.tokenizer_files import END_TOKEN, START_TOKEN, clip_merges, clip_vocabulary
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

KINDS = ("sdxl", "refiner", "sd15", "sd21")
MERGES = 1000
"""Of CLIP's merges that the tiny tokenizers keep: their vocabulary has 1,514 tokens."""

Config = dict[str, Any]

_EULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SCHEDULERS: dict[str, Config] = {
    "sdxl": _EULER,
    "refiner": _EULER,
    "sd15": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "sd21": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}
"""`scheduler_config.json` of each published checkpoint, word for word."""

_LCM_SCHEDULER: Config = {
    "_class_name": "LCMScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "original_inference_steps": 50,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_scaling": 10.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

# Widths differ on purpose, so that no two dimensions can be mixed up unnoticed.
ENCODER_1 = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32}
ENCODER_2 = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "projection_dim": 40}

# Published UNets have two layers a block. One is enough for most: exporting them takes the tests half as long.
_UNET: Config = {"sample_size": 16, "norm_num_groups": 8, "layers_per_block": 1}
UNETS: dict[str, Config] = {
    "sdxl": {
        **_UNET,
        "block_out_channels": (32, 48, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 3, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 32 + 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
    },
    "refiner": {
        **_UNET,
        "block_out_channels": (32, 48, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 3, 4, 4),
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "cross_attention_dim": 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 5 * 8,
    },
    "sd15": {
        **_UNET,
        "layers_per_block": 2,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
    },
    "sd21": {
        **_UNET,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 48,
    },
}
VAE: Config = {
    "block_out_channels": (16, 16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 128,
}
_PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
}


def save_tiny(
    kind: str, path: Path, *, seed: int = 0, published: bool = True, variant: str | None = None
) -> Path:
    """Write the checkpoint as a diffusers folder of safetensors and return `path`.

    Args:
        kind: one of `KINDS`. The refiner shares the second encoder's and the VAE's weights with sdxl of the
            same seed, as published ones do.
        seed: of all weights.
        published: rename keys to those of published checkpoints.
        variant: such as "fp16": weights in half precision, files named `*.fp16.safetensors`.
    """
    path.mkdir(parents=True, exist_ok=True)
    index: Config = {"_class_name": _PIPELINES[kind], "_diffusers_version": "0.19.0.dev0"}
    if kind == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    if kind == "refiner":
        index |= {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}

    modules: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**UNETS[kind]), "vae": _vae(kind)}
    if kind in ("sdxl", "sd15"):
        act = {"hidden_act": "quick_gelu", "num_hidden_layers": 3}
        modules["text_encoder"] = CLIPTextModel(_clip_config(**ENCODER_1, **act))
    if kind == "sd21":
        modules["text_encoder"] = CLIPTextModel(
            _clip_config(**ENCODER_2, hidden_act="gelu", num_hidden_layers=3)
        )
    if kind in ("sdxl", "refiner"):
        act = {"hidden_act": "gelu", "num_hidden_layers": 4}
        modules["text_encoder_2"] = CLIPTextModelWithProjection(_clip_config(**ENCODER_2, **act))

    for name, module in modules.items():
        # The same name and seed give the same weights in every kind.
        randomize(module, seed * 1000 + sum(name.encode()))
        if (kind, name) == ("refiner", "unet"):
            # Late steps move the latents little; a larger output keeps a wrong guidance scale visible.
            module.conv_out.weight.data.mul_(5)
        if variant == "fp16":
            module.half()
        module.save_pretrained(path / name, variant=variant, safe_serialization=True)
        index[name] = ["diffusers" if name in ("unet", "vae") else "transformers", type(module).__name__]
        if published:
            _rename_as_published(kind, name, path / name)
    for name in ("text_encoder", "text_encoder_2"):
        tokenizer = name.replace("text_encoder", "tokenizer")
        if name in modules:
            clip_l = name == "text_encoder" and kind != "sd21"
            # SD 2.1's tokenizer_config.json has another pad token than its special_tokens_map.json, which counts.
            config = {"pad_token": END_TOKEN} if kind == "sd21" else {}
            save_tokenizer(path / tokenizer, pad_token=END_TOKEN if clip_l else "!", config=config)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
        elif kind == "refiner":
            index |= {name: [None, None], tokenizer: [None, None]}
    if kind in ("sd15", "sd21"):
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    index["scheduler"] = ["diffusers", SCHEDULERS[kind]["_class_name"]]
    write_json(path / "scheduler" / "scheduler_config.json", SCHEDULERS[kind])
    write_json(path / "model_index.json", index)
    return path


def save_lcm(path: Path, sdxl: Path) -> Path:
    """A checkpoint like LCM-SDXL: a UNet that is told the guidance scale, and its scheduler."""
    return save_beside(path, sdxl, {"time_cond_proj_dim": 20}, _LCM_SCHEDULER)


def save_beside(path: Path, sdxl: Path, fields: Config, scheduler: Config) -> Path:
    """A checkpoint with SDXL's text encoders and VAE, and a UNet (`fields` differ) and scheduler of its own."""
    path.mkdir(parents=True, exist_ok=True)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        (path / part).symlink_to(sdxl / part, target_is_directory=True)
    unet = UNet2DConditionModel(**{**UNETS["sdxl"], **fields})
    randomize(unet, 77)
    unet.save_pretrained(path / "unet", safe_serialization=True)
    write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    index = json.loads((sdxl / "model_index.json").read_text("utf-8"))
    write_json(path / "model_index.json", {**index, "scheduler": ["diffusers", scheduler["_class_name"]]})
    return path


def save_tokenizer(
    folder: Path, *, pad_token: str, merges: int = MERGES, config: Config | None = None
) -> None:
    """CLIP's tokenizer cut to its first merges, in the files that published checkpoints have; `config` is what its
    tokenizer_config.json says besides, or differently."""
    pairs = clip_merges()[:merges]
    write_json(folder / "vocab.json", clip_vocabulary(pairs))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs), "utf-8")
    special = {
        "bos_token": START_TOKEN,
        "eos_token": END_TOKEN,
        "unk_token": END_TOKEN,
        "pad_token": pad_token,
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "tokenizer_class": "CLIPTokenizer",
            **(config or {}),
        },
    )


def randomize(module: nn.Module, seed: int) -> None:
    """Fill every parameter: weights keep the variance of what passes through, norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = (nn.LayerNorm, nn.GroupNorm)
    with torch.no_grad():
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if isinstance(child, norms) and name == "weight":
                    parameter.copy_(1 + 0.2 * noise)
                elif isinstance(child, nn.Embedding):
                    parameter.copy_(0.7 * noise)
                elif parameter.ndim == 1:
                    parameter.copy_(0.1 * noise)
                else:
                    parameter.copy_(noise / math.sqrt(parameter[0].numel()))


def write_json(path: Path, data: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _clip_config(**fields: Any) -> CLIPTextConfig:
    # eos_token_id 2 is what published SDXL and SD checkpoints carry: the pooled row is then the highest id's.
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return CLIPTextConfig(vocab_size=514 + MERGES, max_position_embeddings=77, **ids, **fields)


def _vae(kind: str) -> AutoencoderKL:
    xl = kind in ("sdxl", "refiner")
    return AutoencoderKL(**VAE, scaling_factor=0.13025 if xl else 0.18215, force_upcast=xl)


def _rename_as_published(kind: str, component: str, folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    if component.startswith("text_encoder"):
        bare = ("embeddings.", "encoder.", "final_layer_norm.")
        state = {f"text_model.{k}" if k.startswith(bare) else k: v for k, v in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif component == "vae" and kind == "sd15":
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, old in names.items():
            state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    save_file(state, file, metadata={"format": "pt"})
