"""`kernels/reference.py`: every operator's reference against its formula in float64, for each dtype."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import latentrt.kernels
import pytest
import torch
import torch.nn.functional as F
from latentrt.kernels import (
    add_layer_norm,
    attention,
    geglu,
    group_norm,
    group_norm_silu,
    layer_norm,
    linear_geglu,
)
from tolerances import OPERATOR, OPERATOR_LARGE_MEAN, OPERATOR_TWO_ROUNDINGS
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def draw(*shape: int, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return (mean + std * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def agree(got: Tensor, exact: Tensor, dtype: torch.dtype, limits: dict[str, float] = OPERATOR) -> None:
    assert got.dtype == dtype
    assert got.shape == exact.shape
    error = float((got.double() - exact).abs().max() / exact.abs().max())
    assert error <= limits[str(dtype).removeprefix("torch.")]


# The formulas, written out: none of them calls the function that the reference calls.


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", weights, v.double())


def exact_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    grouped = x.double().reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    return normed * weight.double().view(per_channel) + bias.double().view(per_channel)


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * weight.double() + bias.double()


def exact_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def exact_geglu(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    value, gate = x[..., :half].double(), x[..., half:].double()
    return value * gate * (1 + torch.erf(gate / math.sqrt(2))) / 2


@by_dtype
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "size"),
    [
        (2, 256, 256, 10, 64),  # self-attention of SDXL's middle levels, smaller image
        (2, 64, 77, 20, 64),  # cross-attention
        (1, 49, 49, 1, 512),  # the VAE's middle block
        (3, 7, 5, 3, 5),  # nothing aligned
        (1, 1, 1, 1, 8),  # one pixel
    ],
)
def test_attention(batch: int, queries: int, keys: int, heads: int, size: int, dtype: torch.dtype) -> None:
    q = draw(batch, queries, heads, size, dtype=dtype)
    k, v = (draw(batch, keys, heads, size, dtype=dtype) for _ in range(2))
    agree(attention(q, k, v), exact_attention(q, k, v, size**-0.5), dtype)
    agree(attention(q, k, v, scale=2 * size**-0.5), exact_attention(q, k, v, 2 * size**-0.5), dtype)


@by_dtype
def test_attention_of_a_projection_cut_into_heads_without_a_copy(dtype: torch.dtype) -> None:
    q, k, v = draw(2, 9, 3 * 4 * 8, dtype=dtype).unflatten(-1, (3, 4, 8)).unbind(2)  # strided views
    assert not q.is_contiguous()
    agree(attention(q, k, v), exact_attention(q, k, v, 8**-0.5), dtype)


@by_dtype
def test_attention_of_large_scores(dtype: torch.dtype) -> None:
    """exp of these scores overflows in float32 unless the row's maximum is taken off first."""
    q, k, v = (draw(1, 12, 2, 64, dtype=dtype, std=s) for s in (16, 4, 1))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8
    assert scores.max() > 100
    agree(attention(q, k, v), exact_attention(q, k, v, 1 / 8), dtype, OPERATOR_LARGE_MEAN)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """PyTorch's for half types on CUDA, [B, H, S, D]: a row's maximum is taken of scores without their scale, and
    exponentials are rounded to the inputs' dtype."""
    scores = q.float() @ k.float().mT
    weights = ((scores - scores.amax(-1, keepdim=True)) * scale).exp()
    return ((weights.to(q.dtype).float() @ v.float()) / weights.sum(-1, keepdim=True)).to(q.dtype)


@by_dtype
def test_attention_with_a_negative_scale(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(2, 33, 2, 64, dtype=dtype) for _ in range(3))
    exact = exact_attention(q, k, v, -0.3)
    agree(attention(q, k, v, scale=-0.3), exact, dtype)
    if dtype.itemsize == 2:
        monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
        agree(attention(q, k, v, scale=-0.3), exact, dtype)


GROUPED = [
    ((2, 320, 16, 16), 32),  # SDXL's finest level, smaller image
    ((1, 1920, 6, 10), 32),  # the widest concatenation of its up blocks; not square
    ((2, 128, 33, 31), 32),  # a VAE level of odd size
    ((3, 6, 5), 3),  # one spatial dimension
    ((2, 8, 1, 1), 4),  # one pixel
]


@by_dtype
@pytest.mark.parametrize(("shape", "groups"), GROUPED)
def test_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    x, shift = draw(*shape, dtype=dtype), draw(*shape[:2], dtype=dtype)
    weight, bias = draw(shape[1], dtype=dtype, mean=1), draw(shape[1], dtype=dtype)
    exact = exact_group_norm(x, weight, bias, groups, 1e-5)
    agree(group_norm(x, weight, bias, groups, 1e-5), exact, dtype)
    agree(group_norm_silu(x, weight, bias, groups, 1e-5), exact_silu(exact), dtype)

    shifted = x.double() + shift.double().view(*shape[:2], *(1,) * (len(shape) - 2))
    exact = exact_silu(exact_group_norm(shifted, weight, bias, groups, 1e-5))
    agree(group_norm_silu(x, weight, bias, groups, 1e-5, shift), exact, dtype)


