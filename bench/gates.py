"""Whether a side's pictures are good enough for its speed to be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import RequestError
from ..export.measures import MAX_PSNR
from ..export.verify import LIMITS
from .cases import DTYPES
from .features import Features, as_bytes
from .quality import frechet_distance
from .side import Images

__all__ = ["FID_LEAST", "GATES", "Gate", "Quality", "gate_named", "likeness", "measure_quality"]

_LEAST_DB = 20.0  # of eager diffusers in half precision; below it there is something wrong with itself
_WORSE_DB = 3.0
"""Twice the squared error of eager PyTorch in the same dtype: what rounding in another order may cost."""
_WORSE_SSIM = 0.02
FID_LEAST = 50
"""Pictures below which FID is not told: of a handful, noise does not move it."""


@dataclass(frozen=True)
class Quality:
    """Of `pictures` pictures, beside the reference's of the same prompts and seeds.

    Attributes:
        psnr: of the worst picture, in dB.
        ssim: of the worst picture.
        clip: mean CLIP score.
        clip_reference: the same of the reference's pictures.
        fid: to true pictures, from `FID_LEAST` pictures on.
        fid_reference: the same of the reference's pictures.
        features: the network that clip and fid are of.
    """

    pictures: int
    psnr: float
    ssim: float
    clip: float | None = None
    clip_reference: float | None = None
    fid: float | None = None
    fid_reference: float | None = None
    features: str | None = None


def likeness(images: Images, reference: Images) -> tuple[float, float]:
    """PSNR in dB and SSIM of the worst picture, by torchmetrics; equal pictures have 200 dB. A picture that is not
    finite has minus infinity and -1."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    if images.shape != reference.shape or not np.isfinite(images).all():
        return float("-inf"), -1.0
    worst_psnr, worst_ssim = MAX_PSNR, 1.0
    for mine, theirs in zip(images, reference, strict=True):
        a, b = (torch.from_numpy(x.transpose(2, 0, 1)[None].astype(np.float64)) for x in (mine, theirs))
        worst_psnr = min(worst_psnr, float(peak_signal_noise_ratio(a, b, data_range=1.0)))
        similarity = structural_similarity_index_measure(a, b, data_range=1.0)
        worst_ssim = min(worst_ssim, float(torch.as_tensor(similarity)))
    return worst_psnr, worst_ssim


def measure_quality(
    images: Images, reference: Images, prompts: Sequence[str], features: Features | None
) -> Quality:
    """Of pictures [N, H, W, 3] beside the reference's."""
    ratio, similarity = likeness(images, reference)
    count = len(images)
    if features is None or not np.isfinite(images).all():
        return Quality(count, ratio, similarity)
    clips, fids = [], []
    for pictures in (as_bytes(images), as_bytes(reference)):
        clips.append(float(features.scores(pictures, prompts).mean()))
        if features.truth is not None and count >= FID_LEAST:
            fids.append(frechet_distance(features.truth, features.see(pictures)))
    fid, fid_reference = fids or (None, None)
    return Quality(count, ratio, similarity, clips[0], clips[1], fid, fid_reference, features.name)


@dataclass(frozen=True)
class Gate:
    """What a speed has to pass.

    Attributes:
        of_each_picture: it judges any pictures beside the reference's, and so those of timed runs too.
        judge: (a side's quality, its dtype, the quality of eager diffusers in that dtype where it ran) -> what is
            beyond its limit, empty where it passes.
    """

    name: str
    summary: str
    of_each_picture: bool
    judge: Callable[[Quality, str, Quality | None], list[str]]


def _like_eager(quality: Quality, dtype: str, eager: Quality | None) -> list[str]:
    """The limits of `latentrt verify`; in half precision, or what eager diffusers in that dtype reaches itself."""
    limits = LIMITS["pipeline"][DTYPES[dtype]]
    least, similar = limits.psnr, limits.ssim or 0.0
    if (
        dtype != "float32" and eager is not None and eager.psnr >= _LEAST_DB
    ):  # beside nonsense anything passes
        least, similar = min(least, eager.psnr - _WORSE_DB), min(similar, eager.ssim - _WORSE_SSIM)
    failures = []
    if not quality.psnr >= least:  # so that nan fails
        failures.append(f"PSNR {quality.psnr:.1f} dB, at least {least:.1f}")
    if not quality.ssim >= similar:
        failures.append(f"SSIM {quality.ssim:.4f}, at least {similar:.4f}")
    return failures


_MLPERF = {"clip": ("CLIP score", 31.68631873, 31.81331801), "fid": ("FID", 23.01085758, 23.95007626)}
_MLPERF_PICTURES = 5000


def _mlperf(quality: Quality, dtype: str, eager: Quality | None) -> list[str]:
    """MLPerf inference's accuracy limits of stable-diffusion-xl, over its 5,000 captions."""
    failures = []
    if quality.pictures < _MLPERF_PICTURES:
        failures.append(f"{quality.pictures} pictures, MLPerf judges {_MLPERF_PICTURES}")
    for field, (name, low, high) in _MLPERF.items():
        value = getattr(quality, field)
        if value is None or not low <= value <= high:
            failures.append(
                f"{name} {'not measured' if value is None else f'{value:.3f}'}, {low:.3f} to {high:.3f}"
            )
    return failures


_ROWS = (
    Gate("eager", "the same picture as eager diffusers, by PSNR and SSIM", True, _like_eager),
    Gate("mlperf", "MLPerf's CLIP score and FID over 5,000 captions", False, _mlperf),
)
GATES: Mapping[str, Gate] = {gate.name: gate for gate in _ROWS}


def gate_named(name: str) -> Gate:
    """A gate of the table.

    Raises:
        RequestError: there is no such gate.
    """
    if name not in GATES:
        raise RequestError(f"no gate {name!r}; there are {', '.join(GATES)}")
    return GATES[name]
