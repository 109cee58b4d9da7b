"""Relative error, PSNR and SSIM against values worked out by hand and by another implementation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from latentrt.export.measures import MAX_PSNR, psnr, relative_error, ssim
from scipy.ndimage import gaussian_filter
from torch import Tensor


def test_relative_error() -> None:
    b = torch.tensor([4.0, -8.0])
    assert relative_error(b + torch.tensor([0.0, 0.8]), b) == pytest.approx(0.1)
    assert relative_error(b[:1], b) == float("inf")
    assert not relative_error(torch.tensor([float("nan"), 1.0]), b) <= 1.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_psnr() -> None:
    b = torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert psnr(b + 0.04, b) == pytest.approx(40)
    assert psnr(b + 0.01, b, peak=1.0) == pytest.approx(40, abs=1e-3)
    assert psnr(b, b) == MAX_PSNR
    assert psnr(b[:2], b) == -math.inf
    assert math.isnan(psnr(b * math.nan, b))


def test_ssim_of_even_pictures() -> None:
    """Without structure only the means count: (2ab + c1) / (a^2 + b^2 + c1)."""
    a, b = (torch.full((1, 3, 16, 16), value) for value in (0.5, 0.25))
    assert ssim(a, b) == pytest.approx((0.25 + 1e-4) / (0.3125 + 1e-4))


def test_ssim_of_a_negative() -> None:
    picture = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ssim(picture, 1 - picture) < -0.8
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)


def test_ssim_as_another_computes_it() -> None:
    """Wang et al.'s formula over SciPy's Gaussian, which ends at the same 11 pixels."""
    random = np.random.default_rng(0)
    a = random.random((1, 2, 24, 20))
    b = np.clip(a + 0.2 * random.standard_normal(a.shape), 0, 1)

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.4)[5:-5, 5:-5]

    found = []
    for x, y in zip(a[0], b[0], strict=True):
        mx, my = mean(x), mean(y)
        vx, vy, xy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        found.append(((2 * mx * my + 1e-4) * (2 * xy + 9e-4)) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(np.mean(found), abs=1e-12)


def ssim_by_convolution(a: Tensor, b: Tensor) -> float:
    """The same in float64 as it is written down, with PyTorch's convolution for the window."""
    line = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    line = (line / line.sum()).expand(a.shape[1], 1, 1, 11)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line, groups=x.shape[1]), line.mT, groups=x.shape[1])

    ma, mb = mean(a), mean(b)
    va, vb, ab = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    return float(
        (((2 * ma * mb + 1e-4) * (2 * ab + 9e-4)) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()
    )


def test_ssim_is_quick() -> None:
    """Where the benchmark measures it, the GPU waits; by convolutions it takes seven times as long at this size."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 1, 1024, 1024, dtype=torch.float64, generator=generator)
    b = (a + 0.01 * torch.randn(a.shape, dtype=torch.float64, generator=generator)).clamp(0, 1)

    def seconds(measure: Callable[[Tensor, Tensor], float]) -> float:
        taken = []
        for _ in range(3):
            begun = time.process_time()
            measure(a, b)
            taken.append(time.process_time() - begun)
        return min(taken)

    assert ssim(a, b) == pytest.approx(ssim_by_convolution(a, b), abs=1e-12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others spin while they wait, which would count
    try:
        assert seconds(ssim) < seconds(ssim_by_convolution) / 3
    finally:
        torch.set_num_threads(threads)


def test_pictures_smaller_than_the_window_or_of_another_shape() -> None:
    small = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert ssim(small, small) == pytest.approx(1)
    assert ssim(small, small[..., :5]) == -1
