"""`kernels/_geglu_triton.py`: the Triton GEGLU kernels against float64: on the GPU where there is one, else in
Triton's interpreter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.kernel_checks import assert_as_good
from latentrt.kernels import geglu, linear_geglu, reference, tuning
from latentrt.kernels._dispatch import arch_of
from latentrt.kernels._geglu_triton import plan_linear
from torch import Tensor

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 1}
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

pytestmark = pytest.mark.usefixtures("poisoned")


def check(x: Tensor) -> None:
    assert_as_good(geglu(x), reference.geglu(x), reference.geglu(x.double()))


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = reference.linear_geglu(x.double(), weight.double(), None if bias is None else bias.double())
    usual = reference.linear_geglu(x, weight, bias)
    assert_as_good(linear_geglu(x, weight, bias), usual, exact)


@by_dtype
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 3, 2560), id="several blocks across"),
        pytest.param((9, 30), id="nothing aligned"),
        pytest.param((2,), id="one value, one gate"),
    ],
)
def test_gate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, launches: Counter[str]
) -> None:
    x = (3 * torch.randn(shape, device=device)).to(dtype)  # gates far into both tails
    check(x)
    assert launches == {"_geglu_kernel": 1}


@by_dtype
@pytest.mark.usefixtures("launches")
def test_gate_of_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 12, 5, device=device).to(dtype)
    check(x.mT)
    check(x.mT[:, ::2])


@pytest.mark.usefixtures("launches")
def test_gates_so_large_that_nothing_or_all_passes(device: torch.device) -> None:
    gates = torch.tensor([-3e4, -100.0, -10.0, -0.0, 0.0, 10.0, 100.0, 3e4], device=device)
    check(torch.cat([torch.ones_like(gates), gates]))
    check(torch.cat([torch.ones_like(gates), gates]).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("launches")
def test_every_gate_that_a_half_type_has(dtype: torch.dtype, device: torch.device) -> None:
    """Each within one unit in the last place and 5e-7 of the exact result; without a finite one as the reference."""
    gates = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype).view(64, 1024)
    out, usual = (op(torch.cat([torch.ones_like(gates), gates], 1)) for op in (geglu, reference.geglu))
    exact = gates.double() * 0.5 * torch.special.erfc(-gates.double() * 0.5**0.5)
    finite = gates.isfinite()
    assert finite.sum() > 60_000
    kind = torch.finfo(dtype)  # to the nearest on a GPU, towards zero by the interpreter
    rounding = kind.eps * (exact.abs() + kind.smallest_normal)
    assert ((out.double() - exact).abs() <= rounding + 5e-7)[finite].all()
    torch.testing.assert_close(out[~finite], usual[~finite], equal_nan=True)
    assert out[gates == torch.inf].isposinf().all()


@by_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("rows", "K", "N"),
    [
        pytest.param((2, 16), 32, 48, id="whole blocks only"),
        pytest.param((5, 17), 40, 35, id="nothing aligned, a last group of one block"),
        pytest.param((), 16, 16, id="a vector"),
        pytest.param((1, 1, 15), 7, 1, id="smaller than a block in every direction"),
    ],
)
def test_projection(
    rows: tuple[int, ...],
    K: int,
    N: int,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    launches: Counter[str],
) -> None:
    x = torch.randn(*rows, K, device=device).to(dtype)
    weight = (torch.randn(2 * N, K, device=device) * 0.3).to(dtype)
    with tuning.trying("linear_geglu", SMALL):
        check_linear(x, weight, torch.randn(2 * N, device=device).to(dtype) if bias else None)
    assert launches == {"_linear_geglu_kernel": 1}


@by_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("rows", "K"), [((2, 3), 24), ((5,), 0)], ids=str)
def test_projection_by_the_library(
    rows: tuple[int, ...],
    K: int,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    launches: Counter[str],
) -> None:
    """Where the tuned data choose it; any strides, and nothing to multiply."""
    x = torch.randn(*rows, 2 * K, device=device).to(dtype)[..., ::2]
    weight = torch.randn(14, K, device=device).to(dtype)
    with tuning.trying("linear_geglu", tuning.LIBRARY):
        check_linear(x, weight, torch.randn(14, device=device).to(dtype) if bias else None)
    steps = ("library: linear_geglu, projection", "_geglu_kernel")
    assert launches == dict.fromkeys(steps, 1)


@pytest.mark.parametrize("specialize", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "K", "N"), [pytest.param(32, 32, 32, id="whole blocks"), pytest.param(21, 24, 19, id="none")]
)
def test_projection_of_described_blocks(
    rows: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    specialize: int,
    device: torch.device,
    launches: Counter[str],
) -> None:
    x = torch.randn(2, rows, K, device=device).to(dtype)
    weight, bias = ((torch.randn(2 * N, *s, device=device) * 0.3).to(dtype) for s in ((K,), ()))
    with tuning.trying("linear_geglu", {**SMALL, "TMA": 1, "SPECIALIZE": specialize}):
        check_linear(x, weight, bias)
        check_linear(x, weight, None)
    assert launches == {"_linear_geglu_tma_kernel": 2}


def test_what_descriptors_cannot_carry(device: torch.device, launches: Counter[str]) -> None:
    """Rows of 7 values, single precision, a beginning at an odd address: the plain kernel."""
    with tuning.trying("linear_geglu", {**SMALL, "TMA": 1}):
        check_linear(torch.randn(5, 7, device=device).half(), torch.randn(6, 7, device=device).half(), None)
        check_linear(torch.randn(5, 8, device=device), torch.randn(6, 8, device=device), None)
        off = torch.randn(41, device=device).half()[1:].view(5, 8)
        check_linear(off, torch.randn(6, 8, device=device).half(), None)
        assert linear_geglu(off[:, :0], off[:4, :0]).count_nonzero() == 0
    assert launches == {"_linear_geglu_kernel": 4}


@pytest.mark.parametrize(("shape_class", "rows"), [("few", 70), ("many", 520)])
def test_projection_with_tuned_blocks(
    shape_class: str, rows: int, device: torch.device, launches: Counter[str]
) -> None:
    """Those of every architecture in the interpreter, on a GPU its own."""
    x, weight = torch.randn(rows, 64, device=device).half(), torch.randn(40, 64, device=device).half()
    archs = tuning.architectures() if device.type == "cpu" else (arch_of(device),)
    tiles = [tuning.constants("linear_geglu", arch, x.dtype, shape_class) for arch in archs]
    for tile in tiles:
        with tuning.trying("linear_geglu", tile):
            check_linear(x, weight, None)
    assert launches.total() == sum(1 + (tile == tuning.LIBRARY) for tile in tiles)


@by_dtype
@pytest.mark.usefixtures("launches")
def test_projection_of_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = (torch.randn(size, device=device).to(dtype) for size in ((2, 20, 6), (20, 20), (40,)))
    x, weight, bias = x.mT, weight.mT, bias[::2]
    with tuning.trying("linear_geglu", SMALL):
        check_linear(x, weight, bias)


@pytest.mark.usefixtures("launches")
def test_nothing_to_do(device: torch.device) -> None:
    weight = torch.ones(6, 4, device=device)
    assert geglu(torch.empty(0, 6, device=device)).shape == (0, 3)
    assert linear_geglu(torch.empty(2, 0, 4, device=device), weight).shape == (2, 0, 3)


@pytest.mark.usefixtures("launches")
def test_the_custom_ops(device: torch.device) -> None:
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((2, 3, 8), (6, 8), (6,)))
    torch.library.opcheck(torch.ops.latentrt.geglu.default, (x,))
    with tuning.trying("linear_geglu", SMALL):
        torch.library.opcheck(torch.ops.latentrt.linear_geglu.default, (x, weight, bias))


def test_the_custom_ops_by_their_references(device: torch.device) -> None:
    x, weight = (torch.randn(shape, device=device, dtype=torch.float64) for shape in ((8, 6), (6, 8)))
    torch.library.opcheck(torch.ops.latentrt.geglu.default, (x.mT,))
    torch.library.opcheck(torch.ops.latentrt.linear_geglu.default, (x.mT, weight, None))


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize(("rows", "K"), [(4096, 640), (1024, 1280), (77, 640)])
def test_full_size(rows: int, K: int, dtype: torch.dtype, launches: Counter[str]) -> None:
    x = torch.randn(2, rows, K, device="cuda").to(dtype)
    weight = (torch.randn(8 * K, K, device="cuda") * K**-0.5).to(dtype)
    bias = torch.randn(8 * K, device="cuda").to(dtype)
    check_linear(x, weight, bias)
    check(torch.randn(2, rows, 8 * K, device="cuda").to(dtype))
    assert launches.total() == 2  # of whichever variants are tuned


@pytest.mark.parametrize(
    ("version", "arch", "specialized"),
    [("3.6.0", 90, False), ("3.6.0", 100, True), ("3.7.1", 90, True)],
)
def test_warps_have_roles_where_triton_can_give_them(
    version: str, arch: int, specialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere data that say so, tuned beside a newer Triton, take the same blocks without."""
    monkeypatch.setattr("triton.__version__", version)
    x, weight = (torch.randn(32, 32).half() for _ in range(2))
    with tuning.trying("linear_geglu", {**SMALL, "TMA": 1, "SPECIALIZE": 1}):
        _, (launch,) = plan_linear(x, torch.cat([weight, weight]), None, arch=arch)
    assert launch.kernel.name == "_linear_geglu_tma_kernel"
    assert launch.constants["SPECIALIZE"] is specialized


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variant", [{"num_warps": 8}, {"num_warps": 4, "SPECIALIZE": 1}], ids=["copied", "specialized"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "K"), [(4096, 640), (4000, 640), (1024, 1280)])
def test_projection_of_described_blocks_at_full_size(
    rows: int, K: int, dtype: torch.dtype, variant: dict[str, int], launches: Counter[str]
) -> None:
    """Beside the plain kernel, which is held against float64 above: as near to float64 as that."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU that copies whole blocks: sm_90 or later")
    x = torch.randn(2, rows, K, device="cuda").to(dtype)
    weight = (torch.randn(8 * K, K, device="cuda") * K**-0.5).to(dtype)
    bias = torch.randn(8 * K, device="cuda").to(dtype)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_stages": 4}
    with tuning.trying("linear_geglu", {**blocks, **variant}):
        plain = linear_geglu(x, weight, bias)
    with tuning.trying("linear_geglu", {**blocks, **variant, "TMA": 1}):
        out = linear_geglu(x, weight, bias)
    assert launches == {"_linear_geglu_kernel": 1, "_linear_geglu_tma_kernel": 1}
    exact = reference.linear_geglu(x[:1, :99].double(), weight.double(), bias.double())
    assert_as_good(out[:1, :99], plain[:1, :99], exact)
