"""How Triton kernels are held against float64."""

from __future__ import annotations

import torch
from latentrt.kernels.registry import allowed_error
from torch import Tensor


def assert_as_good(got: Tensor, reference: Tensor, exact: Tensor) -> None:
    """`got` is of the reference's dtype and shape, all finite, and about as near to `exact` (float64) as it."""
    assert got.dtype == reference.dtype
    assert got.shape == reference.shape == exact.shape
    assert torch.isfinite(got).all(), f"{int((~torch.isfinite(got)).sum())} elements are not finite"
    error, usual = (float((t.double() - exact).abs().max()) for t in (got, reference))
    allowed = allowed_error(reference, exact)
    worst = tuple(int(i) for i in torch.unravel_index((got.double() - exact).abs().argmax(), got.shape))
    assert error <= allowed, (
        f"off by {error:.3g} at {worst}, {allowed:.3g} allowed (the reference: {usual:.3g})"
    )
