"""PyTorch's switches for TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allowing_tf32() -> Iterator[None]:
    """Allow it in convolutions, as is PyTorch's default, and in matmuls, as a user may have: `@allowing_tf32()`."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value
