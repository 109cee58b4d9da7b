"""`kernels/_group_norm_triton.py`: the Triton group norms against float64: on the GPU where there is one, else in
Triton's interpreter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.kernel_checks import assert_as_good
from latentrt.kernels import group_norm, group_norm_silu, reference, tuning
from latentrt.kernels._group_norm_triton import MOST_SPLITS, plan
from latentrt.kernels.registry import Case, specs
from torch import Tensor

SMALL = {"BLOCK": 256, "PROGRAM": 512, "PROGRAMS": 4, "num_warps": 4, "num_stages": 1}
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BOTH = {"_stats_kernel": 1, "_apply_kernel": 1}

pytestmark = pytest.mark.usefixtures("poisoned")


def draw(
    *shape: int, dtype: torch.dtype, device: torch.device, mean: float = 0.0, channels_last: bool = False
) -> Tensor:
    x = (torch.randn(shape, device=device) + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def check(x: Tensor, groups: int, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    w, b = (draw(x.shape[1], dtype=x.dtype, device=x.device) for _ in range(2))
    ours, usual = (group_norm_silu, reference.group_norm_silu) if silu else (group_norm, reference.group_norm)
    out = ours(x, w, b, groups, 1e-5, shift)
    double = None if shift is None else shift.double()
    exact = usual(x.double().contiguous(), w.double(), b.double(), groups, 1e-5, double)
    # Contiguous: PyTorch's channels_last kernel on the CPU loses the variance of large means.
    assert_as_good(out, usual(x.contiguous(), w, b, groups, 1e-5, shift), exact)
    return out


SHAPES = [
    pytest.param((2, 40, 8, 8), 4, id="groups of 10 channels, as in SDXL, smaller"),
    pytest.param((1, 30, 7, 9), 2, id="groups of 15 channels, an odd image"),
    pytest.param((1, 8, 33, 31), 2, id="a VAE level of odd size, in several programs"),
    pytest.param((2, 6, 1, 1), 3, id="one pixel"),
    pytest.param((1, 600, 1, 2), 1, id="a group wider than a block"),
    pytest.param((2, 320, 3, 3), 32, id="SDXL's channels: channels_last in tiles of eight groups"),
    pytest.param((1, 128, 5, 3), 32, id="the VAE's channels: tiles of sixteen groups"),
]


@by_dtype
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_numerics(
    shape: tuple[int, ...],
    groups: int,
    channels_last: bool,
    dtype: torch.dtype,
    device: torch.device,
    launches: Counter[str],
) -> None:
    x = draw(*shape, dtype=dtype, device=device, channels_last=channels_last)
    with tuning.trying("group_norm", SMALL):
        out = check(x, groups, draw(*shape[:2], dtype=dtype, device=device))
    assert out.stride() == torch.empty_like(x).stride()
    assert launches == BOTH


@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_without_silu(
    channels_last: bool, shifted: bool, device: torch.device, launches: Counter[str]
) -> None:
    x = draw(2, 12, 5, 7, dtype=torch.float16, device=device, channels_last=channels_last)
    shift = draw(2, 12, dtype=torch.float16, device=device) if shifted else None
    with tuning.trying("group_norm", SMALL):
        check(x, 3, shift, silu=False)
    assert launches == BOTH


@by_dtype
@pytest.mark.usefixtures("launches")
def test_silu_far_from_zero(dtype: torch.dtype, device: torch.device) -> None:
    """Before SiLU from -200 to 200: beyond 88 the exponential overflows float32. And what is infinite before it."""
    x = torch.linspace(-1, 1, 4096, dtype=torch.float64, device=device).view(1, 2, 32, 64).to(dtype)
    w, b = torch.full((2,), 230.0, dtype=dtype, device=device), torch.zeros(2, dtype=dtype, device=device)
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype, device=device)
    with tuning.trying("group_norm", SMALL):
        out, ends = (group_norm_silu(x, w, bias, 2, 1e-5) for bias in (b, infinite))
        exact = reference.group_norm_silu(x.double(), w.double(), b.double(), 2, 1e-5)
    assert_as_good(out, reference.group_norm_silu(x, w, b, 2, 1e-5), exact)
    torch.testing.assert_close(ends, reference.group_norm_silu(x, w, infinite, 2, 1e-5), equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@by_dtype
def test_large_means(
    channels_last: bool, dtype: torch.dtype, device: torch.device, launches: Counter[str]
) -> None:
    """Mean 1000, deviation 1: in float32 E[x^2] - E[x]^2 is rounding alone."""
    x = draw(1, 8, 16, 16, dtype=dtype, device=device, mean=1000, channels_last=channels_last)
    with tuning.trying("group_norm", SMALL):
        check(x, 2, silu=False)
        # The shift takes the mean away again, by another amount in each channel.
        check(x, 2, (torch.arange(8, device=device) - 1000).to(dtype)[None])
    assert launches == {"_stats_kernel": 2, "_apply_kernel": 2}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.usefixtures("launches")
def test_means_far_apart(channels_last: bool, device: torch.device) -> None:
    """Of groups, each a thousand times its deviation, in whole blocks, which are merged by fewer sums."""
    means = (torch.arange(8, device=device) // 2 * 1000.0)[None, :, None, None]
    with tuning.trying("group_norm", SMALL):
        for _ in range(8):
            x = draw(1, 8, 16, 16, dtype=torch.float32, device=device, channels_last=channels_last)
            check(x + means, 4, silu=False)


@pytest.mark.usefixtures("launches")
def test_constant_images(device: torch.device) -> None:
    """No variance at all: nothing but eps under the root."""
    x = torch.full((1, 8, 6, 6), 3.0, device=device)
    with tuning.trying("group_norm", SMALL):
        check(x, 2)


@pytest.mark.parametrize("table", ["contiguous", "channels_last"])
@pytest.mark.usefixtures("launches")
def test_tuned_blocks(table: str, device: torch.device) -> None:
    x = draw(1, 20, 32, 32, dtype=torch.float16, device=device, channels_last=table == "channels_last")
    check(x, 2)


@pytest.mark.parametrize("case", specs(["group_norm_silu"])[0].cases, ids=lambda case: case.name)
def test_programs_come_in_whole_waves(case: Case) -> None:
    """Those of a second wave that is begun take as long as a full one."""
    args = case.inputs(torch.bfloat16, torch.device("meta"))
    x = args[0]
    sizes = {"BLOCK": 4096, "PROGRAM": 65536, "PROGRAMS": 396, "num_warps": 8, "num_stages": 1}
    with tuning.trying("group_norm", sizes):
        _, planned = plan(*args, silu=True, arch=90)
    waves = max(1, x.numel() // (65536 * 396))
    for launch in planned:
        (programs,) = launch.grid
        assert programs <= 396 * waves
        assert programs % 396 == 0 or programs % 396 > 0.6 * 396
        assert launch.args["splits"] * launch.args["chunk"] >= x.shape[2] * x.shape[3]
        assert launch.args["splits"] <= MOST_SPLITS


@by_dtype
@pytest.mark.usefixtures("launches")
def test_slices_and_other_ranks(dtype: torch.dtype, device: torch.device) -> None:
    with tuning.trying("group_norm", SMALL):
        check(draw(2, 16, 6, 10, dtype=dtype, device=device)[:, ::2, :, 1::2], 4)
        check(draw(2, 8, 5, dtype=dtype, device=device), 4, silu=False)
        check(draw(3, 8, dtype=dtype, device=device), 2, silu=False)
        check(draw(1, 4, 2, 3, 5, dtype=dtype, device=device), 2, silu=False)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
@pytest.mark.usefixtures("launches")
def test_nothing_to_do(shape: tuple[int, ...], device: torch.device) -> None:
    w = torch.ones(8, device=device)
    assert group_norm_silu(torch.empty(shape, device=device), w, w, 4, 1e-5).shape == shape


@pytest.mark.usefixtures("launches")
def test_the_custom_ops(device: torch.device) -> None:
    x = draw(1, 4, 2, 3, dtype=torch.float32, device=device, channels_last=True)
    w, b = torch.randn(2, 4, device=device)
    with tuning.trying("group_norm", SMALL):
        torch.library.opcheck(torch.ops.latentrt.group_norm.default, (x.contiguous(), w, b, 2, 1e-5))
        args = (x, w, b, 2, 1e-5, x[:, :, 0, 0])
        torch.library.opcheck(torch.ops.latentrt.group_norm_silu.default, args)


def test_the_custom_ops_by_their_references(device: torch.device) -> None:
    x = draw(2, 8, 3, 5, dtype=torch.float64, device=device, channels_last=True)
    w, b = torch.randn(2, 8, device=device, dtype=torch.float64)
    torch.library.opcheck(torch.ops.latentrt.group_norm.default, (x[:, :, ::2], w, b, 4, 1e-5))
    torch.library.opcheck(torch.ops.latentrt.group_norm_silu.default, (x, w, b, 4, 1e-5, None))


def test_float64_runs_the_reference(device: torch.device, launches: Counter[str]) -> None:
    x = draw(2, 8, 3, 5, dtype=torch.float64, device=device)
    w = torch.ones(8, device=device, dtype=torch.float64)
    torch.testing.assert_close(group_norm(x, w, w, 4, 1e-5), reference.group_norm(x, w, w, 4, 1e-5))
    assert not launches


@pytest.mark.gpu
@by_dtype
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(2, 320, 128, 128), (2, 1920, 32, 32), (1, 128, 1024, 1024), (1, 512, 1024, 1024)], ids=str
)
def test_full_size(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, launches: Counter[str]
) -> None:
    x = draw(*shape, dtype=dtype, device=torch.device("cuda"), channels_last=channels_last)
    check(x, 32, draw(*shape[:2], dtype=dtype, device=x.device))
    assert launches == BOTH


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(channels_last: bool, launches: Counter[str]) -> None:
    """In one image; the last group, which lies beyond, is compared alone."""
    device = torch.device("cuda")
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(1, 512, 2080, 2080, dtype=torch.float16, device=device, memory_format=form).normal_()
    assert x.numel() > 2**31
    w, b = torch.randn(2, 512, device=device).half()
    out = group_norm_silu(x, w, b, 32, 1e-5)[:, -16:].contiguous()
    last, w, b = x[:, -16:].contiguous(), w[-16:], b[-16:]
    wanted = reference.group_norm_silu(last.double(), w.double(), b.double(), 1, 1e-5)
    assert_as_good(out, reference.group_norm_silu(last, w, b, 1, 1e-5), wanted)
    assert launches == BOTH
