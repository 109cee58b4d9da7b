"""Attention as an ahead-of-time plugin of TensorRT, against a stand-in for `tensorrt.plugin`. The real one never ran.

The stand-in holds registrations to the rules that the real one states; the launch it is given runs in Triton's
interpreter.
"""

from __future__ import annotations

import base64
import inspect
import json
import typing
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.kernel_checks import assert_as_good
from latentrt.errors import BackendError, RequestError
from latentrt.export import plugin_kernels
from latentrt.export.quick_plugins import key_of, register
from latentrt.kernels import reference
from latentrt.kernels._triton import Launch
from latentrt.kernels.binaries import AheadAttentionKernels, parameters
from latentrt.runtime.engine_store import EngineTarget
from latentrt.runtime.engines import plugins
from latentrt.runtime.engines.plugins import AOT_ATTENTION, PluginCalls


class Size(int):
    """A size that is known or not; arithmetic with it gives what it will be."""

    known: bool = True

    @staticmethod
    def of(value: int, known: bool) -> Size:
        size = Size(value)
        size.known = known
        return size

    @property
    def is_constant(self) -> bool:
        return self.known

    def constant_value(self) -> int:
        assert self.known
        return int(self)


class TensorDesc:
    def __init__(self, dtype: str, *sizes: Size) -> None:
        self.dtype = SimpleNamespace(name=dtype)
        self.shape_expr = list(sizes)

    def like(self) -> TensorDesc:
        return TensorDesc(self.dtype.name, *self.shape_expr)


class AutoTuneCombination:
    def __init__(self, types: str, formats: str) -> None:
        self.types, self.formats = types, formats


class KernelLaunchParams(SimpleNamespace):
    pass


class SymExprs(list[Any]):
    pass


class FakePlugin:
    """The module `tensorrt.plugin`."""

    TensorDesc, AutoTuneCombination = TensorDesc, AutoTuneCombination
    KernelLaunchParams, SymExprs = KernelLaunchParams, SymExprs

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}

    def _keep(self, what: str, name: str, arguments: list[str], returns: Any) -> Any:
        assert name == "latentrt::DotProductAttention"

        def keep(function: Any) -> Any:
            signature = inspect.signature(function)
            assert list(signature.parameters) == arguments
            wanted = {"q": TensorDesc, "k": TensorDesc, "v": TensorDesc, "scale": float, "tactic": int}
            for name, parameter in signature.parameters.items():
                if name == "outputs":
                    assert typing.get_origin(parameter.annotation) is tuple
                    assert typing.get_args(parameter.annotation) == (TensorDesc,)
                else:
                    assert parameter.annotation is wanted[name]
            if typing.get_origin(returns) is None:
                assert signature.return_annotation is returns
            else:
                assert signature.return_annotation == returns
            self.functions[what] = function
            return function

        return keep

    def register(self, name: str) -> Any:
        return self._keep("register", name, ["q", "k", "v", "scale"], TensorDesc)

    def autotune(self, name: str) -> Any:
        returns = list[AutoTuneCombination]
        return self._keep("autotune", name, ["q", "k", "v", "scale", "outputs"], returns)

    def aot_impl(self, name: str) -> Any:
        returns = tuple[str | bytes, str | bytes, KernelLaunchParams, SymExprs]
        return self._keep("aot_impl", name, ["q", "k", "v", "scale", "outputs", "tactic"], returns)

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def SymIntExprs(self, count: int) -> SymExprs:  # noqa: N802
        return SymExprs([None] * count)

    def SymInt32(self, value: Any) -> int:  # noqa: N802
        return int(value)


def prepared(
    kernels: AheadAttentionKernels, key: str, folder: Path
) -> tuple[FakePlugin, PluginCalls, Launch]:
    launches, constants = kernels.launches()
    launch = launches["attention"]
    image = {
        "entry": launch.kernel.name,
        "parameters": parameters(launch),
        "shared": 12345,
        "warps": launch.num_warps,
        "cubin": base64.b64encode(b"").decode(),
        "ptx": "the code",
    }
    (folder / "file").write_text(json.dumps({"constants": constants, "images": {"attention": image}}))
    calls = PluginCalls({key: {kernels.arch: folder / "file"}}, {AOT_ATTENTION: Counter()})
    trtp = FakePlugin()
    register(trtp, calls, kernels.arch)
    return trtp, calls, launch


