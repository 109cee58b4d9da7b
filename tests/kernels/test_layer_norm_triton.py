"""`kernels/_layer_norm_triton.py`: the Triton layer norm against float64: on the GPU where there is one, else in
Triton's interpreter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.kernel_checks import assert_as_good
from latentrt.kernels import add_layer_norm, layer_norm, reference, tuning
from torch import Tensor

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

pytestmark = pytest.mark.usefixtures("poisoned")


def check(x: Tensor, residual: Tensor | None = None) -> None:
    weight, bias = (torch.randn(x.shape[-1], device=x.device).to(x.dtype) for _ in range(2))
    if residual is None:
        out, usual, total = layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5), x
    else:
        usual, total = reference.add_layer_norm(x, residual, weight, bias, 1e-5)
        out, got = add_layer_norm(x, residual, weight, bias, 1e-5)
        assert_as_good(got, total, (x.double() + residual.double()))
        total = got  # the norm is of the sum as rounded
    exact = reference.layer_norm(*(t.double() for t in (total, weight, bias)), 1e-5)
    assert_as_good(out, usual, exact)


@by_dtype
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 5, 640), id="SDXL's width"),
        pytest.param((3, 1280), id="SDXL's other width, more than a block of 1024"),
        pytest.param((1, 7, 77), id="not a power of two"),
        pytest.param((3, 1), id="a single feature"),
        pytest.param((40,), id="a single row"),
    ],
)
def test_numerics(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, launches: Counter[str]
) -> None:
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    check(x)
    check(x, 3 * residual)
    assert launches == {"_layer_norm_kernel": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_longer_than_a_block(dtype: torch.dtype, device: torch.device, launches: Counter[str]) -> None:
    x, residual = torch.randn(2, 3, 150, device=device).to(dtype)
    with tuning.trying("layer_norm", {"MOST_D": 64, "BLOCK_M": 2, "num_warps": 4, "num_stages": 1}):
        check(x)
        check(x, residual)
        check(x + 1000)
    assert launches == {"_layer_norm_kernel": 3}


@by_dtype
@pytest.mark.usefixtures("launches")
def test_large_means(dtype: torch.dtype, device: torch.device) -> None:
    """Mean 1000, deviation 1: in float32 E[x^2] - E[x]^2 is rounding alone."""
    x = (torch.randn(3, 320, device=device) + 1000).to(dtype)
    check(x)
    check(x, torch.randn(3, 320, device=device).to(dtype))
    check(x, x)


@by_dtype
@pytest.mark.usefixtures("launches")
def test_any_strides(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 20, 6, device=device).to(dtype)
    check(x.mT)
    check(x.mT, x.mT.contiguous())
    check(x[:, ::2, ::3], x[:, 1::2, 1::3])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
@pytest.mark.usefixtures("launches")
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    x, one = torch.empty(shape, device=device), torch.ones(4, device=device)
    assert layer_norm(x, one, one, 1e-5).shape == shape
    assert [t.shape for t in add_layer_norm(x, x, one, one, 1e-5)] == [shape, shape]


@pytest.mark.usefixtures("launches")
def test_the_custom_ops(device: torch.device) -> None:
    x, residual = torch.randn(2, 3, 4, 10, device=device)
    weight, bias = torch.randn(2, 10, device=device)
    torch.library.opcheck(torch.ops.latentrt.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.latentrt.add_layer_norm.default, (x, residual, weight, bias, 1e-5))


def test_the_custom_ops_by_their_references(device: torch.device) -> None:
    x = torch.randn(10, 3, device=device, dtype=torch.float64).mT
    weight, bias = torch.randn(2, 10, device=device, dtype=torch.float64)
    torch.library.opcheck(torch.ops.latentrt.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.latentrt.add_layer_norm.default, (x, x, weight, bias, 1e-5))


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("shape", [(2, 4096, 640), (2, 1024, 1280), (8, 77, 2048), (64, 20000)], ids=str)
def test_full_size(shape: tuple[int, ...], dtype: torch.dtype, launches: Counter[str]) -> None:
    x, residual = torch.randn(2, *shape, device="cuda").to(dtype)
    check(x)
    check(x, residual)
    assert launches == {"_layer_norm_kernel": 2}
