"""Diffusers folders: what is read, how it is mapped, and each way a checkpoint can be wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from helpers.tiny_checkpoints import KINDS
from helpers.tiny_net import STATE, folder_with, on_meta
from latentrt.errors import (
    CheckpointError,
    WeightsMismatchError,
)
from latentrt.runtime.models.clip import CLIPTextConfig, CLIPTextEncoder, rename_clip_keys
from latentrt.runtime.models.unet import UNet, UNetConfig
from latentrt.runtime.models.vae import VAEConfig, VAEDecoder, VAEEncoder, rename_legacy_vae_keys
from latentrt.runtime.weights import open_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

Tiny = Callable[..., Path]
HALVES = {VAEDecoder: ("decoder.", "post_quant_conv."), VAEEncoder: ("encoder.", "quant_conv.")}


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_component_fills_its_model(tiny: Tiny, kind: str, published: bool) -> None:
    """Under today's key names and under those of published checkpoints, with equal values."""
    checkpoint = open_checkpoint(tiny(kind, published=published))
    plain = tiny(kind, published=False)

    def filled(component: str, module: nn.Module, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
        checkpoint.weights(component).load_into(module, torch.float32, rename=rename)
        return dict(module.state_dict())

    def same(got: dict[str, Tensor], component: str, prefix: str = "") -> bool:
        (file,) = (plain / component).glob("*.safetensors")
        expected = {re.sub("^text_model\\.", "", key): value for key, value in load_file(file).items()}
        return all(torch.equal(v, expected[re.sub("^text_model\\.", "", k)]) for k, v in got.items())

    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(checkpoint.config("unet")))
        halves = [half(VAEConfig.from_dict(checkpoint.config("vae"))) for half in HALVES]
        encoders = {
            name: CLIPTextEncoder(CLIPTextConfig.from_dict(checkpoint.config(name)), normalize_sequence=False)
            for name in ("text_encoder", "text_encoder_2")
            if checkpoint.has(name)
        }
    assert same(filled("unet", unet, lambda key: key), "unet")
    for half in halves:
        wanted = HALVES[type(half)]
        got = filled("vae", half, lambda k, w=wanted: rename_legacy_vae_keys(k) if k.startswith(w) else None)
        assert same(got, "vae")
    for name, encoder in encoders.items():
        assert same(filled(name, encoder, rename_clip_keys), name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_folder_has(tiny: Tiny, kind: str) -> None:
    checkpoint = open_checkpoint(str(tiny(kind)))
    assert checkpoint.source == str(tiny(kind))
    assert checkpoint.model_index["_class_name"].startswith("StableDiffusion")
    assert checkpoint.has("text_encoder") == (kind != "refiner")
    assert checkpoint.has("text_encoder_2") == (kind in ("sdxl", "refiner"))
    assert not checkpoint.has("safety_checker")
    assert not checkpoint.has("force_zeros_for_empty_prompt")
    assert checkpoint.config("scheduler")["num_train_timesteps"] == 1000
    assert {ref.dtype for ref in checkpoint.weights("unet").tensors.values()} == {"F32"}
    with pytest.raises(CheckpointError, match=r"has no safety_checker; it has scheduler, .*unet, vae"):
        checkpoint.weights("safety_checker")


def test_weights_in_their_own_dtype_are_views_of_the_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder_with(tmp_path, {"model.safetensors": STATE}))
    module = on_meta()
    checkpoint.weights("unet").load_into(module, torch.float32)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    addresses = {int(address, 16) for address in _mapped(tmp_path / "unet" / "model.safetensors")}
    assert all(any(0 <= p.data_ptr() - a < 1 << 20 for a in addresses) for p in module.parameters())
    module.conv.weight.fill_(0)  # a private mapping: the file keeps what it has
    assert torch.equal(
        load_file(tmp_path / "unet" / "model.safetensors")["conv.weight"], STATE["conv.weight"]
    )


