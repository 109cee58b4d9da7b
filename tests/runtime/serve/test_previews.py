"""Previews: where the VAE is linear they are exact."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latentrt.runtime.serve.previews import Previewer
from torch.nn import functional as F

WEIGHTS = torch.tensor([[0.1, 0.0, -0.05], [0.0, 0.08, 0.02], [0.03, 0.03, 0.0], [0.0, -0.06, 0.1]])


def decode(latents: torch.Tensor) -> torch.Tensor:
    rgb = torch.einsum("bchw,cd->bdhw", latents, WEIGHTS) + 0.5
    return F.interpolate(rgb, scale_factor=8)


@pytest.mark.parametrize(
    ("height", "width"),
    [(1024, 1024), (128, 128), (72, 200), (8, 8)],  # one picture; several; odd; a single latent
)
def test_a_linear_vae_is_found(height: int, width: int) -> None:
    vae = SimpleNamespace(scale=8, channels=4, decode=decode)
    previewer = Previewer.fit(vae, height, width, torch.device("cpu"))
    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1)) * 0.5
    wanted = (decode(latents)[0, :, ::8, ::8].permute(1, 2, 0) * 255).numpy()
    image = previewer(latents[0])
    assert image.size == (5, 6)
    assert np.abs(np.asarray(image, np.float64) - wanted).max() <= 0.6


def test_noise_of_any_level_is_brought_to_the_same_brightness() -> None:
    vae = SimpleNamespace(scale=8, channels=4, decode=decode)
    previewer = Previewer.fit(vae, 64, 64, torch.device("cpu"))
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
    quiet, loud = (np.asarray(previewer(noise * scale), np.float64) for scale in (1.5, 15.0))
    assert np.abs(quiet - loud).max() <= 1
    assert np.asarray(previewer(noise * torch.nan)).max() == 0
