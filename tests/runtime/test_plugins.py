"""`runtime/engines/plugins.py`, `plugin_launch.py` and `plugin_code.py`: what plugins launch, run in Triton's
interpreter; what they tell a builder; what they refuse.

The classes are made over TensorRT for RTX; that its builder takes them is in tests/export/test_plugins.py.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx_bindings as rtx
import torch
from helpers.fake_cuda import FakeCuda, code_of
from helpers.kernel_checks import assert_as_good
from latentrt.errors import BackendError
from latentrt.kernels import reference
from latentrt.kernels._group_norm_triton import plan as plan_group_norm
from latentrt.kernels.binaries import AttentionKernels, GroupNormKernels, Kernels
from latentrt.runtime.engines import plugin_code, plugins
from latentrt.runtime.engines.plugin_code import Code, Driver
from latentrt.runtime.engines.plugin_launch import OPERATORS
from latentrt.runtime.engines.plugins import PluginCalls
from torch import Tensor

NORM = {"num_groups": 4, "epsilon": 1e-3}
STREAM = 77


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def norm_kernels(dtype: torch.dtype, channels: int, *, silu: bool = False, shift: bool = False) -> Kernels:
    return GroupNormKernels(dtype, channels, 4, silu, shift, 80)


class Engine:
    """A deserialised plugin in a context, as TensorRT would drive it."""

    def __init__(
        self,
        name: str,
        attributes: dict[str, Any],
        kernels: Kernels,
        monkeypatch: pytest.MonkeyPatch,
        **fake: Any,
    ) -> None:
        code, launches = code_of(kernels, shared=fake.pop("shared", 0))
        self.cuda = FakeCuda(launches, **fake)
        driver = Driver(self.cuda)
        monkeypatch.setattr(plugins, "driver", lambda: driver)
        self.calls = PluginCalls(counts={name: plugins.Counter()})
        self.creator = plugins._creator(rtx, OPERATORS[name], self.calls)
        built = self.creator.create_plugin("", fields(attributes), rtx.TensorRTPhase.BUILD)
        built._code = code
        kept = rtx.PluginFieldCollection(list(built.get_fields_to_serialize()))
        self.plugin = self.creator.create_plugin("", kept, rtx.TensorRTPhase.RUNTIME)

    def attach(self) -> Engine:
        self.plugin = self.plugin.attach_to_context(None)
        return self

    def shape(self, *inputs: Tensor) -> None:
        described = [SimpleNamespace(dims=tuple(x.shape)) for x in inputs]
        self.plugin.on_shape_change(described, described[:1])

    def enqueue(self, *inputs: Tensor, workspace: int = 2**16) -> Tensor:
        out = torch.full_like(inputs[0], float("nan"))
        scratch = torch.full((workspace // 4,), float("nan"), device=out.device)
        *sources, result, at = self.cuda.holds(*inputs, out, scratch)
        self.plugin.enqueue(None, None, sources, [result], at, STREAM)
        return out

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.shape(*inputs)
        return self.enqueue(*inputs)


def fields(attributes: dict[str, Any]) -> Any:
    kinds = {int: (np.int32, rtx.PluginFieldType.INT32), float: (np.float32, rtx.PluginFieldType.FLOAT32)}
    return rtx.PluginFieldCollection(
        [
            rtx.PluginField(name, np.array([value], kinds[type(value)][0]), kinds[type(value)][1])
            for name, value in attributes.items()
        ]
    )


# --- what is launched, and what it computes


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("GroupNorm", torch.float32),
        ("GroupNormSilu", torch.bfloat16),
        ("ShiftGroupNormSilu", torch.float16),
    ],
    ids=str,
)
def test_group_norms(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    silu, shifted = name != "GroupNorm", name == "ShiftGroupNormSilu"
    engine = Engine(name, NORM, norm_kernels(dtype, 24, silu=silu, shift=shifted), monkeypatch).attach()
    # Whole blocks of positions; an odd image; several blocks and no whole number of them.
    for shape, which in (((2, 24, 32, 32), "even"), ((1, 24, 7, 9), "any"), ((1, 24, 33, 40), "any")):
        x, w, b = draw(device, dtype, *shape), draw(device, dtype, 24), draw(device, dtype, 24)
        shift = [draw(device, dtype, *shape[:2])] if shifted else []
        out = engine(x, *shift, w, b)
        loaded = [call[1].split(b"\0")[0].decode() for call in engine.cuda.named("cuModuleLoadData")]
        assert f"apply/{which}" in loaded
        exact = [t.double() for t in (x, w, b)]
        if silu:
            usual = reference.group_norm_silu(x, w, b, 4, 1e-3, *shift)
            right = reference.group_norm_silu(*exact, 4, 1e-3, *(s.double() for s in shift))
        else:
            usual, right = reference.group_norm(x, w, b, 4, 1e-3), reference.group_norm(*exact, 4, 1e-3)
        assert_as_good(out, usual, right)


@pytest.mark.parametrize(
    ("columns", "queries", "keys", "scale", "dtype"),
    [
        pytest.param(64, 130, 130, 0.125, torch.float16, id="self-attention, two blocks"),
        pytest.param(64, 33, 77, 0.125, torch.float16, id="a text's keys"),
        pytest.param(40, 20, 20, 0.158, torch.bfloat16, id="SD 1.5's heads of 40"),
        pytest.param(32, 17, 19, -0.2, torch.float32, id="a negative scale"),
        pytest.param(512, 9, 9, 0.044, torch.float32, id="a VAE's head, cut into slices"),
    ],
)
def test_attention(
    columns: int,
    queries: int,
    keys: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = AttentionKernels(dtype, columns, keys == 77, scale < 0, 80)
    engine = Engine("DotProductAttention", {"scale": scale}, kernels, monkeypatch).attach()
    B, H = (1, 1) if columns > 256 else (2, 3)  # the interpreter takes its time
    q = draw(device, dtype, B, queries, H, columns)
    k, v = (draw(device, dtype, B, keys, H, columns) for _ in range(2))
    exact = reference.attention(q.double(), k.double(), v.double(), scale)
    assert_as_good(engine(q, k, v), reference.attention(q, k, v, scale), exact)


@pytest.mark.parametrize("shape", [(2, 320, 128, 128), (1, 128, 1024, 1024), (8, 1280, 32, 32)], ids=str)
def test_group_norms_are_split_as_the_operator_splits_them(shape: tuple[int, ...]) -> None:
    """At sizes that the interpreter would take minutes for."""
    x, w = torch.empty(shape, dtype=torch.float16, device="meta"), torch.empty(shape[1], device="meta")
    _, (stats, apply) = plan_group_norm(x, w, w, 32, 1e-5, silu=True, arch=80)
    constants = GroupNormKernels(torch.float16, shape[1], 32, True, False, 80).launches()[1]
    # The operator chooses tiles by the size at hand, a plugin once.
    constants |= {
        "BLOCK_S": stats.constants["BLOCK_S"],
        "TILE_C": stats.constants["GROUP"] * stats.constants["TILE_GROUPS"],
    }
    attributes = {"num_groups": 32, "epsilon": 1e-5}
    plan = OPERATORS["GroupNormSilu"].plan([shape], attributes, constants)
    for call, launch in zip(plan.launches, (stats, apply), strict=True):
        assert (call.grid,) == launch.grid
        numbers = {name: value for name, value in call.values.items() if isinstance(value, int | float)}
        assert numbers == {k: v for k, v in launch.args.items() if isinstance(v, int | float)}
    assert plan.workspace == 4 * stats.args["stats_ptr"].numel()
    assert plan.workspace <= OPERATORS["GroupNormSilu"].most_workspace([shape], attributes, constants)


def test_the_order_of_driver_calls(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x, w, b = (draw(device, torch.float16, *s) for s in ((1, 24, 8, 8), (24,), (24,)))
    engine = Engine("GroupNorm", NORM, norm_kernels(torch.float16, 24), monkeypatch, shared=50_000)
    calls = engine.cuda.calls
    engine.attach()
    assert {call[0] for call in calls} == {"cuModuleLoadData", "cuFuncSetAttribute"}
    assert len(engine.cuda.named("cuModuleLoadData")) == 4
    assert set(engine.cuda.named("cuFuncSetAttribute")) == {("cuFuncSetAttribute", 8, 50_000)}
    before = len(calls)
    engine.shape(x, w, b)
    assert len(calls) == before
    for _ in range(2):  # nothing is loaded or asked for while a graph may be captured
        engine.enqueue(x, w, b)
    launch = ("cuLaunchKernel", (4, 1, 1, 128, 1, 1), 50_000, STREAM)
    assert calls[before:] == [launch] * 4


def test_kernels_are_loaded_once_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("GroupNorm", NORM, norm_kernels(torch.float16, 24), monkeypatch)
    engine.attach().attach()
    assert len(engine.cuda.named("cuModuleLoadData")) == 4
    engine.cuda.context = 2000
    engine.attach()
    assert len(engine.cuda.named("cuModuleLoadData")) == 8


def test_contexts_have_shapes_of_their_own(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    dtype = torch.float32
    small, large = draw(device, dtype, 1, 24, 4, 4), draw(device, dtype, 2, 24, 9, 9)
    w, b = draw(device, dtype, 24), draw(device, dtype, 24)
    engine = Engine("GroupNorm", NORM, norm_kernels(dtype, 24), monkeypatch)
    first, second = (engine.plugin.attach_to_context(None) for _ in range(2))
    outs = []
    for engine.plugin, x in ((first, small), (second, large)):
        engine.shape(x, w, b)
    for engine.plugin, x in ((first, small), (second, large)):
        outs.append(engine.enqueue(x, w, b))
    for x, out in zip((small, large), outs, strict=True):
        exact = reference.group_norm(x.double(), w.double(), b.double(), 4, 1e-3)
        assert_as_good(out, reference.group_norm(x, w, b, 4, 1e-3), exact)


def test_nothing_is_launched_for_nothing(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    engine = Engine("GroupNorm", NORM, norm_kernels(torch.float16, 24), monkeypatch).attach()
    engine(torch.empty(0, 24, 4, 4), torch.empty(24), torch.empty(24))
    assert engine.cuda.named("cuLaunchKernel") == []


def test_a_plugin_has_every_method_that_the_bindings_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """They look a method up by its name, and where there is none they end the engine: on a GPU, not here."""
    plugin = Engine("GroupNorm", NORM, norm_kernels(torch.float16, 24), monkeypatch).plugin
    optional = {"destroy", "get_valid_tactics"}
    for interface in (rtx.IPluginV3, rtx.IPluginV3OneBuild, rtx.IPluginV3OneRuntime):
        methods = {name for name, x in vars(interface).items() if callable(x) and not name.startswith("_")}
        assert len(methods) > 1
        assert methods - optional - vars(type(plugin)).keys() == set()
    assert plugin.set_tactic(0) is None


# --- what is refused


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("GroupNorm", NORM, norm_kernels(torch.float16, 24), monkeypatch, arch=90).attach()
    with pytest.raises(
        BackendError, match=r"kernels are for sm_80, and this GPU is sm_90; .*`latentrt build --arch sm_90`"
    ):
        engine.shape(torch.empty(1, 24, 4, 4), torch.empty(24), torch.empty(24))
    assert "GroupNorm of [(1, 24, 4, 4), (24,), (24,)]: the engine's kernels" in engine.calls.failures[0]


def test_memory_that_is_not_aligned(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x, w, b = (draw(device, torch.float16, *s) for s in ((1, 24, 8, 8), (24,), (24,)))
    engine = Engine("GroupNorm", NORM, norm_kernels(torch.float16, 24), monkeypatch).attach()
    engine.shape(x, w, b)
    at = engine.cuda.holds(x, w, b)
    with pytest.raises(BackendError, match=r"a plugin's input 0 is at 0x\w+, which is not aligned"):
        engine.plugin.enqueue(None, None, [at[0] + 2, *at[1:]], [at[0]], 256, STREAM)
    with pytest.raises(BackendError, match=r"workspace 0 is at 0x0"):
        engine.plugin.enqueue(None, None, at, [at[0]], 0, STREAM)


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuCtxGetDevice", "cuLaunchKernel"])
def test_a_driver_that_fails(call: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    engine = Engine("GroupNorm", NORM, norm_kernels(torch.float16, 24), monkeypatch)
    engine.cuda.fail = call
    with pytest.raises(BackendError, match=rf"{call} failed with 700 \(an illegal memory access"):
        engine.attach()(*(draw(device, torch.float16, *s) for s in ((1, 24, 8, 8), (24,), (24,))))


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(plugin_code.ctypes, "CDLL", absent)
    with pytest.raises(BackendError, match=r"run on NVIDIA GPUs, and there is no driver here \(libcuda"):
        plugin_code.driver()


def test_sizes_beyond_32_bits() -> None:
    with pytest.raises(BackendError, match=r"stride_qb is 4294967296, over 2147483647; use smaller sizes"):
        OPERATORS["DotProductAttention"].plan(
            [(2, 2**20, 64, 64)] * 3, {"scale": 1.0}, {"BLOCK_M": 64, "BLOCK_V": 64}
        )


def test_damaged_kernels() -> None:
    code, _ = code_of(norm_kernels(torch.float16, 24))
    assert Code.from_bytes(code.packed) == code
    with pytest.raises(BackendError, match=r"kernels of a plugin are damaged \(.*\); build the engine again"):
        Code.from_bytes(code.packed[:-9])


def test_channels_that_are_not_fixed() -> None:
    key = OPERATORS["GroupNorm"].key
    with pytest.raises(BackendError, match="4 groups of -1 channels"):
        key("float16", [(-1, -1, 8, 8)], NORM)
    with pytest.raises(BackendError, match="4 groups of 6 channels"):
        key("float16", [(-1, 6, 8, 8)], NORM)
    with pytest.raises(BackendError, match="no fixed number of columns"):
        OPERATORS["DotProductAttention"].key("float16", [(-1, -1, 8, -1)] * 3, {"scale": 1.0})


# --- where it runs


def test_plugins_run_where_torch_and_triton_are_not() -> None:
    """Made from what an engine holds, prepared and launched; over a driver that only counts."""
    code = textwrap.dedent("""
        import sys
        for name in ("torch", "triton", "onnx"):
            sys.modules[name] = None  # importing it fails
        import numpy as np, tensorrt_rtx_bindings as trt
        from types import SimpleNamespace as N
        from latentrt.runtime.engines import plugins, plugin_code
        cubin = plugin_code.Cubin("k", (("x_ptr", "*fp16"), ("S", "i32")), 0, 4, b"code")
        roles = ("stats/even", "stats/any", "apply/even", "apply/any")
        constants = {"BLOCK_S": 64, "TILE_C": 2, "PROGRAM": 4096, "PROGRAMS": 8, "MOST_SPLITS": 8}
        cubins = dict.fromkeys(roles, cubin)
        code = plugin_code.Code({0: constants}, {0: cubins})
        launched = []

        class Cuda:
            cuLaunchKernel = lambda self, *a: launched.append(a[1:7]) or 0
            def __getattr__(self, name):
                return lambda *a: 0

        cuda = plugin_code.Driver(Cuda())
        plugins.driver = lambda: cuda
        calls = plugins.PluginCalls(counts={"GroupNorm": plugins.Counter()})
        creator = plugins._creator(trt, plugins.OPERATORS["GroupNorm"], calls)
        data = {"attributes": b'{"num_groups": 4, "epsilon": 1e-5}', "kernels": code.packed}
        kept = [trt.PluginField(n, np.frombuffer(d, np.int8), trt.PluginFieldType.INT8) for n, d in data.items()]
        plugin = creator.create_plugin("", trt.PluginFieldCollection(kept), trt.TensorRTPhase.RUNTIME)
        plugin = plugin.attach_to_context(None)
        plugin.on_shape_change([N(dims=(1, 8, 8, 8)), N(dims=(8,)), N(dims=(8,))], [])
        plugin.enqueue(None, None, [64, 128, 192], [256], 512, 7)
        print(launched)
    """)
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert out.stdout.strip() == "[(4, 1, 1, 128, 1, 1), (4, 1, 1, 128, 1, 1)]"
