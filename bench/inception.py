"""Inception-v3 as FID is defined over it, from a file of its weights.

Source: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", in the form of the network
that FID was published with (Heusel et al. 2017): average pooling leaves the padding out, and the last block takes the
maximum. The keys are those of `pt_inception-2015-12-05-6726825d.pth`, which torch-fidelity and pytorch-fid read and
MLPerf uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import RequestError
from .quality import Features

__all__ = ["Inception", "InceptionFeatures", "read_tensors"]

_SIDE = 299
_BATCH = 16

_Kernel = int | tuple[int, int]
_Conv = tuple[str, int, _Kernel, int]
"""(name, channels out, kernel, stride). A stride of 1 is padded to keep the size, a stride of 2 is not padded, and a
stride of 0 means 1 without padding."""
_Branch = tuple[_Conv | str, ...]
"""Convolutions in sequence; `average`, `maximum` and `shrink` are poolings. Two convolutions whose names end in `a` and
`b`, such as `x_2a` and `x_2b`, run in parallel on the same input, and their outputs are concatenated."""


def _a(pool: int) -> tuple[_Branch, ...]:
    return (
        (("branch1x1", 64, 1, 1),),
        (("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)),
        (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)),
        ("average", ("branch_pool", pool, 1, 1)),
    )


def _c(inner: int) -> tuple[_Branch, ...]:
    wide, high = (1, 7), (7, 1)
    return (
        (("branch1x1", 192, 1, 1),),
        (("branch7x7_1", inner, 1, 1), ("branch7x7_2", inner, wide, 1), ("branch7x7_3", 192, high, 1)),
        (
            ("branch7x7dbl_1", inner, 1, 1),
            ("branch7x7dbl_2", inner, high, 1),
            ("branch7x7dbl_3", inner, wide, 1),
            ("branch7x7dbl_4", inner, high, 1),
            ("branch7x7dbl_5", 192, wide, 1),
        ),
        ("average", ("branch_pool", 192, 1, 1)),
    )


def _e(pool: str) -> tuple[_Branch, ...]:
    wide, high = (1, 3), (3, 1)
    return (
        (("branch1x1", 320, 1, 1),),
        (("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, wide, 1), ("branch3x3_2b", 384, high, 1)),
        (
            ("branch3x3dbl_1", 448, 1, 1),
            ("branch3x3dbl_2", 384, 3, 1),
            ("branch3x3dbl_3a", 384, wide, 1),
            ("branch3x3dbl_3b", 384, high, 1),
        ),
        (pool, ("branch_pool", 192, 1, 1)),
    )


_STEM: tuple[_Conv | str, ...] = (
    ("Conv2d_1a_3x3", 32, 3, 2),
    ("Conv2d_2a_3x3", 32, 3, 0),
    ("Conv2d_2b_3x3", 64, 3, 1),
    "shrink",
    ("Conv2d_3b_1x1", 80, 1, 1),
    ("Conv2d_4a_3x3", 192, 3, 0),
    "shrink",
)
_BLOCKS: Mapping[str, tuple[_Branch, ...]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": (
        (("branch3x3", 384, 3, 2),),
        (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)),
        ("shrink",),
    ),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": (
        (("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)),
        (
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ),
        ("shrink",),
    ),
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}


class _Convolution(nn.Module):
    def __init__(self, channels: int, out: int, kernel: _Kernel, stride: int) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, out, size, max(1, stride), padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side, on [B, C, H, W]."""

    def __init__(self, channels: int, branches: Sequence[_Branch]) -> None:
        super().__init__()
        self._branches = branches
        self.channels = 0
        for branch in branches:
            width, before = channels, channels
            for step in branch:
                if isinstance(step, str):
                    continue
                name, out, kernel, stride = step
                second = name.endswith("b")
                before, width = (before, width + out) if second else (width, out)
                self.add_module(name, _Convolution(before, out, kernel, stride))
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(branch, x) for branch in self._branches], dim=1)

    def _branch(self, branch: _Branch, x: Tensor) -> Tensor:
        before = x
        for step in branch:
            if isinstance(step, str):
                x = _pool(step, x)
            elif step[0].endswith("b"):
                x = torch.cat([x, self.get_submodule(step[0])(before)], dim=1)
            else:
                before, x = x, self.get_submodule(step[0])(x)
        return x


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "average":
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return F.max_pool2d(x, 3, 1, 1) if kind == "maximum" else F.max_pool2d(x, 3, 2)


class Inception(nn.Module):
    """[B, 3, 299, 299] in [-1, 1] -> [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for step in _STEM:
            if not isinstance(step, str):
                name, out, kernel, stride = step
                self.add_module(name, _Convolution(channels, out, kernel, stride))
                channels = out
        for name, branches in _BLOCKS.items():
            block = _Mixed(channels, branches)
            self.add_module(name, block)
            channels = block.channels

    def forward(self, x: Tensor) -> Tensor:
        for step in _STEM:
            x = _pool(step, x) if isinstance(step, str) else self.get_submodule(step[0])(x)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


class InceptionFeatures:
    """The features that FID compares, with weights from a file.

    Raises:
        RequestError: the file holds other weights.
    """

    def __init__(self, file: Path) -> None:
        self.name = f"Inception-v3 ({file.name})"
        self._network = Inception().eval()
        tensors = {k: v.float() for k, v in read_tensors(file).items() if not k.startswith(("fc.", "Aux"))}
        expected = {k for k in self._network.state_dict() if not k.endswith("num_batches_tracked")}
        missing = sorted(expected - tensors.keys())
        if missing:
            raise RequestError(
                f"{file} is not Inception-v3 for FID: {missing[0]} and {len(missing) - 1} more tensors are missing"
            )
        self._network.load_state_dict({k: tensors[k] for k in expected}, strict=False)

    @torch.no_grad()
    def features(self, pictures: Sequence[NDArray[np.uint8]]) -> Features:
        """Features [N, 2048] of uint8 pictures [H, W, 3] of one size, which are resized as in pytorch-fid."""
        rows = []
        for k in range(0, len(pictures), _BATCH):
            x = torch.from_numpy(np.stack(pictures[k : k + _BATCH])).permute(0, 3, 1, 2).float() / 255
            x = F.interpolate(x, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
            rows.append(self._network(2 * x - 1).double().numpy())
        return np.concatenate(rows)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file, or from PyTorch's own format without executing code from it.

    Raises:
        RequestError: the file is neither.
    """
    if not file.is_file():
        raise RequestError(f"{file} is no file; give one of weights, .safetensors or PyTorch's .pth")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RequestError(f"{file} cannot be read as weights: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RequestError(f"{file} holds no state dict; give one of weights, .safetensors or PyTorch's .pth")
    return tensors
