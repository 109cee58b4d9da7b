"""What judges pictures without a picture beside them: networks that see them, for CLIP score and FID.

The demo's own image tower is shipped. CLIP's weights are read from a folder in transformers' layout, where the user
has one; figures of different networks are not comparable, so each says whose it is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..errors import RequestError
from ..runtime.pipeline import Pipeline
from .demo_model.scenes import caption, random_scene, render
from .quality import Features as Matrix
from .quality import ImageTower, clip_scores, fid_features
from .side import Images, checkpoint_folder

__all__ = ["ClipFeatures", "DemoFeatures", "Features", "as_bytes", "demo_prompts", "read_pictures"]

Picture = NDArray[np.uint8]
_TRUTH = 200


class Features(Protocol):
    """A network that sees pictures.

    Attributes:
        name: whose figures these are.
        truth: features of true pictures, for FID; None where there are none to compare with.
    """

    name: str
    truth: Matrix | None

    def see(self, pictures: Sequence[Picture]) -> Matrix:
        """Features [N, F] of pictures of one size."""
        ...

    def scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> NDArray[np.float64]:
        """CLIP score of each picture with its prompt: 100 x cosine."""
        ...


class DemoFeatures:
    """The shipped image tower beside the demo's second text encoder; truth are drawn scenes."""

    def __init__(self) -> None:
        self.name = "the demo's image tower"
        self._tower = ImageTower.load(checkpoint_folder("demo") / "image_tower")
        pipe = Pipeline.from_pretrained("demo", backend="eager", device="cpu")
        if pipe.text_encoder_2 is None:
            raise AssertionError("the demo has two text encoders")
        self._encoder = pipe.text_encoder_2
        rng = random.Random("latentrt bench truth")
        self.truth: Matrix | None = self.see([render(random_scene(rng)) for _ in range(_TRUTH)])

    def see(self, pictures: Sequence[Picture]) -> Matrix:
        return fid_features(self._tower, pictures)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> NDArray[np.float64]:
        text = self._encoder.encode(list(prompts), None, torch.device("cpu")).pooled
        return clip_scores(self._tower, pictures, text)


class ClipFeatures:
    """A CLIP model from a folder in transformers' layout.

    Args:
        truth: a folder of true pictures, for FID.

    Raises:
        RequestError: the folder holds no CLIP model.
    """

    def __init__(self, folder: Path, truth: Path | None = None) -> None:
        from transformers import AutoTokenizer, CLIPModel

        if not (folder / "config.json").is_file():
            raise RequestError(
                f"{folder} has no config.json; --clip takes a CLIP model in transformers' layout"
            )
        self.name = f"CLIP ({folder.name})"
        self._model: Any = CLIPModel.from_pretrained(folder).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.truth: Matrix | None = None if truth is None else self.see(read_pictures(truth))

    @torch.no_grad()
    def see(self, pictures: Sequence[Picture]) -> Matrix:
        rows = [self._embed(pictures[k : k + 16]).double().numpy() for k in range(0, len(pictures), 16)]
        return np.concatenate(rows)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> NDArray[np.float64]:
        tokens = self._tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        text = self._model.text_projection(self._model.text_model(**tokens).pooler_output)
        image = torch.from_numpy(self.see(pictures))
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
        seen = self._model.vision_model((x - mean) / deviation).pooler_output
        embedding: torch.Tensor = self._model.visual_projection(seen)
        return embedding


def as_bytes(images: Images) -> list[Picture]:
    """Pictures in [0, 1] as they are written to files."""
    return [np.round(image * 255).clip(0, 255).astype(np.uint8) for image in images]


def read_pictures(folder: Path) -> list[Picture]:
    """The PNG and JPEG files of a folder, in the order of their names.

    Raises:
        RequestError: there are none.
    """
    import PIL.Image

    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise RequestError(f"{folder} has no PNG or JPEG pictures to take as true ones")
    return [np.asarray(PIL.Image.open(file).convert("RGB")) for file in files]


def demo_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts of the demo's world."""
    rng = random.Random(f"latentrt bench prompts {seed}")
    return [caption(rng, random_scene(rng), say_relation=True) for _ in range(count)]
