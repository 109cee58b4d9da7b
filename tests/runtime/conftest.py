"""Pipelines over the tiny checkpoints, loaded once and shared by the tests of whole pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from helpers.fake_builder import FakeBuilder
    from helpers.fake_stream import FakeStream
    from helpers.fake_tensorrt import FakeCuda, FakeTensorRT
    from helpers.parity import Rig
    from latentrt import Pipeline
    from latentrt.runtime.engines.base import Component
    from latentrt.runtime.engines.tensorrt import TensorRTEngine


@pytest.fixture(scope="session")
def rig(
    tiny: Callable[..., Path], shared_export_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Rig:
    """Both sides' pipelines."""
    from helpers.parity import Rig
    from helpers.tiny_checkpoints import save_lcm

    def folder(kind: str) -> Path:
        if kind != "lcm":
            return tiny(kind)
        path = tmp_path_factory.getbasetemp() / "lcm"
        return path if path.exists() else save_lcm(path, tiny("sdxl"))

    return Rig(folder, shared_export_cache)


@pytest.fixture(scope="session")
def pipe(rig: Rig) -> Pipeline:
    """The rig's SDXL base alone."""
    return rig.pipeline("sdxl", "eager")


@pytest.fixture(scope="session")
def both(rig: Rig) -> Pipeline:
    """The rig's base and refiner."""
    return rig.pipeline("ensemble", "eager")


@pytest.fixture
def tiny_configs(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single files are described by the tiny checkpoints' configurations and tokenizers in place of SDXL's."""
    from latentrt.runtime import weights
    from latentrt.runtime.tokenizer_files import read_tokenizer

    data = tmp_path_factory.mktemp("data")
    for published, kind in {"sdxl_base": "sdxl", "sdxl_refiner": "refiner"}.items():
        (data / published).symlink_to(tiny(kind))
    monkeypatch.setattr(weights, "_DATA", data)
    monkeypatch.setattr(weights, "_clip_tokenizer", read_tokenizer)


@pytest.fixture(scope="session")
def demo_unet() -> Component:
    """The demo's base UNet in float16."""
    import torch
    from latentrt.runtime.loading import load_components
    from latentrt.runtime.weights import open_checkpoint

    return load_components(open_checkpoint("demo"), torch.float16)["unet"]


@pytest.fixture(scope="session")
def load(tiny: Callable[..., Path]) -> Callable[..., Pipeline]:
    """The tiny SDXL base and refiner on the CPU, over the project's operators; options are `from_pretrained`'s."""
    import latentrt

    def make(**options: Any) -> Pipeline:
        options = {"backend": "triton", "device": "cpu", **options}
        pipe = latentrt.Pipeline.from_pretrained(tiny("sdxl"), tiny("refiner"), **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    """In the place of exports and of the process that builds engines."""
    from helpers.fake_builder import FakeBuilder
    from latentrt.export import build_process, plugin_kernels
    from latentrt.runtime import prepare

    builder = FakeBuilder()
    monkeypatch.setattr(build_process, "build_in_child", builder)
    monkeypatch.setattr(prepare, "find_or_export_onnx", lambda component, cache_dir: Path("model.onnx"))
    monkeypatch.setattr(plugin_kernels, "plugin_kernels", lambda *asked, cache: {"of": {"89": str(cache)}})
    return builder


@pytest.fixture(scope="module")
def between(tiny: Callable[..., Path]) -> int:
    """Bytes that are enough for `tiny_requests.SEEDED_CALL`, and not for it at 512x512."""
    import torch
    from latentrt.runtime.planner import Planner

    planner = Planner.of(tiny("sdxl"), tiny("refiner"), dtype=torch.float32)
    small, large = (planner.plan(height=s, width=s, sampler="euler-a").peak("resident") for s in (64, 512))
    return (small + large) // 2


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """In the place of the device's stream, for what a call reports of its progress."""
    from helpers.fake_stream import FakeStream

    fake = FakeStream()
    monkeypatch.setattr("latentrt.runtime.progress.current_stream", lambda device: fake)
    return fake


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is captured as a graph during the test, in order."""
    from latentrt.runtime.graph import Graph, Graphs

    names: list[str] = []
    capture = Graphs.capture

    def recorded(self: Graphs, work: Callable[[], object], what: str) -> Graph:
        names.append(what)
        return capture(self, work, what)

    monkeypatch.setattr(Graphs, "capture", recorded)
    return names


@pytest.fixture(scope="module")
def image_of_call(load: Callable[..., Pipeline]) -> Any:
    """The image of `tiny_requests.SEEDED_CALL`, by a pipeline whose memory is not limited."""
    from helpers.tiny_requests import SEEDED_CALL

    return load(graphs=False)(**SEEDED_CALL).images


@pytest.fixture
def tensorrt_stand_ins(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeTensorRT, FakeCuda]:
    from helpers.fake_tensorrt import ADD_ONE, install

    return install(monkeypatch, {b"an engine": ADD_ONE})


@pytest.fixture
def fake_tensorrt(tensorrt_stand_ins: tuple[FakeTensorRT, FakeCuda]) -> FakeTensorRT:
    """In the place of TensorRT; its one plan is `b"an engine"`."""
    return tensorrt_stand_ins[0]


@pytest.fixture
def fake_cuda(tensorrt_stand_ins: tuple[FakeTensorRT, FakeCuda]) -> FakeCuda:
    """In the place of the device of `fake_tensorrt`."""
    return tensorrt_stand_ins[1]


@pytest.fixture
def load_engine(fake_tensorrt: FakeTensorRT, tmp_path: Path) -> Callable[..., TensorRTEngine]:
    """Load an engine of a product from a plan, with two profiles."""
    import torch
    from helpers.fake_tensorrt import ADD_ONE, NARROW, WIDE
    from latentrt.runtime.engine_store import StoredEngine
    from latentrt.runtime.engines import products
    from latentrt.runtime.engines.scratch import Scratch
    from latentrt.runtime.engines.tensorrt import TensorRTEngine

    cpu = torch.device("cpu")

    def load(
        product: str = "tensorrt",
        scratch: Scratch | None = None,
        plan: bytes = b"an engine",
        with_plugins: Mapping[str, str] | None = None,
    ) -> TensorRTEngine:
        (tmp_path / "model.plan").write_bytes(plan)
        stored = StoredEngine("0", tmp_path / "model.plan", (WIDE, NARROW), {}, with_plugins or {}, False)
        return TensorRTEngine(ADD_ONE, stored, products.product(product), cpu, scratch or Scratch(cpu))

    return load
