"""`bench/diffusers_side.py`: what diffusers' pipelines are given, how they are compiled, what they leave."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentrt.bench import diffusers_side
from latentrt.bench.cases import Case
from latentrt.bench.diffusers_side import DiffusersSide, load_pipelines, open_side
from latentrt.bench.gates import likeness
from latentrt.runtime.latents import NoiseSource


@pytest.mark.parametrize("upcast", [torch.float32, torch.bfloat16])
def test_a_vae_that_float16_would_overflow_is_upcast_once(case: Case, upcast: torch.dtype) -> None:
    base, refiner = load_pipelines(case, torch.device("cpu"), torch.float16, upcast=upcast)
    assert base.vae.config.force_upcast
    assert (base.unet.dtype, base.vae.dtype) == (torch.float16, upcast)
    assert refiner.vae is base.vae
    latents = torch.zeros((1, base.vae.config.latent_channels, 8, 8), dtype=torch.float16)
    with torch.no_grad():
        assert base.vae.decode(latents, return_dict=False)[0].dtype == upcast
    side = DiffusersSide(case, torch.device("cpu"), base, refiner, "eager")
    assert side.settings == f"eager, VAE in {str(upcast).removeprefix('torch.')}"
    # What the pipelines ask before they move it for a picture.
    assert not (base.vae.dtype == torch.float16 and base.vae.config.force_upcast)


class StandIn:
    """As much of diffusers' pipeline as a side touches, and what was asked of it."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.compiled: dict[str, Any] = {}
        self.formats: list[Any] = []
        self.fused = 0
        self.asked: dict[str, Any] = {}
        config = SimpleNamespace(in_channels=4)
        self.unet = SimpleNamespace(
            dtype=dtype,
            config=config,
            to=self._to,
            compile=self.compiled.update,
            fuse_qkv_projections=self.fuse_qkv_projections,
            modules=list,
        )
        self.vae = SimpleNamespace(
            dtype=dtype,
            to=self._to,
            decode=lambda latents: latents,
            fuse_qkv_projections=self.fuse_qkv_projections,
            modules=list,
        )
        self.scheduler = SimpleNamespace(scale_model_input=None)
        self.encode_prompt = lambda: None
        self.vae_scale_factor, self.default_sample_size = 8, 16

    def _to(self, memory_format: Any) -> None:
        self.formats.append(memory_format)

    def fuse_qkv_projections(self) -> None:
        self.fused += 1

    def __call__(self, **asked: Any) -> Any:
        self.asked = asked
        return SimpleNamespace(images=np.zeros((len(asked["prompt"]), 8, 8, 3), np.float32))


def test_every_side_begins_from_the_same_noise_in_half_precision() -> None:
    """Drawn in float32 and rounded; PyTorch draws float16 by another way."""
    case = Case("half", "", "none", size=(96, 128), dtype="float16", negative="blurry")
    base = StandIn()
    DiffusersSide(case, torch.device("cpu"), base, None, "")(["a", "b"], [3, 4])
    wanted = NoiseSource([torch.Generator().manual_seed(seed) for seed in (3, 4)], 2).draw((4, 12, 16))
    assert torch.equal(base.asked["latents"], wanted.half())
    assert base.asked["negative_prompt"] == ["blurry", "blurry"]
    # What the steps draw goes on from there.
    drawn = base.asked["generator"][0].get_state()
    assert not torch.equal(drawn, torch.Generator().manual_seed(3).get_state())
    DiffusersSide(replace(case, negative=None), torch.device("cpu"), base, None, "")(["a"], [3])
    assert base.asked["negative_prompt"] is None


@pytest.mark.parametrize(
    ("place", "mode"),
    [("cpu", "default"), ("cuda", "default"), ("cuda", "reduce-overhead"), ("cuda", "max-autotune")],
)
def test_torch_compile_is_set_up_as_its_guides_say(
    place: str, mode: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, refiner = StandIn(), StandIn()
    decode: dict[str, Any] = {}
    upcasts: list[torch.dtype] = []
    monkeypatch.setattr(
        "latentrt.bench.diffusers_side.load_pipelines",
        lambda *_, upcast: upcasts.append(upcast) or (base, refiner),
    )
    monkeypatch.setattr(torch, "compile", lambda call, **how: decode.update(how) or call)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    case = replace(case, batches=(1, 2, 4, 8))
    with torch._dynamo.config.patch(recompile_limit=8):
        side = open_side(case, torch.device(place), torch.float16, tmp_path, mode=mode)
        # For both UNets and each size with room to spare, since a graph that is not compiled any more is an error.
        assert torch._dynamo.config.recompile_limit > 2 * 4
    assert base.compiled == refiner.compiled == decode
    assert (decode["dynamic"], decode["fullgraph"]) == (False, True)
    for name in decode["options"]:
        torch._inductor.config.patch({name: decode["options"][name]})  # which knows it
        assert f"{name}={decode['options'][name]}" in side.settings
    assert decode["options"].get("triton.cudagraphs", False) is (mode != "default")
    guided = (place, mode) == ("cuda", "max-autotune")
    assert (base.fused, refiner.fused) == ((2, 1) if guided else (0, 0))  # the VAE is the base's
    assert ("fused QKV" in side.settings) is guided
    assert ("conv_1x1_as_mm" in decode["options"]) is guided
    assert decode["options"].get("epilogue_fusion", True) is not guided
    assert upcasts == [torch.bfloat16 if place == "cuda" else torch.float32]  # as latentrt's own
    assert torch.backends.cudnn.benchmark is (place == "cuda")
    assert ("cudnn.benchmark" in side.settings) is (place == "cuda")


def test_fused_projections_take_no_more_memory(case: Case) -> None:
    """diffusers keeps the single ones too, which nothing uses."""
    base, refiner = load_pipelines(case, torch.device("cpu"), torch.float32)
    networks = [base.unet, base.vae, refiner.unet]
    side = DiffusersSide(case, torch.device("cpu"), base, refiner, "")
    before = side(["a cat"], [3]).images
    sizes = [sum(weight.nbytes for weight in network.parameters()) for network in networks]
    for network in networks:
        diffusers_side._fuse_projections(network)
        assert any("to_qkv" in name for name, _ in network.named_parameters())
    assert sizes == [sum(weight.nbytes for weight in network.parameters()) for network in networks]
    assert likeness(side(["a cat"], [3]).images, before)[0] > 100


def test_freed_weights_are_no_memory_of_a_side(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sessions took their place, or another layout: PyTorch would keep them, and what an exporter left too."""
    held: list[weakref.ref[torch.nn.Module]] = []
    given_back: list[bool] = []

    def leave() -> None:
        module = torch.nn.Module()
        module.__dict__["itself"] = module  # as an exporter's graphs hold theirs
        held.append(weakref.ref(module))

    def loaded(*_: Any, **__: Any) -> tuple[StandIn, None]:
        leave()
        return StandIn(), None

    monkeypatch.setattr("latentrt.bench.diffusers_side.load_pipelines", loaded)
    monkeypatch.setattr(diffusers_side, "now", lambda device: time.perf_counter())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(held[-1]() is None))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    side = open_side(replace(case, refiner=None), torch.device("cuda"), torch.float16, tmp_path)
    assert given_back == [True]
    monkeypatch.setattr(side, "_noise", lambda generators: None)
    leave()
    side.tune()
    assert given_back == [True, True]
