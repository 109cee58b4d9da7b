"""How far apart two tensors or pictures are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MAX_PSNR", "psnr", "relative_error", "ssim"]

MAX_PSNR = 200.0
"""What equal tensors are given, in dB."""

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|, in float64; infinite where the shapes differ, nan where either is not finite."""
    if a.shape != b.shape:
        return float("inf")
    wanted = b.double()
    return float((a.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def psnr(a: Tensor, b: Tensor, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio of `a` in dB, 10 log10(peak^2 / mean (a - b)^2), computed in float64.

    Minus infinity where the shapes differ, nan where `a` is not finite.

    Args:
        b: what `a` should be, of the same shape.
        peak: the range of values; that of `b` by default.
    """
    if a.shape != b.shape:
        return -math.inf
    wanted = b.double()
    span = float(wanted.max() - wanted.min()) if peak is None else peak
    error = float((a.double() - wanted).square().mean())
    if not math.isfinite(error):
        return math.nan
    return min(MAX_PSNR, 10 * math.log10(max(span, 1e-30) ** 2 / max(error, 1e-300)))


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of pictures `[B, C, H, W]` with values in [0, 1]; 1 for equal ones.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), equation 13, with
    their window (Gaussian of 11 pixels, deviation 1.5) and constants (0.01 and 0.03), channel by channel in float64,
    over the places where the window fits. The window is as small as the picture where that is smaller. Where the
    shapes differ it is -1, the least there is.
    """
    if a.shape != b.shape:
        return -1.0
    a, b = a.double(), b.double()
    size = min(_WINDOW, *a.shape[2:])
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-at.square() / (2 * _SIGMA**2))
    weights: list[float] = (line / line.sum()).tolist()

    def mean(x: Tensor) -> Tensor:
        """Under the window, a product of two lines: shifted sums, since conv2d in float64 takes seven times as long."""
        for axis in (3, 2):
            places = x.shape[axis] - size + 1
            total = weights[0] * x.narrow(axis, 0, places)
            for k in range(1, size):
                total.add_(x.narrow(axis, k, places), alpha=weights[k])
            x = total
        return x

    mean_a, mean_b = mean(a), mean(b)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance, variances = mean(a * b) - product, mean(a * a + b * b) - squares
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * product + c1) / (squares + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return float((luminance * structure).mean())
