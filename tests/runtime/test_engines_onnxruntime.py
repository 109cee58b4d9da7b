"""`runtime/engines/onnxruntime.py`: the ONNX Runtime back end: the same function as PyTorch, exported once, the same
bits at any batch size."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_components as tiny
from latentrt.errors import BackendError, BackendUnavailableError, CacheError
from latentrt.export import check
from latentrt.export.measures import relative_error
from latentrt.runtime import prepare
from latentrt.runtime.engines import onnxruntime as ort_engine
from latentrt.runtime.engines.base import Availability, Component, Engine
from latentrt.runtime.engines.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine
from latentrt.runtime.prepare import find_or_export_onnx
from tolerances import EXPORT_FLOAT32
from torch import Tensor

CPU = torch.device("cpu")


def load(component: Component, cache_dir: Path) -> Engine:
    return OnnxRuntimeBackend().load(component, device=CPU, cache_dir=cache_dir)


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(component: Component, path: Path) -> dict[str, float]:
        raise AssertionError(f"{component.name} was exported again")

    monkeypatch.setattr(check, "export_checked", refuse)


def test_computes_what_the_module_computes(cache_dir: Path) -> None:
    component = tiny.affine()
    engine = load(component, cache_dir)
    for batch in (1, 3, 8):
        inputs = tiny.named_inputs(component, batch=batch)
        with torch.inference_mode():
            wanted = component.build()(inputs["x"])
        assert relative_error(engine(inputs)["y"], wanted) < EXPORT_FLOAT32


def test_takes_any_strides_dtypes_and_gradients(cache_dir: Path) -> None:
    engine = load(tiny.affine(), cache_dir)
    x = torch.randn(4, 6, dtype=torch.float64)[:, ::2].t().requires_grad_()  # [3, 4], strided
    wanted = engine({"x": x.detach().float().contiguous()})["y"]
    assert torch.equal(engine({"x": x})["y"], wanted)


def test_does_not_write_its_inputs_and_outlives_its_session(cache_dir: Path) -> None:
    engine = load(tiny.affine(), cache_dir)
    x = torch.randn(64, 4)
    before = x.clone()
    first = engine({"x": x})["y"]
    kept = first.clone()
    engine({"x": -x})
    engine.close()
    load(tiny.affine(), cache_dir)({"x": torch.randn(64, 4)})
    assert torch.equal(x, before)
    assert torch.equal(first, kept)


def test_the_second_load_exports_nothing(cache_dir: Path, request: pytest.FixtureRequest) -> None:
    load(tiny.affine(), cache_dir)
    request.getfixturevalue("no_export")
    load(tiny.affine(), cache_dir)


def test_a_process_that_finds_the_export_imports_no_exporter(cache_dir: Path) -> None:
    model = find_or_export_onnx(tiny.affine(), cache_dir=cache_dir)
    script = textwrap.dedent("""
        import sys
        import torch
        from helpers import tiny_components as tiny
        from latentrt.runtime.engines.registry import get_backend

        component = tiny.affine()
        engine = get_backend("onnxruntime").load(component, device=torch.device("cpu"), cache_dir=None)
        print(engine(tiny.named_inputs(component))["y"].shape)
        loaded = [m for m in ("onnx", "onnx_ir") if m in sys.modules]
        assert not loaded, loaded
    """)
    result = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(tiny.__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "torch.Size([2, 4])\n"
    assert len(list(model.parent.parent.glob(model.parent.name))) == 1


def test_a_corrupted_export_is_made_again(cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    component = tiny.affine(seed=11)
    wanted = load(component, cache_dir)(tiny.named_inputs(component))["y"]
    model = find_or_export_onnx(component, cache_dir=cache_dir)
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        engine = load(component, cache_dir)
    assert "cached affine is damaged (model.onnx has another SHA-256" in caplog.text
    assert torch.equal(engine(tiny.named_inputs(component))["y"], wanted)


def test_what_decides_the_entry(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    component = tiny.affine()
    first = find_or_export_onnx(component, cache_dir=cache_dir)
    other_weights = find_or_export_onnx(tiny.affine(seed=1), cache_dir=cache_dir)
    monkeypatch.setattr(prepare, "exporter_digest", lambda: "of changed sources")
    other_code = find_or_export_onnx(component, cache_dir=cache_dir)
    assert len({first, other_weights, other_code}) == 3


def test_the_exporter_digest_is_over_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [tmp_path / folder / "code.py" for folder in prepare._SOURCES]
    files += [tmp_path / file for file in prepare._SOURCE_FILES]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    monkeypatch.setattr(prepare, "_PACKAGE", tmp_path)
    digests = {prepare.exporter_digest.__wrapped__()}
    for file in files:
        file.write_text("x = 2\n")
        digests.add(prepare.exporter_digest.__wrapped__())
    assert len(digests) == 1 + len(files)


def test_what_checks_an_export_is_in_the_digest() -> None:
    """With all that it imports of its folder."""
    reached, left = set[str](), ["check"]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            source = (prepare._PACKAGE / f"export/{name}.py").read_text("utf-8")
            left += re.findall(r"^from \.(\w+) import", source, re.MULTILINE)
    assert {"check", "measures", "onnx"} <= reached
    assert not {f"export/{name}.py" for name in reached} & {*prepare._BUILDER, *prepare._OTHERS}


def test_providers_and_their_settings() -> None:
    device, stream = torch.device("cuda", 1), SimpleNamespace(cuda_stream=4711)
    where = {"device_id": "1", "user_compute_stream": "4711"}
    assert ort_engine._providers(CPU, None, ()) == ["CPUExecutionProvider"]
    for options in ((), ("graph",), ("tensorrt", "graph")):
        graph = str(int("graph" in options))
        wanted: list[Any] = [
            ("CUDAExecutionProvider", {**where, "use_tf32": "0", "enable_cuda_graph": graph}),
            "CPUExecutionProvider",
        ]
        if "tensorrt" in options:
            wanted.insert(0, ("TensorrtExecutionProvider", {**where, "trt_cuda_graph_enable": graph}))
        assert ort_engine._providers(device, stream, options) == wanted  # type: ignore[arg-type]
    (_, settings), _ = ort_engine._providers(device, None, (), tf32=True)
    assert settings == {"device_id": "1", "use_tf32": "1", "enable_cuda_graph": "0"}


@pytest.mark.parametrize("override", [None, "1", "0"])
def test_the_tensorrt_provider_rounds_no_float32_unasked(
    override: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no option for that (microsoft/onnxruntime issue 26029): a strict float32 is refused."""
    device = torch.device("cuda", 0)
    backend = OnnxRuntimeBackend()
    loaded: list[str] = []
    monkeypatch.setenv("LATENTRT_ONNXRUNTIME", "tensorrt")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    monkeypatch.setattr(backend, "availability", lambda *_: Availability(True, "here"))
    monkeypatch.setattr(ort_engine, "find_or_export_onnx", lambda *_, **__: Path("model.onnx"))
    monkeypatch.setattr(ort_engine, "OnnxRuntimeEngine", lambda component, *_: loaded.append(component.name))
    strict = tiny.affine()
    for component in (replace(strict, tf32=True), replace(strict, dtype=torch.float16)):
        backend.load(component, device=device, cache_dir=None)
    assert len(loaded) == 2
    with (
        nullcontext()
        if override == "0"
        else pytest.raises(BackendError, match="rounds the float32 of affine")
    ):
        backend.load(strict, device=device, cache_dir=None)
    assert len(loaded) == (3 if override == "0" else 2)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_session_uses_tf32_where_its_component_allows_it(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(ort_engine, "open_session", lambda *_, tf32, **others: asked.append(tf32))
    OnnxRuntimeEngine(replace(tiny.affine(), tf32=allowed), Path("model.onnx"), CPU)
    assert asked == [allowed]


@pytest.mark.parametrize(
    ("told", "device", "providers", "message"),
    [
        ("graph,fast", "cuda", [], "LATENTRT_ONNXRUNTIME has 'fast'; it can have graph, tensorrt"),
        ("graph", "cpu", [], "graph in LATENTRT_ONNXRUNTIME is for GPUs; unset it"),
        ("tensorrt", "cuda", ["CUDAExecutionProvider"], "built without TensorRT; pip install"),
    ],
)
def test_options_that_cannot_be_met(
    told: str, device: str, providers: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setenv("LATENTRT_ONNXRUNTIME", told)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    with pytest.raises(BackendUnavailableError, match=message):
        OnnxRuntimeBackend().load(tiny.affine(), device=torch.device(device), cache_dir=None)


def test_no_room_for_the_export(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match="is not a folder"):
        load(tiny.affine(), tmp_path / "cache")


def test_a_closed_engine_says_so(cache_dir: Path) -> None:
    engine = load(tiny.affine(), cache_dir)
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="affine was closed"):
        engine({"x": torch.zeros(2, 4)})


def test_what_onnxruntime_cannot_load_is_a_back_end_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(BackendError, match=r"cannot load .*model\.onnx"):
        OnnxRuntimeEngine(tiny.affine(), tmp_path / "model.onnx", CPU)


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_a_provider_that_does_not_start_is_not_done_without(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    model = find_or_export_onnx(tiny.affine(), cache_dir=cache_dir)
    only_cpu = ["CPUExecutionProvider"]  # where there is a GPU as well
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: only_cpu)
    with pytest.raises(BackendError, match=r"cannot start CUDAExecutionProvider for .*cuDNN.* are installed"):
        ort_engine.open_session(model, torch.device("cuda", 0))


def test_a_provider_that_fails_is_not_replaced(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    def fails(self: Any, providers: Any, *more: Any) -> None:
        self._fallback_providers = ["CPUExecutionProvider"]
        if providers != self._fallback_providers:
            raise RuntimeError("no CUDA-capable device")
        create(self, providers, *more)

    model = find_or_export_onnx(tiny.affine(), cache_dir=cache_dir)
    create = onnxruntime.InferenceSession._create_inference_session
    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fails)
    with pytest.raises(BackendError, match=r"cannot load .*: no CUDA-capable device"):
        ort_engine.open_session(model, torch.device("cuda", 0))
    assert capsys.readouterr().out == ""


def test_what_fails_in_onnxruntime_names_the_component(cache_dir: Path) -> None:
    component = tiny.affine()
    model = find_or_export_onnx(component, cache_dir=cache_dir)
    wider = replace(component, inputs=(replace(component.inputs[0], dims=("batch", "width")),))
    with pytest.raises(BackendError, match=r"ONNX Runtime failed on affine: .*invalid dimensions"):
        OnnxRuntimeEngine(wider, model, CPU)({"x": torch.zeros(2, 5)})


def test_cuda_without_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match=r"built without CUDA; pip install \"latentrt\[gpu\]\""):
        OnnxRuntimeBackend().load(tiny.affine(), device=torch.device("cuda"), cache_dir=None)


