"""Single-file checkpoints against diffusers' own converters, at full size by names and at tiny size by values."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from helpers.original_layout import State, to_original
from latentrt.errors import CheckpointError, UnsafeWeightsError, WeightsMismatchError
from latentrt.runtime import single_file, weights
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.weight_set import TensorRef
from latentrt.runtime.weights import Checkpoint, open_checkpoint
from safetensors.torch import load_file, save_file
from tolerances import PIPELINE_EAGER
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Tiny = Callable[..., Path]
DATA = Path(weights.__file__).parent / "data"
KINDS = {"sdxl": "sdxl_base", "refiner": "sdxl_refiner"}


def _config(folder: Path, component: str) -> dict[str, Any]:
    config = json.loads((folder / component / "config.json").read_text())
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _components(kind: str) -> list[str]:
    return ["unet", "vae", "text_encoder_2", *(["text_encoder"] if kind == "sdxl" else [])]


def _states(folder: Path, kind: str) -> dict[str, State]:
    states = {}
    for component in _components(kind):
        (file,) = (folder / component).glob("*.safetensors")
        states[component] = load_file(file)
    return states


def _original(folder: Path, kind: str) -> State:
    return to_original(_states(folder, kind), {name: _config(folder, name) for name in ("unet", "vae")})


def _by_diffusers(single: State, folder: Path, kind: str) -> dict[str, State]:
    """What diffusers makes of a single file."""
    second = f"conditioner.embedders.{1 if kind == 'sdxl' else 0}.model."
    text_2 = SimpleNamespace(config=SimpleNamespace(**_config(folder, "text_encoder_2")))
    converted = {
        "unet": convert_ldm_unet_checkpoint(dict(single), _config(folder, "unet")),
        "vae": convert_ldm_vae_checkpoint(dict(single), _config(folder, "vae")),
        "text_encoder_2": convert_open_clip_checkpoint(text_2, dict(single), prefix=second),
    }
    if kind == "sdxl":
        converted["text_encoder"] = convert_ldm_clip_checkpoint(dict(single))
    return converted


class _Holder(nn.Module):
    """A module with the parameters of a state dict, on meta."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
        for key, value in self.state.items():
            self.register_parameter(
                key.replace(".", "/"), nn.Parameter(torch.empty(value.shape, device="meta"))
            )


def _read(checkpoint: Checkpoint, component: str, like: State, dtype: torch.dtype = torch.float32) -> State:
    holder = _Holder(like)
    checkpoint.weights(component).load_into(holder, dtype, rename=lambda key: key.replace(".", "/"))
    return {key.replace("/", "."): value for key, value in holder.state_dict().items()}