@by_dtype
def test_group_norm_of_channels_last_and_of_a_slice(dtype: torch.dtype) -> None:
    x = draw(2, 24, 9, 7, dtype=dtype)
    weight, bias = draw(24, dtype=dtype, mean=1), draw(24, dtype=dtype)
    for strided in (
        x.contiguous(memory_format=torch.channels_last),
        draw(4, 24, 9, 14, dtype=dtype)[::2, :, :, ::2],
    ):
        exact = exact_group_norm(strided, weight, bias, 4, 1e-6)
        agree(group_norm(strided, weight, bias, 4, 1e-6), exact, dtype)
        agree(group_norm_silu(strided, weight, bias, 4, 1e-6), exact_silu(exact), dtype)


@by_dtype
def test_norms_of_large_means(dtype: torch.dtype) -> None:
    """Mean 1000, deviation 1: in float32 E[x^2] - E[x]^2 is rounding alone."""
    x = draw(2, 64, 16, 16, dtype=dtype, mean=1000)
    weight, bias = draw(64, dtype=dtype, mean=1), draw(64, dtype=dtype)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        got = group_norm(image, weight, bias, 8, 1e-5)
        agree(got, exact_group_norm(image, weight, bias, 8, 1e-5), dtype, OPERATOR_LARGE_MEAN)
        assert got.stride() == image.stride()
    rows = x.flatten(2).transpose(1, 2)  # [B, S, D], not contiguous
    agree(
        layer_norm(rows, weight, bias, 1e-5),
        exact_layer_norm(rows, weight, bias, 1e-5),
        dtype,
        OPERATOR_LARGE_MEAN,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    """All but a few ties are the exact result's nearest neighbour; one more rounding moves every tenth."""
    x, shift = draw(2, 32, 24, 24, dtype=dtype), draw(2, 32, dtype=dtype)
    weight, bias = draw(32, dtype=dtype, mean=1), draw(32, dtype=dtype)
    shifted = x.double() + shift.double()[..., None, None]
    rows = x.flatten(1, 2)
    for got, exact in (
        (group_norm(x, weight, bias, 4, 1e-5), exact_group_norm(x, weight, bias, 4, 1e-5)),
        (
            group_norm_silu(x, weight, bias, 4, 1e-5, shift),
            exact_silu(exact_group_norm(shifted, weight, bias, 4, 1e-5)),
        ),
        (geglu(rows), exact_geglu(rows)),
        (
            layer_norm(rows, weight[:24], bias[:24], 1e-5),
            exact_layer_norm(rows, weight[:24], bias[:24], 1e-5),
        ),
    ):
        assert (got != exact.to(dtype)).double().mean() < 0.01


def test_eps_decides_where_the_variance_is_nothing() -> None:
    """Of a constant 3 under an eps of 4: the norm is 0, and half of what a tiny deviation would be."""
    one, zero = torch.ones(4), torch.zeros(4)
    x = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1.0, -1.0, 1.0, -1.0]])
    expected = torch.tensor([0.0, 5**-0.5])  # 1 / sqrt(1 + 4)
    torch.testing.assert_close(layer_norm(x, one, zero, 4.0)[:, 0], expected)
    torch.testing.assert_close(group_norm(x, one, zero, 1, 4.0)[:, 0], expected)


@by_dtype
@pytest.mark.parametrize("shape", [(2, 64, 640), (1, 77, 30), (5, 3), (2, 3, 4, 8), (1, 1, 1)])
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = draw(*shape, dtype=dtype, mean=0.5), draw(*shape, dtype=dtype, std=2)
    weight, bias = draw(shape[-1], dtype=dtype, mean=1), draw(shape[-1], dtype=dtype)
    agree(layer_norm(x, weight, bias, 1e-5), exact_layer_norm(x, weight, bias, 1e-5), dtype)

    normed, total = add_layer_norm(x, residual, weight, bias, 1e-5)
    agree(total, (x.double() + residual.double()), dtype)
    agree(normed, exact_layer_norm(total, weight, bias, 1e-5), dtype)


@by_dtype
@pytest.mark.parametrize("shape", [(2, 64, 2560), (1, 5, 6), (4, 2), (2, 1, 3, 10)])
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype, std=3)  # gates far into both tails
    agree(geglu(x), exact_geglu(x), dtype)
    agree(geglu(x.mT.contiguous().mT), exact_geglu(x), dtype)


@by_dtype
@pytest.mark.parametrize("rows", [(2, 64), (3,), (), (1, 2, 3)])
def test_linear_geglu(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*rows, 40, dtype=dtype)
    weight, bias = draw(2 * 24, 40, dtype=dtype, std=0.2), draw(2 * 24, dtype=dtype)
    projected = x.double() @ weight.double().T
    agree(
        linear_geglu(x, weight, bias),
        exact_geglu(projected + bias.double()),
        dtype,
        OPERATOR_TWO_ROUNDINGS,
    )
    agree(linear_geglu(x, weight), exact_geglu(projected), dtype, OPERATOR_TWO_ROUNDINGS)


def test_the_public_names() -> None:
    assert latentrt.kernels.__all__ == [
        "add_layer_norm",
        "as_nodes",
        "attention",
        "by_reference",
        "geglu",
        "group_norm",
        "group_norm_silu",
        "layer_norm",
        "linear_geglu",
        "sampler_step",
        "unavailable",
    ]
    assert all(callable(getattr(latentrt.kernels, name)) for name in latentrt.kernels.__all__)


def test_the_folder_is_not_taken_for_another_projects_package() -> None:
    """From the repository's root `import kernels` finds this folder, and transformers tries it: an error there,
    or a version to go by, would break transformers for everyone who works in the root."""
    root = Path(latentrt.kernels.__file__).parents[1]
    program = (
        "import sys, kernels; assert not hasattr(kernels, '__version__'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
