"""The networks of the metrics CLIP score, FID and LPIPS.

The demo's own image tower is shipped. CLIP's, Inception's and AlexNet's weights are read from files that the user has,
and never downloaded. Figures of different networks cannot be compared, so each is reported with its network's name.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..errors import RequestError
from ..runtime.pipeline import Pipeline
from .demo_model.scenes import caption, random_scene
from .lpips import Lpips
from .models import checkpoint_folder
from .quality import Features, ImageTower, Moments, clip_scores, pictures_for_fid
from .side import Picture

__all__ = [
    "ClipFeatures",
    "ClipNetwork",
    "DemoFeatures",
    "FidNetwork",
    "MetricNetworks",
    "demo_networks",
    "demo_prompts",
    "read_pictures",
    "read_truth",
]

_CLIP_SIZES = {(12, 768): "ViT-B", (24, 1024): "ViT-L", (32, 1280): "ViT-H"}
"""(layers, width) of the vision model -> its name."""


class FidNetwork(Protocol):
    """A network whose features FID compares. Its name is reported with the figures."""

    name: str

    def features(self, pictures: Sequence[Picture]) -> Features:
        """Features [N, F] of pictures of one size."""
        ...


class ClipNetwork(Protocol):
    """A network that computes CLIP score. Its name is reported with the figures."""

    name: str

    def scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> NDArray[np.float64]:
        """CLIP score [N] of each picture with its prompt: 100 x cosine similarity."""
        ...


@dataclass(frozen=True)
class MetricNetworks:
    """The network of each metric; a metric without one is not measured.

    Attributes:
        clip: for CLIP score.
        fid: for FID.
        truth: mean and covariance of true pictures' features, of the same network as `fid`.
        lpips: for LPIPS, beside the reference's pictures.
    """

    clip: ClipNetwork | None = None
    fid: FidNetwork | None = None
    truth: Moments | None = None
    lpips: Lpips | None = None


class DemoFeatures:
    """The shipped image tower with the demo's second text encoder, for CLIP score."""

    def __init__(self) -> None:
        self.name = "the demo's image tower"
        self._tower = ImageTower.load(checkpoint_folder("demo") / "image_tower")
        pipe = Pipeline.from_pretrained("demo", backend="eager", device="cpu")
        if pipe.text_encoder_2 is None:
            raise AssertionError("the demo has two text encoders")
        self._encoder = pipe.text_encoder_2

    @torch.no_grad()
    def scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> NDArray[np.float64]:
        text = self._encoder.encode(list(prompts), None, torch.device("cpu")).pooled
        return clip_scores(self._tower, pictures, text)


def demo_networks() -> MetricNetworks:
    """The shipped networks, for the demo's world. FID has none: it needs more pictures than a benchmark generates (see
    `demo_model/evaluate.py`)."""
    return MetricNetworks(clip=DemoFeatures())


class ClipFeatures:
    """A CLIP model from a folder in transformers' layout, for CLIP score and, without Inception's weights, for FID.

    Raises:
        RequestError: the folder holds no CLIP model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        if not (folder / "config.json").is_file():
            raise RequestError(
                f"{folder} has no config.json; --clip takes a CLIP model in transformers' layout"
            )
        try:
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise RequestError(
                f"{folder} cannot be read as a CLIP model: {str(error).splitlines()[0]}"
            ) from error
        vision = self._model.config.vision_config
        size = _CLIP_SIZES.get((vision.num_hidden_layers, vision.hidden_size), "of another size")
        self.name = f"CLIP {size}/{vision.patch_size} ({folder.name})"

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> Features:
        rows = [self._embed(pictures[k : k + 16]).double().numpy() for k in range(0, len(pictures), 16)]
        return np.concatenate(rows)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> NDArray[np.float64]:
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        text = self._model.text_projection(self._model.text_model(**tokens).pooler_output)
        image = torch.from_numpy(self.features(pictures))
        scores: NDArray[np.float64] = (100 * F.cosine_similarity(image, text.double())).numpy()
        return scores

    def _embed(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """CLIP's preprocessing (shorter side to the model's, centre, its mean and deviation), then its embedding."""
        side = self._model.config.vision_config.image_size
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        scale = side / min(x.shape[2:])
        size = [max(side, round(length * scale)) for length in x.shape[2:]]
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        x = x[:, :, top : top + side, left : left + side]
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
        pooled = self._model.vision_model((x - mean) / deviation).pooler_output
        embedding: torch.Tensor = self._model.visual_projection(pooled)
        return embedding


def read_truth(source: Path, network: FidNetwork) -> Moments:
    """FID's statistics of true pictures: of a folder of pictures, or from an `.npz` file with `mu` and `sigma`.

    Raises:
        RequestError: `source` is neither, or there are too few pictures.
    """
    if source.suffix != ".npz":
        features = network.features(read_pictures(source))
        if (least := pictures_for_fid(features.shape[1])) > len(features):
            raise RequestError(
                f"{source} has {len(features)} pictures; FID over the {features.shape[1]} features of {network.name} "
                f"needs {least} or more"
            )
        return Moments.of(features)
    try:
        with np.load(source) as stats:
            return Moments(stats["mu"].astype(np.float64), stats["sigma"].astype(np.float64))
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{source} cannot be read as FID's mu and sigma: {error}") from error


def read_pictures(folder: Path) -> list[Picture]:
    """Read the PNG and JPEG files of a folder, in the order of their names.

    Raises:
        RequestError: there are none.
    """
    import PIL.Image

    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise RequestError(f"{folder} has no PNG or JPEG pictures to take as true ones")
    return [np.asarray(PIL.Image.open(file).convert("RGB")) for file in files]


def demo_prompts(count: int, seed: int = 0) -> list[str]:
    """Random prompts of the demo's world."""
    rng = random.Random(f"latentrt bench prompts {seed}")
    return [caption(rng, random_scene(rng), say_relation=True) for _ in range(count)]
