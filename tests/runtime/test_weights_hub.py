"""`runtime/hub.py`: hub ids without a hub: the local cache, what would be downloaded, and what is said when it is not
there."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from latentrt.errors import CheckpointError, CheckpointNotFoundError
from latentrt.runtime import hub
from latentrt.runtime.weights import open_checkpoint

Tiny = Callable[..., Path]

COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
TOKENIZER = [
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
]
# What stabilityai/stable-diffusion-xl-base-1.0 holds, as far as it matters here, and tokens added by training.
SDXL_FILES = [
    ".gitattributes",
    "LICENSE.md",
    "README.md",
    "model_index.json",
    "pipeline.png",
    "scheduler/scheduler_config.json",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors",
    *(f"tokenizer/{name}" for name in TOKENIZER),
    *(f"tokenizer_2/{name}" for name in TOKENIZER),
    *(
        f"{encoder}/{name}"
        for encoder in ("text_encoder", "text_encoder_2")
        for name in (
            "config.json",
            "flax_model.msgpack",
            "model.fp16.safetensors",
            "model.onnx",
            "model.onnx_data",
            "model.safetensors",
            "openvino_model.bin",
            "openvino_model.xml",
            "pytorch_model.bin",
        )
    ),
    *(
        f"{part}/{name}"
        for part in ("unet", "vae", "vae_1_0", "vae_decoder")
        for name in (
            "config.json",
            "diffusion_flax_model.msgpack",
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.safetensors",
            "model.onnx",
        )
    ),
]


def hub_cache(root: Path, folder: Path, model: str = "owner/tiny") -> Path:
    """A checkpoint as huggingface_hub keeps it: links from a snapshot to blobs."""
    stored = root / f"models--{model.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(COMMIT)
    (stored / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = stored / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        link = stored / "snapshots" / COMMIT / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return root


@pytest.fixture
def cached(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = hub_cache(tmp_path / "hub", tiny("sdxl"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return root


def test_the_local_cache_serves_offline(tiny: Tiny, cached: Path) -> None:
    checkpoint = open_checkpoint("owner/tiny")
    assert checkpoint.source == "owner/tiny"
    assert checkpoint.config("unet") == open_checkpoint(tiny("sdxl")).config("unet")
    assert checkpoint.weights("unet").digest() == open_checkpoint(tiny("sdxl")).weights("unet").digest()
    assert len(checkpoint.tokenizer_files("tokenizer").vocab) == 1514


def test_whatever_the_hub_raises_the_cache_is_tried(
    cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = huggingface_hub.snapshot_download

    def snapshot_download(model: str, *, local_files_only: bool, **options: Any) -> str:
        if not local_files_only:
            raise RuntimeError("407 Proxy Authentication Required\nand more")
        return real(model, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint("owner/tiny").folder.name == COMMIT
    assert "owner/tiny is taken from the local cache: 407 Proxy Authentication Required" in caplog.text
    with pytest.raises(CheckpointNotFoundError, match=r"\(RuntimeError: 407 Proxy Authentication Required\)"):
        open_checkpoint("owner/absent")


def test_a_revision_is_looked_up(cached: Path) -> None:
    assert open_checkpoint("owner/tiny", revision=COMMIT).folder.name == COMMIT
    with pytest.raises(
        CheckpointNotFoundError, match=r"could not be fetched from the model hub at revision 'v9'"
    ):
        open_checkpoint("owner/tiny", revision="v9")


def test_a_missing_variant_is_not_the_plain_files(cached: Path) -> None:
    with pytest.raises(CheckpointError, match=r"owner/tiny has nothing of variant 'fp16'"):
        open_checkpoint("owner/tiny", variant="fp16")


@pytest.mark.parametrize("model", ["owner/absent", "owner/ill..named", "stabilityai/sdxl"])
def test_an_unknown_id_says_what_was_tried(cached: Path, model: str) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_checkpoint(model)
    message = str(caught.value)
    assert (
        f"{model!r} is not a local folder or file, and could not be fetched from the model hub (" in message
    )
    assert "hf auth login" in message
    assert "without a network, give the path" in message


def test_a_path_is_never_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for model in ("./owner/name", "../name", "/owner/name", "a/b/c", Path("owner/name")):
        with pytest.raises(CheckpointNotFoundError):
            open_checkpoint(model)


def downloaded(
    monkeypatch: pytest.MonkeyPatch, root: Path, files: list[str], variant: str | None
) -> set[str]:
    """Which of a repository's files `fetch` asks for; they are made, empty, in `root`."""

    def snapshot_download(model: str, *, allow_patterns: list[str], **_: Any) -> str:
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.fetch("owner/name", variant=variant, revision=None)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_what_is_read_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: str | None
) -> None:
    dot = f".{variant}" if variant else ""
    assert downloaded(monkeypatch, tmp_path, SDXL_FILES, variant) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{tokenizer}/{name}" for tokenizer in ("tokenizer", "tokenizer_2") for name in TOKENIZER),
        *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")),
        *(f"{part}/diffusion_pytorch_model{dot}.safetensors" for part in ("unet", "vae")),
        *(f"{part}/model{dot}.safetensors" for part in ("text_encoder", "text_encoder_2")),
    }


def test_components_without_the_variant_come_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [name for name in SDXL_FILES if not name.startswith("vae/diffusion_pytorch_model.fp16")]
    got = downloaded(monkeypatch, tmp_path, files, "fp16")
    assert {name for name in got if name.endswith(".safetensors")} == {
        "vae/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
    }


def test_of_a_variant_that_nothing_has_no_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Tiny
) -> None:
    shutil.copyfile(tiny("sdxl") / "model_index.json", tmp_path / "model_index.json")
    got = downloaded(monkeypatch, tmp_path, SDXL_FILES, "int4")
    assert not [name for name in got if name.endswith(".safetensors")]
    with pytest.raises(CheckpointError, match=r"owner/name has nothing of variant 'int4'. Leave variant out"):
        open_checkpoint("owner/name", variant="int4")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_the_variant_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: str | None
) -> None:
    plain = {
        "unet/diffusion_pytorch_model.safetensors.index.json",
        *(f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    }
    fp16 = {
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        *(f"unet/diffusion_pytorch_model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)),
        *(f"unet/diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)),
    }
    got = downloaded(monkeypatch, tmp_path, sorted(plain | fp16), variant)
    assert got == (fp16 if variant else plain)


def test_an_unreachable_hub_falls_back_to_the_cache(tiny: Tiny, tmp_path: Path) -> None:
    """Online by its settings, but nothing answers."""
    hub_cache(tmp_path, tiny("sdxl"))
    code = """
        from latentrt.errors import CheckpointNotFoundError
        from latentrt.runtime.weights import open_checkpoint
        print(open_checkpoint("owner/tiny").config("unet")["_class_name"])
        try:
            open_checkpoint("owner/absent")
        except CheckpointNotFoundError as error:
            print(error)
    """
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path)}
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    result = subprocess.run(
        [sys.executable, "-c", dedent(code)],
        env={**environment, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("UNet2DConditionModel\n'owner/absent' is not a local folder or file")


def test_a_relative_hub_cache_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "hub/snapshot")
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("owner/tiny", variant=None, revision=None) == tmp_path / "hub" / "snapshot"
