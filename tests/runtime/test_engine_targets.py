"""`runtime/engine_store.py`: what an engine is built for, and the GPU that it is built on. No builder runs here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_components as tiny
from helpers.fake_builder import FakeBuilder
from latentrt.errors import BackendError, BackendUnavailableError, RequestError
from latentrt.runtime.engine_store import EngineTarget
from latentrt.runtime.engines import plugins, products
from latentrt.runtime.engines.base import Availability, Component
from latentrt.runtime.engines.sizes import SizePolicy
from latentrt.runtime.engines.tensorrt import TensorRTBackend, TensorRTRTXBackend
from latentrt.runtime.prepare import find_or_build_engine

RTX = EngineTarget("tensorrt-rtx", (89,))
ONE = SizePolicy.parse(["64x64"], "1")


@pytest.fixture(scope="module")
def component() -> Component:
    return tiny.vae_decoder(torch.float16)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        (
            {"archs": (89, 90)},
            r"no engines for sm_90; it has them for sm_75, sm_80, .*For others use --engine tensorrt",
        ),
        ({"archs": ()}, "no engines for no architecture"),
        (
            {"product": "tensorrt", "archs": (89, 120)},
            "TensorRT builds only for the GPU that it runs on; leave --arch out",
        ),
    ],
)
def test_architectures_there_are_not(target: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        replace(RTX, **target)


def test_plugins_have_kernels_for_named_architectures() -> None:
    with_plugins = {"plugins": {"GroupNorm": "1"}}
    with pytest.raises(RequestError, match=r"plugins have no kernels for sm_75; .* with --plugins none"):
        EngineTarget("tensorrt-rtx", (75, 89), **with_plugins)
    with pytest.raises(
        RequestError, match=r"'ampere-plus', and plugins have kernels for this GPU only; leave"
    ):
        EngineTarget("tensorrt", (90,), hardware_compatibility="ampere-plus", **with_plugins)


def test_which_plugins_a_back_end_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    device = torch.device("cuda")
    assert TensorRTRTXBackend()._target(device).plugins == {}
    monkeypatch.setenv("LATENTRT_PLUGINS", "GroupNorm")
    assert TensorRTRTXBackend()._target(device).plugins == plugins.versions(["GroupNorm"])
    assert TensorRTRTXBackend(with_plugins=())._target(device).plugins == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LATENTRT_PLUGINS", "Geglu")
    found = TensorRTRTXBackend().availability(device, torch.float16)
    assert not found.ok
    assert found.reason == "there is no plugin 'Geglu'"


def test_an_engine_there_is_not() -> None:
    with pytest.raises(BackendError, match="no engine 'openvino'; there are tensorrt, tensorrt-rtx"):
        EngineTarget("openvino", (89,))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 and an H100, as PyTorch tells of them, and TensorRT."""

    class Cuda:
        @staticmethod
        def cuDriverGetVersion(version: Any) -> None:  # noqa: N802 (the driver's name)
            version._obj.value = 13000

    gpus = [
        SimpleNamespace(uuid="a", name="NVIDIA A100-SXM4-80GB", capability=(8, 0)),
        SimpleNamespace(uuid="h", name="NVIDIA H100 80GB HBM3", capability=(9, 0)),
    ]

    def gpu(device: torch.device | None = None) -> SimpleNamespace:
        return gpus[(device and device.index) or 0]

    monkeypatch.setattr(products, "load", lambda product: type("trt", (), {"__version__": "11.4.0"}))
    monkeypatch.setattr(products.ctypes, "CDLL", lambda name: Cuda)
    monkeypatch.setattr(TensorRTBackend, "availability", lambda *asked: Availability(True, "it is there"))
    monkeypatch.setattr(TensorRTBackend, "load_stored", lambda *loaded: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpu(device).name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu(device).capability)


def test_an_engine_is_built_on_the_gpu_that_it_is_for(
    builder: FakeBuilder,
    component: Component,
    tmp_path: Path,
    two_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = TensorRTBackend(with_plugins=())
    for device in ("cuda:1", "cuda:0"):
        backend.load(component, device=torch.device(device), cache_dir=tmp_path)
    assert [(request.archs, request.gpu) for request in builder.requests] == [
        ((90,), "GPU-h"),
        ((80,), "GPU-a"),
    ]
    # Where there is one alone no name is needed; that of a part of a GPU (MIG) would be another.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    find_or_build_engine(component, EngineTarget("tensorrt", (80,)), ONE, cache_dir=tmp_path)
    assert builder.requests[2].gpu is None


def test_an_engine_is_for_the_model_of_gpu_that_built_it(
    builder: FakeBuilder,
    component: Component,
    tmp_path: Path,
    two_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: (9, 0)
    )  # H200 and GH200, say
    there, here = torch.device("cuda:0"), torch.device("cuda:1")
    target = EngineTarget("tensorrt", (90,))
    first = find_or_build_engine(component, target, ONE, cache_dir=tmp_path, device=there)
    with pytest.raises(BackendError, match="has no tensorrt engine"):
        find_or_build_engine(component, target, cache_dir=tmp_path, rebuild="never", device=here)
    assert "it was built on NVIDIA A100-SXM4-80GB, this is NVIDIA H100 80GB HBM3" in caplog.text
    assert find_or_build_engine(component, target, ONE, cache_dir=tmp_path, device=here).key != first.key
    assert find_or_build_engine(component, target, cache_dir=tmp_path, device=there).key == first.key
    shared = replace(target, hardware_compatibility="same-capability")
    both = find_or_build_engine(component, shared, ONE, cache_dir=tmp_path, device=there)
    assert find_or_build_engine(component, shared, ONE, cache_dir=tmp_path, device=here).key == both.key
    assert find_or_build_engine(component, target, cache_dir=tmp_path, device=here).key == both.key
    assert len(builder.requests) == 3


def test_tensorrt_without_a_driver(
    component: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(products, "load", lambda product: type("trt", (), {"__version__": "11.4.0"}))
    monkeypatch.setattr(products.ctypes, "CDLL", absent)
    with pytest.raises(
        BackendUnavailableError, match=r"no NVIDIA driver .*build with tensorrt-rtx, which takes no GPU"
    ):
        find_or_build_engine(component, EngineTarget("tensorrt", (90,)), ONE, cache_dir=tmp_path)