@pytest.mark.parametrize(
    ("columns", "keys", "scale", "dtype"),
    [
        pytest.param(64, 77, 0.125, torch.float16, id="a text's keys"),
        pytest.param(32, 140, -0.2, torch.float32, id="a negative scale, two blocks"),
        pytest.param(512, 20, 0.044, torch.float32, id="a VAE's head, cut into slices"),
    ],
)
def test_the_launch_computes_attention(
    columns: int, keys: int, scale: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    short = keys == 77
    kernels = AheadAttentionKernels(dtype, columns, short, scale, 80)
    name = str(dtype).removeprefix("torch.")
    key = f"attention-aot dtype={name} columns={columns} short={short:d} scale={scale!r}"
    trtp, calls, kernel = prepared(kernels, key, tmp_path)

    B, Sq, H = (1, 9, 1) if columns > 256 else (2, 33, 3)  # the interpreter takes its time
    q = torch.randn(B, Sq, H, columns, device=device).to(dtype)
    k, v = (torch.randn(B, keys, H, columns, device=device).to(dtype) for _ in range(2))
    kind = {torch.float16: "HALF", torch.float32: "FLOAT"}[dtype]
    sizes = [Size.of(B, False), Size.of(Sq, False), Size.of(H, True), Size.of(columns, True)]
    described = TensorDesc(kind, *sizes)
    other = TensorDesc(kind, sizes[0], Size.of(keys, short), *sizes[2:])

    like = trtp.functions["register"](described, other, other, scale)
    (formats,) = trtp.functions["autotune"](described, other, other, scale, (like,))
    assert formats.types == ", ".join([{"HALF": "FP16", "FLOAT": "FP32"}[kind]] * 4)
    entry, code, launch, extra = trtp.functions["aot_impl"](described, other, other, scale, (like,), 0)
    assert (entry, code, launch.shared_mem) == (kernel.kernel.name, "the code", 12345)
    assert launch.block_x == 32 * kernel.num_warps
    assert calls.counts[AOT_ATTENTION] == {"created": 1, "configured": 1, "serialized": 1}

    out = torch.full_like(q, float("nan"))
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    # As TensorRT passes them: inputs, integers, outputs.
    kernel.kernel.jitted[(launch.grid_x,)](q, k, v, *extra, out, **kernel.constants, **options)
    exact = reference.attention(q.double(), k.double(), v.double(), scale)
    assert_as_good(out, reference.attention(q, k, v, scale), exact)


def test_kernels_that_are_missing(tmp_path: Path) -> None:
    kernels = AheadAttentionKernels(torch.float16, 64, False, 0.125, 80)
    trtp, calls, _ = prepared(kernels, "of another node", tmp_path)
    described = TensorDesc("HALF", *(Size.of(n, n == 64) for n in (2, 9, 3, 64)))
    message = (
        r"no kernels were compiled for attention-aot dtype=float16 columns=64 short=0 scale=0.125 and sm_80"
    )
    with pytest.raises(BackendError, match=message):
        trtp.functions["aot_impl"](described, described, described, 0.125, (described,), 0)
    assert len(calls.failures) == 1
    with pytest.raises(BackendError, match=r"attention of INT8; a plugin takes float16, bfloat16, float32"):
        trtp.functions["aot_impl"](*[TensorDesc("INT8", *described.shape_expr)] * 3, 0.125, (described,), 0)


def test_a_key_names_its_kernels() -> None:
    key = key_of("float16", [(-1, -1, 3, 64), (-1, 77, 3, 64)], {"scale": -0.5})
    assert key == "attention-aot dtype=float16 columns=64 short=1 scale=-0.5"
    assert plugin_kernels._kernels(key, 90) == AheadAttentionKernels(torch.float16, 64, True, -0.5, 90)


def test_it_is_chosen_by_name_and_for_tensorrt_only() -> None:
    assert plugins.parse_plugins("GroupNorm,DotProductAttention:aot") == (AOT_ATTENTION, "GroupNorm")
    with pytest.raises(RequestError, match=r"names two plugins for one operator; name one of them"):
        plugins.parse_plugins("DotProductAttention,DotProductAttention:aot")
    with pytest.raises(
        RequestError, match=r"no plugin 'GroupNorm:aot'; .*; for TensorRT also DotProduct.*:aot"
    ):
        plugins.parse_plugins("GroupNorm:aot")
    assert EngineTarget("tensorrt", (90,), plugins=plugins.versions([AOT_ATTENTION])).plugins
    with pytest.raises(
        RequestError, match=r"TensorRT for RTX has no plugins that are compiled ahead of time"
    ):
        EngineTarget("tensorrt-rtx", (89,), plugins=plugins.versions([AOT_ATTENTION]))


def test_an_engine_with_it_needs_no_plugin() -> None:
    plugins.loading(SimpleNamespace(), {AOT_ATTENTION: "1-x"})  # nothing is registered anywhere