def _mapped(file: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split("-")[0] for line in lines if line.endswith(str(file))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    module = on_meta()
    weights = open_checkpoint(folder_with(tmp_path, {"model.safetensors": STATE})).weights("unet")
    weights.load_into(module, dtype)
    assert all(torch.equal(value, STATE[key].to(dtype)) for key, value in module.state_dict().items())


def test_one_error_lists_all_that_is_wrong(tmp_path: Path) -> None:
    state = {**STATE, "norm.weight": torch.zeros(7), "lin.weight": torch.zeros(1), "lin.bias": torch.zeros(1)}
    del state["conv.bias"]
    checkpoint = open_checkpoint(folder_with(tmp_path, {"model.safetensors": state}))
    module = on_meta()
    with pytest.raises(WeightsMismatchError) as caught:
        checkpoint.weights("unet").load_into(module, torch.float32)
    message = str(caught.value)
    assert f"unet of {tmp_path} (model.safetensors)" in message
    assert "1 missing: conv.bias" in message
    assert "2 surplus: lin.bias, lin.weight" in message or "2 surplus: lin.weight, lin.bias" in message
    assert "1 misshapen: norm.weight has [7], expected [6]" in message
    assert "Check that config.json belongs to these weights" in message
    assert all(parameter.is_meta for parameter in module.parameters()), "nothing may be half loaded"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Read as they are, they would be numbers without their scale."""
    state = {**STATE, "norm.weight": torch.ones(6, dtype=dtype)}
    checkpoint = open_checkpoint(folder_with(tmp_path, {"model.safetensors": state}))
    with pytest.raises(
        WeightsMismatchError, match=r"1 of no floating dtype: norm.weight is (I8|U8|BOOL|I64)"
    ):
        checkpoint.weights("unet").load_into(on_meta(), torch.float32)


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    state = {**STATE, **{f"extra.{n:03}": torch.zeros(1) for n in range(50)}}
    checkpoint = open_checkpoint(folder_with(tmp_path, {"model.safetensors": state}))
    with pytest.raises(WeightsMismatchError, match=r"50 surplus: extra.000, .*extra.019 and 30 more"):
        checkpoint.weights("unet").load_into(on_meta(), torch.float32)


def test_a_1x1_convolution_and_a_linear_layer_are_the_same(tmp_path: Path) -> None:
    state = {**STATE, "conv.weight": STATE["conv.weight"][:, :, 0, 0].contiguous()}
    module = on_meta()
    weights = open_checkpoint(folder_with(tmp_path, {"model.safetensors": state})).weights("unet")
    weights.load_into(module, torch.float32)
    assert torch.equal(module.conv.weight, STATE["conv.weight"])


def test_rename_drops_and_renames(tmp_path: Path) -> None:
    state = {f"net.{key}": value for key, value in STATE.items()} | {"other.weight": torch.zeros(3)}
    weights = open_checkpoint(folder_with(tmp_path, {"model.safetensors": state})).weights("unet")
    module = on_meta()
    weights.load_into(
        module, torch.float32, rename=lambda k: k.removeprefix("net.") if k.startswith("net.") else None
    )
    assert torch.equal(module.norm.bias, STATE["norm.bias"])
    with pytest.raises(CheckpointError, match=r"are both 'one'"):
        weights.load_into(on_meta(), torch.float32, rename=lambda _: "one")


def test_position_ids_do_no_harm(tmp_path: Path) -> None:
    state = {**STATE, "embeddings.position_ids": torch.arange(77)[None]}
    weights = open_checkpoint(folder_with(tmp_path, {"model.safetensors": state})).weights("unet")
    weights.load_into(on_meta(), torch.float32)


MEMORY = """
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from latentrt.runtime.engines.base import Component
    from latentrt.runtime.engines.eager import EagerEngine
    from latentrt.runtime.weights import open_checkpoint

    def kib(field):
        line = next(l for l in open("/proc/self/status") if l.startswith(field))
        return int(line.split()[1])

    def ratio(folder, dtype):
        weights = open_checkpoint(folder).weights("unet")
        with torch.device("meta"):
            module = nn.ParameterList([nn.Parameter(torch.empty(1 << 20)) for _ in weights.tensors])

        def build():
            weights.load_into(module, dtype)
            return module

        component = Component("unet", build, dtype, (), (), fingerprint="", example_sizes={})
        before = kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        engine = EagerEngine(component, torch.device("cpu"))
        sum(float(p.data.view(torch.uint8)[::4096].sum()) for p in module)  # touch every page
        return (kib("VmHWM") - before) * 1024 / sum(p.nbytes for p in module)

    torch.zeros(8).half().float()
    for case in sys.argv[1:]:
        folder, dtype = case.split(":")
        print(case, ratio(folder, getattr(torch, dtype)))
"""


def test_peak_memory_is_under_1_3_times_the_weights(tmp_path: Path) -> None:
    """In an engine of the eager back end: 134 MB in their target dtype, from 268, 67 and 134 MB on disk; a mapped
    file's pages count too."""
    cases = []
    for stored, wanted, tensors in [
        ("float32", "float16", 64),
        ("float16", "float32", 32),
        ("float16", "float16", 64),
    ]:
        state = {str(n): torch.full((1 << 20,), n, dtype=getattr(torch, stored)) for n in range(tensors)}
        cases.append(f"{folder_with(tmp_path / (stored + wanted), {'model.safetensors': state})}:{wanted}")
    command = [sys.executable, "-c", dedent(MEMORY), *cases]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert result.returncode == 0, result.stderr
    ratios = [float(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(ratios) == 3
    assert all(0.9 < ratio < 1.3 for ratio in ratios), result.stdout
