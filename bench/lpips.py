"""LPIPS, the perceptual distance between two pictures, over AlexNet's features (Zhang et al. 2018, "The Unreasonable
Effectiveness of Deep Features as a Perceptual Metric", version 0.1).

torchmetrics ships the weights of its linear layers, but would download AlexNet's with torchvision. Here AlexNet's
weights are read from a file, such as `alexnet-owt-7be5be79.pth`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendUnavailableError, RequestError
from .inception import read_tensors

__all__ = ["Lpips"]

_LAYERS = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))
"""(number in torchvision's `features`, stride, padding) of each convolution."""
_SHRINK_BEFORE = (3, 6)
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class Lpips:
    """LPIPS with AlexNet's weights from a file.

    Raises:
        RequestError: the file holds other weights.
        BackendUnavailableError: torchmetrics is not installed.
    """

    def __init__(self, file: Path) -> None:
        try:
            import torchmetrics.functional.image.lpips as shipped
        except ImportError as error:
            raise BackendUnavailableError(
                'torchmetrics is not installed, which has the weights of LPIPS; pip install "latentrt[bench]"'
            ) from error
        self.name = f"AlexNet ({file.name})"
        tensors = {
            name.removeprefix("features."): value.float() for name, value in read_tensors(file).items()
        }
        expected = [f"{layer}.{part}" for layer, _, _ in _LAYERS for part in ("weight", "bias")]
        missing = [name for name in expected if name not in tensors]
        if missing:
            raise RequestError(f"{file} is not AlexNet: features.{missing[0]} is missing")
        self._weights = {name: tensors[name] for name in expected}
        heads = read_tensors(Path(shipped.__file__).parent / "lpips_models" / "alex.pth")
        self._heads = [heads[f"lin{k}.model.1.weight"] for k in range(len(_LAYERS))]

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> float:
        """Distance between two pictures [1, 3, H, W] in [0, 1]; 0 if they are equal."""
        total = 0.0
        for head, x, y in zip(self._heads, self._features(a), self._features(b), strict=True):
            total += float(F.conv2d((x - y) ** 2, head).mean())
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        """Features [1, C, h, w] of each layer, normalised to length 1 over the channels."""
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        x = (2 * x.float() - 1 - shift) / scale
        features = []
        for layer, stride, padding in _LAYERS:
            if layer in _SHRINK_BEFORE:
                x = F.max_pool2d(x, 3, 2)
            weight, bias = (self._weights[f"{layer}.{part}"] for part in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            features.append(x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt())
        return features