@pytest.fixture(scope="module")
def files(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny base and refiner as single files, with what real files hold besides."""
    made = {}
    for kind in KINDS:
        single = _original(tiny(kind), kind)
        single["denoiser.sigmas"] = torch.zeros(1000)
        single["betas"] = torch.zeros(1000)
        single["model_ema.decay"] = torch.zeros(1)
        made[kind] = tmp_path_factory.mktemp("single") / f"{kind}.safetensors"
        save_file(single, made[kind])
    return made


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_diffusers_and_the_folder(tiny: Tiny, files: dict[str, Path], kind: str) -> None:
    checkpoint = open_checkpoint(files[kind])
    folder = _states(tiny(kind), kind)
    for component, oracle in _by_diffusers(load_file(files[kind]), tiny(kind), kind).items():
        got = _read(checkpoint, component, folder[component])
        assert got.keys() == {key for key in oracle if not key.endswith("position_ids")}
        for key, value in got.items():
            assert torch.equal(value, oracle[key]), f"{component}: {key}"
            assert torch.equal(value, folder[component][key]), f"{component}: {key}"


@pytest.mark.usefixtures("tiny_configs")
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_the_folders(kind: str, tiny: Tiny, files: dict[str, Path]) -> None:
    call: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    if kind == "refiner":
        picture = torch.rand((1, 3, 64, 48), generator=torch.Generator().manual_seed(3))
        call |= {"image": picture, "strength": 1.0}
    else:
        call |= {"height": 64, "width": 48}
    ours = []
    for model in (files[kind], tiny(kind)):
        pipe = Pipeline.from_pretrained(model, backend="eager")
        pipe.set_progress_bar_config(disable=True)
        ours.append(pipe(**call).images)
    assert ours[0].std() > 0.01
    # The weights are equal to the bit, see above. They are mapped, and begin elsewhere in a cache line in another file,
    # by which some processors' matrix products are rounded.
    assert np.abs(ours[0] - ours[1]).max() <= PIPELINE_EAGER


@pytest.mark.usefixtures("tiny_configs")
def test_a_relative_path_is_found_from_another_working_directory(
    tiny: Tiny, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files["sdxl"].parent)
    checkpoint = open_checkpoint(files["sdxl"].name)
    expected = _read(checkpoint, "vae", _states(tiny("sdxl"), "sdxl")["vae"])
    save_file({name: 0.9 * x for name, x in load_file(files["sdxl"]).items()}, tmp_path / files["sdxl"].name)
    monkeypatch.chdir(tmp_path)
    again = _read(checkpoint, "vae", expected)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    assert checkpoint.source == files["sdxl"].name  # as typed, for messages


@pytest.mark.usefixtures("tiny_configs")
def test_a_variant_of_a_single_file_is_warned_of(
    tiny: Tiny, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(files["sdxl"], variant="fp16")
    assert f"{files['sdxl']} is a single file, which has no variant 'fp16'" in caplog.text
    assert {ref.dtype for ref in checkpoint.weights("unet").tensors.values()} == {"F32"}


@pytest.mark.usefixtures("tiny_configs")
def test_values_are_converted_to_the_dtype(tiny: Tiny, files: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(files["sdxl"])
    like = _states(tiny("sdxl"), "sdxl")["text_encoder_2"]
    for key, value in _read(checkpoint, "text_encoder_2", like, torch.bfloat16).items():
        assert torch.equal(value, like[key].bfloat16()), key


@pytest.mark.parametrize("kind", KINDS)
def test_every_full_size_key_has_the_name_and_shape_diffusers_gives_it(kind: str) -> None:
    folder = DATA / KINDS[kind]
    modules: dict[str, type[nn.Module]] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    with torch.device("meta"):
        states = {name: model(**_config(folder, name)).state_dict() for name, model in modules.items()}
        config = CLIPTextConfig(**_config(folder, "text_encoder_2"))
        states["text_encoder_2"] = CLIPTextModelWithProjection(config).state_dict()
        if kind == "sdxl":
            state = CLIPTextModel(CLIPTextConfig(**_config(folder, "text_encoder"))).state_dict()
            states["text_encoder"] = {
                f"text_model.{key.removeprefix('text_model.')}": v for key, v in state.items()
            }
        single = to_original(states, {name: _config(folder, name) for name in modules})
        oracle = _by_diffusers(single, folder, kind)

    file = Path("sdxl.safetensors")
    tensors = {key: TensorRef(file, key, tuple(value.shape), "F16") for key, value in single.items()}
    assert single_file.recognise(file, tensors) == KINDS[kind]
    converted = single_file.convert(KINDS[kind], tensors, {n: _config(folder, n) for n in modules})
    for component, expected in oracle.items():
        shapes = {key: ref.shape for key, ref in converted[component].items()}
        assert shapes == {key: tuple(value.shape) for key, value in expected.items()}, component
        assert shapes == {key: tuple(value.shape) for key, value in states[component].items()}, component
    counts = {"sdxl": 2_567_463_684, "refiner": 2_259_526_660}
    assert sum(torch.Size(ref.shape).numel() for ref in converted["unet"].values()) == counts[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_configurations_describe_single_files(
    kind: str, tiny: Tiny, files: dict[str, Path], tmp_path: Path
) -> None:
    """A file is taken for full size: what SDXL's configurations say."""
    checkpoint = open_checkpoint(files[kind])
    assert checkpoint.config("unet")["projection_class_embeddings_input_dim"] == (
        2816 if kind == "sdxl" else 2560
    )
    assert checkpoint.config("scheduler")["_class_name"] == "EulerDiscreteScheduler"
    assert checkpoint.has("text_encoder") == (kind == "sdxl")
    assert checkpoint.has("tokenizer_2")
    assert checkpoint.model_index["force_zeros_for_empty_prompt"] == (kind == "sdxl")
    assert checkpoint.model_index.get("requires_aesthetics_score", False) == (kind == "refiner")
    files_2 = checkpoint.tokenizer_files("tokenizer_2")
    assert (len(files_2.vocab), len(files_2.merges)) == (49408, 48894)
    assert files_2.config["pad_token"] == "!"
    if kind == "refiner":
        with pytest.raises(CheckpointError, match=r"has no text_encoder; it has .*text_encoder_2"):
            checkpoint.weights("text_encoder")
        with pytest.raises(CheckpointError, match="has no tokenizer; it has"):
            checkpoint.tokenizer_files("tokenizer")


@pytest.mark.usefixtures("tiny_configs")
def test_components_of_one_file_have_one_hash_of_it(tiny: Tiny, files: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(files["sdxl"])
    assert checkpoint.weights("unet").files == (files["sdxl"],)
    assert checkpoint.weights("unet").digest() == checkpoint.weights("vae").digest()


def _changed(file: Path, folder: Path, **changes: Tensor | None) -> Path:
    state = load_file(file)
    for key, value in changes.items():
        state.pop(key.replace("/", "."), None)
        if value is not None:
            state[key.replace("/", ".")] = value
    save_file(state, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.mark.usefixtures("tiny_configs")
def test_surplus_and_missing_keys_are_named(tiny: Tiny, files: dict[str, Path], tmp_path: Path) -> None:
    changes = {
        "model/diffusion_model/out/0/weight": None,
        "model/diffusion_model/input_blocks/99/0/op/weight": torch.zeros(2),
    }
    checkpoint = open_checkpoint(_changed(files["sdxl"], tmp_path, **changes))
    with pytest.raises(WeightsMismatchError) as caught:
        _read(checkpoint, "unet", _states(tiny("sdxl"), "sdxl")["unet"])
    assert "1 missing: conv_norm_out/weight" in str(caught.value)
    assert "1 surplus: input_blocks/99/0/op/weight" in str(caught.value)


@pytest.mark.usefixtures("tiny_configs")
def test_inpainting_and_v_prediction_are_read_off_the_file(
    tiny: Tiny, files: dict[str, Path], tmp_path: Path
) -> None:
    changes = {
        "model/diffusion_model/input_blocks/0/0/weight": torch.zeros(32, 9, 3, 3),
        "v_pred": torch.zeros(0),
        "ztsnr": torch.zeros(0),
    }
    checkpoint = open_checkpoint(_changed(files["sdxl"], tmp_path, **changes))
    assert checkpoint.config("unet")["in_channels"] == 9
    scheduler = checkpoint.config("scheduler")
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True


@pytest.mark.usefixtures("tiny_configs")
def test_strays_are_warned_of(
    tiny: Tiny, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strays = {
        "control_model/weight": torch.zeros(2),
        "cond_stage_model/weight": torch.zeros(2),
    }  # the last as SD 1.x
    file = _changed(files["refiner"], tmp_path, **strays)
    with caplog.at_level(logging.WARNING):
        open_checkpoint(file)
    told = "2 tensors belong to no component and are not used: cond_stage_model.weight, control_model.weight"
    assert told in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_checkpoint(files["refiner"])
    assert not caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["cond_stage_model.model.ln_final.weight"], "a single-file SD 1.x or 2.x checkpoint"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "a FLUX checkpoint"),
        (["lora_unet_down.lora_up.weight"], "a LoRA"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one diffusers component"),
        (["edm_vpred.sigma_max", "model.diffusion_model.out.0.weight"], "a CosXL checkpoint"),
        (["edm_mean", "model.diffusion_model.out.0.weight"], "a Playground v2.5 checkpoint"),
        (["something.weight"], "1 tensors such as something.weight"),
        (
            ["model.diffusion_model.out.0.weight", "conditioner.embedders.1.model.ln_final.weight"],
            "an SDXL file without the VAE and the first text encoder",
        ),
        (
            ["model.diffusion_model.out.0.weight", "first_stage_model.decoder.conv_in.weight"],
            "an SDXL file without the text encoders",
        ),
    ],
)
def test_other_files_are_refused_and_named(tmp_path: Path, keys: list[str], message: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: torch.zeros(2) for key in keys}, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value)
    assert "diffusers folder" in str(caught.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_unread(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04 never unpickled")
    with pytest.raises(UnsafeWeightsError, match=r"is a pickle; unpickling can run code.*safetensors"):
        open_checkpoint(file)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model.gguf is not a .safetensors file"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_truncated_file_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    whole = files["sdxl"].read_bytes()
    for length in (0, 5, 1000, len(whole) - 1):
        file = tmp_path / "cut.safetensors"
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut.safetensors is damaged .*fetch it again"):
            open_checkpoint(file)
