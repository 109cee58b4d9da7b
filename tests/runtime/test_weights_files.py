"""`runtime/weight_set.py`: which files make a component: shards, variants, links; and what is refused, with its
name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny_checkpoints import write_json
from helpers.tiny_net import STATE, folder_with, on_meta
from latentrt.errors import CheckpointError, CheckpointNotFoundError, UnsafeWeightsError
from latentrt.runtime import weights
from latentrt.runtime.weights import open_checkpoint
from safetensors.torch import save_file

Tiny = Callable[..., Path]


def shards(path: Path, variant: str | None = None, index: str | None = None) -> Path:
    """The UNet in two shards, named as diffusers names them."""
    dot = f".{variant}" if variant else ""
    names = [f"diffusion_pytorch_model-0000{n}-of-00002{dot}.safetensors" for n in (1, 2)]
    parts = {names[0]: ["conv.weight"], names[1]: [key for key in STATE if key != "conv.weight"]}
    files = {name: {key: STATE[key] for key in keys} for name, keys in parts.items()}
    folder_with(path, files)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    write_json(
        path / "unet" / (index or "diffusion_pytorch_model.safetensors.index.json"),
        {"metadata": {"total_size": 1}, "weight_map": weight_map},
    )
    return path


@pytest.mark.parametrize("padding", range(4))
def test_numbers_that_begin_anywhere_are_read_to_where_they_may_lie(tmp_path: Path, padding: int) -> None:
    """Nothing makes a writer pad its header."""
    folder = folder_with(tmp_path, {"diffusion_pytorch_model.safetensors": STATE})
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    header += b" " * ((padding - len(header)) % 4)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    module = on_meta()
    open_checkpoint(folder).weights("unet").load_into(module, torch.float32)
    for key, value in module.state_dict().items():
        assert value.data_ptr() % 4 == 0
        assert value.equal(STATE[key])


@pytest.mark.parametrize(
    ("variant", "index"),
    [
        (None, "diffusion_pytorch_model.safetensors.index.json"),
        ("fp16", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ("fp16", "diffusion_pytorch_model.fp16.safetensors.index.json"),
    ],
)
def test_shards_are_one_component(tmp_path: Path, variant: str | None, index: str) -> None:
    weights = open_checkpoint(shards(tmp_path, variant, index), variant=variant).weights("unet")
    assert len(weights.files) == 2
    module = on_meta()
    weights.load_into(module, torch.float32)
    assert all(torch.equal(value, STATE[key]) for key, value in module.state_dict().items())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (shards(tmp_path) / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors is missing; .*fetch it again"):
        open_checkpoint(tmp_path).weights("unet")


@pytest.mark.parametrize(
    "name", ["../vae/model.safetensors", "/etc/passwd", "..\\model.safetensors", "..", "model.bin", ""]
)
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    index = shards(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"weight_map": {"conv.weight": name}})
    with pytest.raises(CheckpointError, match=r"not a safetensors file beside it; refused") as caught:
        open_checkpoint(tmp_path).weights("unet")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[]", "holds a list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, text: str, message: str) -> None:
    index = shards(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path).weights("unet")
    assert str(index) in str(caught.value)


def test_shards_need_their_index(tmp_path: Path) -> None:
    (shards(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has shards such as .*00001-of-00002.* without an index"):
        open_checkpoint(tmp_path).weights("unet")


def test_two_shards_with_one_key_are_refused(tmp_path: Path) -> None:
    second = shards(tmp_path) / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    save_file(STATE, second)
    with pytest.raises(CheckpointError, match=r"both have 'conv.weight'"):
        open_checkpoint(tmp_path).weights("unet")


def test_a_variant_is_read(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny("sdxl", variant="fp16"), variant="fp16")
    (file,) = checkpoint.weights("unet").files
    assert file.name == "diffusion_pytorch_model.fp16.safetensors"
    assert {ref.dtype for ref in checkpoint.weights("unet").tensors.values()} == {"F16"}
    assert checkpoint.weights("text_encoder_2").files[0].name == "model.fp16.safetensors"


def test_the_plain_files_are_read_without_a_variant(tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in STATE.items()}
    folder_with(
        tmp_path,
        {"diffusion_pytorch_model.safetensors": STATE, "diffusion_pytorch_model.fp16.safetensors": other},
    )
    assert open_checkpoint(tmp_path).weights("unet").files[0].name == "diffusion_pytorch_model.safetensors"


def test_a_component_without_the_variant_is_read_plain_with_a_warning(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny("sdxl", variant="fp16"), folder)
    shutil.rmtree(folder / "vae")
    shutil.copytree(tiny("sdxl") / "vae", folder / "vae")
    checkpoint = open_checkpoint(folder, variant="fp16")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.weights("vae").files[0].name == "diffusion_pytorch_model.safetensors"
    assert "vae has no variant 'fp16': reading diffusion_pytorch_model.safetensors" in caplog.text


@pytest.mark.parametrize("variant", ["fp61", "*", "[a-z]*"])
def test_an_unknown_variant_is_refused(tiny: Tiny, variant: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tiny("sdxl", variant="fp16"), variant=variant)
    message = str(caught.value)
    assert f"nothing of variant {variant!r}; its weights are diffusion_pytorch_model.fp16" in message
    assert "Leave variant out" in message


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (folder_with(tmp_path, {}) / "unet" / name).write_bytes(b"\x80\x04 never unpickled")
    with pytest.raises(UnsafeWeightsError) as caught:
        open_checkpoint(tmp_path).weights("unet")
    assert f"{tmp_path / 'unet'} has only pickled weights ({name}); unpickling can run code" in str(
        caught.value
    )
    assert "safe_serialization=True" in str(caught.value)


def test_safetensors_are_read_beside_a_pickle(tmp_path: Path) -> None:
    folder_with(tmp_path, {"diffusion_pytorch_model.safetensors": STATE})
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    assert open_checkpoint(tmp_path).weights("unet").files[0].suffix == ".safetensors"


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    folder_with(tmp_path, {"other.safetensors": STATE})
    expected = (
        r"has no weights: expected diffusion_pytorch_model.safetensors or model.safetensors, found config"
    )
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(tmp_path).weights("unet")


@pytest.mark.parametrize("target", ["../blobs/gone", "model.safetensors"], ids=["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    """As a hub cache is left when its blobs were deleted."""
    (folder_with(tmp_path, {}) / "unet" / "model.safetensors").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link to a file that is gone; fetch"):
        open_checkpoint(tmp_path).weights("unet")


@pytest.mark.parametrize("length", [0, 7, 200, -1])
def test_a_truncated_file_is_named(tmp_path: Path, length: int) -> None:
    file = folder_with(tmp_path, {"model.safetensors": STATE}) / "unet" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"is damaged or is not a safetensors file") as caught:
        open_checkpoint(tmp_path).weights("unet").load_into(on_meta(), torch.float32)
    assert str(file) in str(caught.value)


def test_a_pickle_in_disguise_is_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, {})
    torch.save(STATE, tmp_path / "unet" / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        open_checkpoint(tmp_path).weights("unet")


def test_a_listed_component_that_is_absent_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny("sdxl"), folder, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(CheckpointError, match=r"lists vae in model_index.json but .* is missing"):
        open_checkpoint(folder).weights("vae")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"unet.config.json is missing; .*incomplete"):
        open_checkpoint(folder).config("unet")


def test_folders_that_are_no_pipeline(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index.json.* one component: give the folder above"):
        open_checkpoint(tiny("sdxl") / "unet")
    with pytest.raises(CheckpointError, match=r"not a diffusers pipeline$"):
        open_checkpoint(tmp_path)
    save_file(STATE, tmp_path / "sd_xl.safetensors")
    with pytest.raises(CheckpointError, match=r"give the file itself, such as sd_xl.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("model", ["no_such_thing", "./no/such/folder", "a/b/c", "/no/such.safetensors", ""])
def test_an_unknown_model_says_what_can_be_given(model: str) -> None:
    with pytest.raises(
        CheckpointNotFoundError, match=r'not a local folder or file.*owner/name.*"demo"'
    ) as caught:
        open_checkpoint(model)
    assert repr(model) in str(caught.value)


def test_the_demo_refiner_takes_shared_components_from_the_base(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(tiny("sdxl"), demo)
    for part in ("unet", "scheduler"):
        shutil.copytree(tiny("refiner") / part, demo / "refiner" / part)
    listed = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "Euler"]}
    write_json(demo / "refiner" / "model_index.json", {**listed, "requires_aesthetics_score": True})
    monkeypatch.setattr(weights, "_DEMO", demo)
    base, refiner = open_checkpoint("demo"), open_checkpoint("demo-refiner")
    assert (base.source, refiner.source) == ("demo", "demo-refiner")
    assert refiner.model_index["requires_aesthetics_score"] is True
    assert refiner.weights("unet").files != base.weights("unet").files
    for shared in ("vae", "text_encoder_2"):
        assert refiner.has(shared)
        assert refiner.weights(shared).files == base.weights(shared).files
        assert refiner.config(shared) == base.config(shared)
    assert refiner.tokenizer_files("tokenizer_2") == base.tokenizer_files("tokenizer_2")
    assert not refiner.has("text_encoder"), "the refiner reads the second encoder only"


def test_model_index_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"model_index.json cannot be read as JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"model_index.json cannot be read as JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(["unet"]))
    with pytest.raises(CheckpointError, match=r"model_index.json holds a list, expected an object"):
        open_checkpoint(tmp_path)