def test_threads_share_an_engine(cache_dir: Path) -> None:
    component = tiny.text_encoder()
    engine = load(component, cache_dir)
    inputs = [tiny.named_inputs(component, seed) for seed in range(4)]
    wanted = [engine(x)["sequence"] for x in inputs]
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            if not torch.equal(engine(inputs[k])["sequence"], wanted[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Sizes: square, odd and not square, one latent pixel, one row.
SIZES = [(8, 8), (5, 7), (1, 1), (1, 9)]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("make", [tiny.unet, tiny.vae_decoder, tiny.text_encoder], ids=lambda f: f.__name__)
def test_a_row_has_the_same_bits_in_any_batch(make: object, threads: int, cache_dir: Path) -> None:
    component = make()  # type: ignore[operator]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = load(component, cache_dir)
    finally:
        torch.set_num_threads(before)
    sizes = SIZES if "height" in component.example_sizes else SIZES[:1]
    for height, width in sizes:
        inputs = tiny.named_inputs(component, batch=6, height=height, width=width)
        whole = engine(inputs)
        for rows in (slice(0, 1), slice(5, 6), slice(1, 3), slice(2, 6)):
            part = engine({name: _rows(x, rows) for name, x in inputs.items()})
            for name, x in part.items():
                np.testing.assert_array_equal(x.numpy(), whole[name][rows].numpy())


def _rows(x: Tensor, rows: slice) -> Tensor:
    return x[rows] if x.dim() else x
