"""Plugins in engines that TensorRT for RTX really builds: chosen by operator, called by its builder, over one file.

Here kernels have names for machine code, which a builder never runs; real ones are compiled in
tests/kernels/test_binaries.py and in test_demo_engines.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import tensorrt_rtx_bindings as rtx
import torch
from latentrt.errors import BackendError, BuildError
from latentrt.export import plugin_kernels as module
from latentrt.export.build_process import build_in_child
from latentrt.export.functions import DOMAIN, OPSET, PLUGIN, VERSION, function
from latentrt.export.plugin_kernels import plugin_kernels
from latentrt.export.tensorrt import EngineRequest, build_engine
from latentrt.kernels.binaries import AttentionKernels, GroupNormKernels, Kernels, parameters
from latentrt.runtime.engines import plugins, products
from latentrt.runtime.engines.plugin_code import Code
from onnx import TensorProto, helper

TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}
NORMS = ("GroupNorm", "GroupNormSilu", "ShiftGroupNormSilu")
ALL = plugins.parse_plugins("all")


def save(path: Path, dtype: str = "float16", keys: int | str = 77) -> Path:
    """The three norms one after the other, and attention beside them."""
    kind = TYPES[dtype]

    def value(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
        return helper.make_node(op, inputs, [output], f"/{op}", domain=DOMAIN, **attributes, **PLUGIN)

    image = ("batch", 8, "height", "width")
    affine = [helper.make_tensor(name, kind, [8], [1.0] * 8) for name in ("weight", "bias")]
    norm = {"num_groups": 4, "epsilon": 1e-5}
    nodes = [
        node("GroupNorm", ["x", "weight", "bias"], "a", **norm),
        node("GroupNormSilu", ["a", "weight", "bias"], "b", **norm),
        node("ShiftGroupNormSilu", ["b", "shift", "weight", "bias"], "y", **norm),
        node("DotProductAttention", ["q", "k", "k"], "o", scale=0.25),
    ]
    query = ("batch", "rows", 2, 16)
    inputs = [
        value("x", *image),
        value("shift", "batch", 8),
        value("q", *query),
        value("k", "batch", keys, 2, 16),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [value("y", *image), value("o", *query)],
        affine,
        value_info=[value("a", *image), value("b", *image)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    bodies = [ir.serde.serialize_function(function(name)) for name in (*NORMS, "DotProductAttention")]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10), path)
    return path


SHAPES = {
    "x": [[1, 8, 8, 8], [2, 8, 16, 16], [2, 8, 24, 16]],
    "shift": [[1, 8], [2, 8], [2, 8]],
    "q": [[1, 4, 2, 16], [2, 64, 2, 16], [2, 96, 2, 16]],
    "k": [[1, 77, 2, 16], [2, 77, 2, 16], [2, 77, 2, 16]],
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Kernels]:
    """What was asked to be compiled."""
    asked: list[Kernels] = []

    def binaries(wanted: Sequence[Kernels], cache: Path | None, processes: int) -> list[Path]:
        files = []
        for kernels in wanted:
            launches, constants = kernels.launches()
            images = {
                role: {
                    "entry": launch.kernel.name,
                    "parameters": parameters(launch),
                    "shared": 0,
                    "warps": launch.num_warps,
                    "cubin": base64.b64encode(f"{role} {kernels.arch}".encode()).decode(),
                }
                for role, launch in launches.items()
            }
            files.append(tmp_path / f"{len(asked)}.kernels")
            files[-1].write_text(json.dumps({"constants": constants, "images": images}))
            asked.append(kernels)
        return files

    monkeypatch.setattr(module, "binaries", binaries)
    return asked


def request(tmp_path: Path, names: Sequence[str], archs: Sequence[int] = (89,), **more: Any) -> EngineRequest:
    model = save(tmp_path / "model.onnx", **more)
    return EngineRequest(
        "unet",
        "tensorrt-rtx",
        str(model),
        str(tmp_path / "model.plan"),
        (SHAPES,),
        tuple(archs),
        plugins=tuple(names),
        kernels=plugin_kernels(model, names, archs) if names else {},
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_all_plugins_take_their_nodes(dtype: str, compiled: list[Kernels], tmp_path: Path) -> None:
    figures = build_in_child(request(tmp_path, ALL, (80, 86, 89, 120), dtype=dtype))
    assert figures["plugin_layers"] == 4
    for name in ALL:
        calls = figures["plugins"][name]
        assert calls["created"] == 1
        assert calls["configured"] >= 1
        assert calls["serialized"] >= 1
    assert len(compiled) == 16  # every node needs its own, for every architecture
    assert {kernels.arch for kernels in compiled} == {80, 86, 89, 120}
    assert {str(kernels.dtype) for kernels in compiled} == {f"torch.{dtype}"}


def test_off_their_bodies_run(tmp_path: Path) -> None:
    figures = build_in_child(request(tmp_path, ()))
    assert figures["plugin_layers"] == 0
    assert figures["plugins"] == {}
    assert figures["layers"] > 40


def test_one_operator_alone(compiled: list[Kernels], tmp_path: Path) -> None:
    figures = build_in_child(request(tmp_path, ["GroupNormSilu"]))
    assert figures["plugin_layers"] == 1
    assert list(figures["plugins"]) == ["GroupNormSilu"]
    assert figures["plugins"]["GroupNormSilu"]["created"] == 1


def test_the_plan_holds_the_kernels(compiled: list[Kernels], tmp_path: Path) -> None:
    """What the builder was given is what an engine is loaded from, for every architecture it is for."""
    asked = request(tmp_path, ["DotProductAttention"], (86, 89))
    build_in_child(asked)
    ((key, files),) = asked.kernels.items()
    assert key == "attention dtype=float16 columns=16 short=1 negative=0"
    code = Code.of({int(arch): Path(file).read_bytes() for arch, file in files.items()})
    assert sorted(code.cubins) == [86, 89]
    assert code.packed in Path(asked.plan).read_bytes()


def test_a_number_of_keys_that_only_the_sizes_fix(compiled: list[Kernels], tmp_path: Path) -> None:
    figures = build_in_child(request(tmp_path, ["DotProductAttention"], keys="keys"))
    assert [kernels.short for kernels in compiled] == [False]
    assert figures["plugins"]["DotProductAttention"]["serialized"] >= 1


def test_kernels_that_are_missing(compiled: list[Kernels], tmp_path: Path) -> None:
    asked = request(tmp_path, ALL)
    left = {key: files for key, files in asked.kernels.items() if "attention" not in key}
    with pytest.raises(
        BuildError,
        match=r"unet: TensorRT for RTX .* has no use of plugins: DotProductAttention of .*: no kernels were compiled "
        r"for attention dtype=float16 columns=16 short=1 negative=0",
    ):
        build_in_child(replace(asked, kernels=left))


def test_without_the_library_a_build_is_refused_in_this_process(
    compiled: list[Kernels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_RTX_LIBRARY", "libno_such_library.so")
    with pytest.raises(
        BuildError, match=r"unet: .* does not find its own library by name.*; build in a child"
    ):
        build_engine(request(tmp_path, ALL), lambda phase: None)


def test_what_was_registered_is_gone_afterwards() -> None:
    registry = rtx.get_plugin_registry()
    with plugins.building(rtx, ["GroupNorm"], {}):
        assert registry.get_creator("GroupNorm", "1", "latentrt") is not None
        with (
            pytest.raises(BackendError, match="the plugin GroupNorm is registered already"),
            plugins.building(rtx, ["GroupNorm"], {}),
        ):
            pass
    with plugins.building(rtx, ["GroupNorm"], {}) as calls:
        assert calls.counts == {"GroupNorm": {}}


# --- which kernels a model needs


def test_kernels_are_read_off_the_model(compiled: list[Kernels], tmp_path: Path) -> None:
    found = plugin_kernels(save(tmp_path / "model.onnx"), ALL, (89, 120))
    half = torch.float16
    assert set(compiled) == {
        kernels
        for arch in (89, 120)
        for kernels in (
            GroupNormKernels(half, 8, 4, False, False, arch),
            GroupNormKernels(half, 8, 4, True, False, arch),
            GroupNormKernels(half, 8, 4, True, True, arch),
            AttentionKernels(half, 16, True, False, arch),
        )
    }
    assert all(list(files) == ["89", "120"] for files in found.values())
    json.dumps(found)


@pytest.mark.parametrize("name", ["a", "k"], ids=["of the first input", "of another"])
def test_a_node_without_a_type(compiled: list[Kernels], tmp_path: Path, name: str) -> None:
    model = onnx.load(save(tmp_path / "model.onnx"))
    for values in (model.graph.value_info, model.graph.input):
        for value in [value for value in values if value.name == name]:
            values.remove(value)
    onnx.save(model, tmp_path / "model.onnx")
    node = {"a": "GroupNormSilu", "k": "DotProductAttention"}[name]
    with pytest.raises(
        BuildError,
        match=rf"node '/{node}' \({node}\) has no type and shape that its plugin takes; build without",
    ):
        plugin_kernels(tmp_path / "model.onnx", ALL, (89,))
