"""`runtime/vae.py`: decoding in tiles: of memory that does not grow with the picture, and without seams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from latentrt.errors import RequestError
from latentrt.runtime.engines.lazy import EngineLoader
from latentrt.runtime.loading import load_vae
from latentrt.runtime.vae import VAE, Tiles
from latentrt.runtime.weights import open_checkpoint
from tolerances import VAE_TILES, VAE_TILES_LOCAL
from torch import Tensor
from torch.nn import functional as F

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [17, 24, 31, 40, 100, 128])
@pytest.mark.parametrize("size", [8, 16])
def test_parts_cover_a_side_evenly_and_their_weights_add_up(length: int, size: int) -> None:
    tiles = Tiles.of(length, size, 3)
    assert tiles.size == size
    assert tiles.starts[0] == 0
    assert tiles.starts[-1] + size == length
    steps = [b - a for a, b in zip(tiles.starts, tiles.starts[1:], strict=False)]
    assert max(steps) <= size - size // 4  # they overlap by a quarter
    assert max(steps) - min(steps) <= 1
    total = torch.zeros(3 * length)
    for start, weights in zip(tiles.starts, tiles.weights, strict=True):
        total[3 * start : 3 * (start + size)] += weights
        assert weights.min() > 0
    torch.testing.assert_close(total, torch.ones_like(total))


def vae_of(decode: Callable[[dict[str, Tensor]], dict[str, Tensor]], device: torch.device = CPU) -> VAE:
    """Its decoder does this, and its latents are of the variance that it takes."""
    engine: Any = Mock(side_effect=decode, device=device)
    return VAE(engine, engine, torch.float32, 1.0, 4, 8)


def local_vae(seen: list[tuple[int, ...]]) -> VAE:
    """Its decoder does nothing but enlarge."""

    def decoder(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["latents"]
        seen.append(tuple(x.shape))
        return {"image": F.interpolate(x[:, :3], scale_factor=8)}

    return replace(vae_of(decoder), scaling_factor=0.5)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (17, 100), (9, 33), (100, 12)])
def test_a_decoder_that_looks_at_nothing_else_makes_the_same_picture(height: int, width: int) -> None:
    """A corner, an edge or a weight in the wrong place would show."""
    latents = 0.4 * torch.rand(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    whole = local_vae([]).decode(latents)
    torch.testing.assert_close(local_vae([]).decode(latents, tile=16), whole, rtol=0, atol=VAE_TILES_LOCAL)


def test_the_decoder_s_work_is_that_of_a_tile_whatever_the_picture_s_size() -> None:
    """And of one shape, so that one recording serves them all."""
    for side in (20, 100, 128):
        seen: list[tuple[int, ...]] = []
        local_vae(seen).decode(torch.zeros(1, 4, side, side + 1), tile=16)
        assert set(seen) == {(1, 4, 16, 16)}
        assert len(seen) >= (side / 16) ** 2


@pytest.fixture(scope="module")
def tiny_vae(tiny: Callable[..., Path]) -> Callable[[bool], VAE]:
    def load(graphs: bool) -> VAE:
        return load_vae(
            open_checkpoint(tiny("sdxl")), EngineLoader("eager", CPU, torch.float32, None, graphs)
        )

    return load


def smooth(height: int, width: int) -> Tensor:
    """Latents without detail: a seam would be the sharpest thing in their picture."""
    coarse = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(4))
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)


def test_seams() -> None:
    """From a pixel to its neighbour nothing jumps that does not in the picture decoded whole."""

    def decoder(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["latents"][:, :3]
        for _ in range(3):
            x = F.conv2d(x, torch.full((3, 1, 3, 3), 1 / 9), padding=1, groups=3)
        return {"image": F.interpolate(x, scale_factor=8, mode="bilinear")}

    vae, latents = vae_of(decoder), smooth(40, 48)
    whole, tiled = vae.decode(latents), vae.decode(latents, tile=16)
    assert (tiled - whole).abs().max() <= VAE_TILES
    for dim in (-2, -1):
        jumps = [image.diff(dim=dim).abs().max() for image in (tiled, whole)]
        assert jumps[0] <= 1.01 * jumps[1]


def test_one_tile_that_covers_all_is_exact(tiny_vae: Callable[[bool], VAE]) -> None:
    vae, latents = tiny_vae(False), smooth(12, 16)
    assert vae.decode(latents, tile=16).equal(vae.decode(latents))


def test_all_tiles_are_one_recording(tiny_vae: Callable[[bool], VAE], captures: list[str]) -> None:
    vae, latents = tiny_vae(True), smooth(12, 20)
    vae.capture_decode(96, 160, tile=8)
    assert captures == ["vae_decoder"]
    tiled = vae.decode(latents, tile=8)
    assert captures == ["vae_decoder"]
    assert tiled.equal(tiny_vae(False).decode(latents, tile=8))


def test_a_vae_on_another_device_decodes_in_tiles_there() -> None:
    """One that is shared stays where its pipeline is, and pictures decoded whole are there too."""

    def decode(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"image": torch.empty(1, 3, *(8 * n for n in inputs["latents"].shape[-2:]), device="meta")}

    vae = vae_of(decode, torch.device("meta"))
    for tile in (None, 8):
        assert vae.decode(torch.zeros(1, 4, 9, 20), tile=tile).device.type == "meta"


def test_a_tile_too_small_is_refused() -> None:
    with pytest.raises(RequestError, match="tile is 4 latents; a VAE's tile has at least 8"):
        local_vae([]).decode(torch.zeros(1, 4, 9, 9), tile=4)
