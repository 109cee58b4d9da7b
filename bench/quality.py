"""CLIP score and FID, and the demo's image tower that they can be measured with.

The tower is a small convolutional network, trained contrastively against the demo's text encoders on pictures of the
demo's world. So its figures compare demo models with each other, and with nothing else.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Features = NDArray[np.float64]
"""[N, F]: a row for each picture."""


class ImageTower(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> an embedding in the text's space, and features of several depths."""

    def __init__(self, channels: Sequence[int] = (16, 32, 64, 128), embedding: int = 128) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "embedding": embedding}
        widths = [3, *channels]
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 5 if k == 0 else 3, stride=2, padding=2 if k == 0 else 1)
            for k, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norm = nn.ModuleList(nn.GroupNorm(8, c) for c in channels)
        self.refine = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels[3:])
        last = channels[-1]
        # With two channels of coordinates: relations between objects depend on their positions.
        self.place = nn.Conv2d(last + 2, 2 * last, 1)
        self.head = nn.Sequential(nn.Linear(2 * last, 2 * last), nn.GELU(), nn.Linear(2 * last, embedding))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> FID features [B, F], pooled placed map [B, 2C].

        The features are means of the deeper maps, which depend on what is shown, and standard deviations of the
        shallower ones, which depend on sharpness: means alone hardly change when a picture is blurred.
        """
        moments = []
        for k, (down, norm) in enumerate(zip(self.down, self.norm, strict=True)):
            x = F.gelu(norm(down(x)))
            if k >= 3:
                x = x + F.gelu(self.refine[k - 3](x))
            if k >= 1:
                moments.append(x.mean(dim=(2, 3)))
            if k <= 2:
                moments.append(x.std(dim=(2, 3)))
        batch, _, height, width = x.shape
        ys = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype).view(1, 1, -1, 1)
        xs = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype).view(1, 1, 1, -1)
        place = torch.cat([ys.expand(batch, 1, height, width), xs.expand(batch, 1, height, width)], dim=1)
        pooled = F.gelu(self.place(torch.cat([x, place], dim=1))).mean(dim=(2, 3))
        return torch.cat([*moments, pooled], dim=1), pooled

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> embedding [B, E], not normalised."""
        embedding: Tensor = self.head(self.features(x)[1])
        return embedding

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (fp16)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        state = {k: v.detach().half().contiguous().cpu() for k, v in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> ImageTower:
        """Read what `save` wrote, in float32."""
        tower = cls(**json.loads((folder / "config.json").read_text()))
        tower.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return tower.eval()


def as_input(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 pictures [H, W, 3] of one size -> [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures).astype(np.float32) / 127.5 - 1.0).permute(0, 3, 1, 2)


@torch.no_grad()
def fid_features(tower: ImageTower, pictures: Sequence[NDArray[np.uint8]], batch: int = 50) -> Features:
    """Features [N, F] of pictures of one size."""
    parts = [
        tower.features(as_input(pictures[k : k + batch]))[0].double().numpy()
        for k in range(0, len(pictures), batch)
    ]
    return np.concatenate(parts)


@torch.no_grad()
def clip_scores(
    tower: ImageTower, pictures: Sequence[NDArray[np.uint8]], text: Tensor
) -> NDArray[np.float64]:
    """CLIP score: 100 x the cosine of each picture's embedding with its text embedding [N, E] of the second encoder."""
    image = F.normalize(tower(as_input(pictures)), dim=-1)
    scores: NDArray[np.float64] = (100 * (image * F.normalize(text.float(), dim=-1)).sum(-1)).double().numpy()
    return scores


@dataclass(frozen=True)
class Moments:
    """The statistics of a set of pictures that FID compares.

    Attributes:
        mean: of the features, [F].
        covariance: of the features, [F, F].
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: Features) -> Moments:
        """From features [N, F]."""
        return cls(features.mean(0), np.cov(features, rowvar=False))


def pictures_for_fid(features: int) -> int:
    """The least number of pictures for FID over so many features.

    With fewer, the covariance is singular, and the distance depends on their number more than on what they show. For
    example, two samples of 56 from one normal distribution over 592 features have 860, and the true distance is 0.
    """
    return features + 1


def frechet_distance(a: Features | Moments, b: Features | Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, equation 6)."""
    a, b = (x if isinstance(x, Moments) else Moments.of(x) for x in (a, b))
    mean = a.mean - b.mean
    # tr (C_a C_b)^(1/2) from the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2)
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    return float(mean @ mean + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def fid_difference(
    reference: Features, a: Features, b: Features, *, seed: int, rounds: int = 200
) -> tuple[float, float, float]:
    """FID(a) - FID(b) with its 95 % bootstrap interval; rows of a and b are paired (same prompt and seed)."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(rounds):
        rows = rng.integers(len(a), size=len(a))
        truth = reference[rng.integers(len(reference), size=len(reference))]
        draws.append(frechet_distance(truth, a[rows]) - frechet_distance(truth, b[rows]))
    difference = frechet_distance(reference, a) - frechet_distance(reference, b)
    low, high = np.quantile(draws, [0.025, 0.975])
    return difference, float(low), float(high)
