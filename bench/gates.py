"""Decides whether a side's pictures are close enough to the reference for its speed to be reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from ..errors import RequestError
from ..export.measures import MAX_PSNR, psnr, ssim
from ..export.verify import LIMITS
from .cases import DTYPES, MLPERF, Case
from .features import MetricNetworks
from .lpips import Lpips
from .quality import frechet_distance, pictures_for_fid
from .side import Images, Picture, Pictures, as_bytes, as_float

__all__ = ["GATES", "Gate", "Quality", "gate_named", "likeness", "measure_quality"]

_MIN_EAGER_PSNR = 20.0
"""In dB. Eager PyTorch in half precision that is further from float32 than this is wrong itself, and sets no limit."""
_PSNR_MARGIN = 3.0
"""In dB below eager PyTorch in the same dtype: twice its squared error, for rounding in another order."""
_SSIM_MARGIN = 0.02


@dataclass(frozen=True)
class Quality:
    """The quality of a side's pictures, compared with the reference's of the same prompts and seeds.

    Attributes:
        pictures: how many were compared.
        psnr: of the worst picture, in dB.
        ssim: of the worst picture.
        lpips: of the worst picture.
        clip: mean CLIP score.
        clip_reference: the same of the reference's pictures.
        fid: FID to true pictures, if there are enough pictures for it (`pictures_for_fid`).
        fid_reference: the same of the reference's pictures.
        lpips_by, clip_by, fid_by: names of the networks that these were measured by.
    """

    pictures: int
    psnr: float
    ssim: float
    lpips: float | None = None
    lpips_by: str | None = None
    clip: float | None = None
    clip_reference: float | None = None
    clip_by: str | None = None
    fid: float | None = None
    fid_reference: float | None = None
    fid_by: str | None = None


def likeness(images: Pictures, reference: Pictures) -> tuple[float, float]:
    """PSNR in dB and SSIM of the worst picture, as `latentrt verify` measures them.

    Equal pictures have 200 dB. If pictures are not finite, or differ in size, the result is minus infinity and -1.
    """
    if images.shape != reference.shape:
        return float("-inf"), -1.0
    worst_psnr, worst_ssim = MAX_PSNR, 1.0
    for pair in zip(images, reference, strict=True):
        if not all(np.isfinite(picture).all() for picture in pair):
            return float("-inf"), -1.0
        a, b = (torch.from_numpy(as_float(picture).transpose(2, 0, 1)[None]) for picture in pair)
        worst_psnr, worst_ssim = min(worst_psnr, psnr(a, b, peak=1.0)), min(worst_ssim, ssim(a, b))
    return worst_psnr, worst_ssim


def measure_quality(
    images: Pictures, reference: Pictures, prompts: Sequence[str], networks: MetricNetworks
) -> Quality:
    """Compare pictures [N, H, W, 3] with the reference's, by every metric that has a network."""
    ratio, similarity = likeness(images, reference)
    quality = Quality(len(images), ratio, similarity)
    if ratio == float("-inf"):  # not finite, or of another size
        return quality
    both = [
        list(cast(Picture, x)) if x.dtype == np.uint8 else as_bytes(cast(Images, x))
        for x in (images, reference)
    ]
    if networks.lpips is not None:
        quality = replace(
            quality, lpips=_worst_lpips(networks.lpips, images, reference), lpips_by=networks.lpips.name
        )
    if networks.clip is not None:
        scores = [float(networks.clip.scores(pictures, prompts).mean()) for pictures in both]
        quality = replace(quality, clip=scores[0], clip_reference=scores[1], clip_by=networks.clip.name)
    truth = networks.truth
    if networks.fid is not None and truth is not None and len(images) >= pictures_for_fid(len(truth.mean)):
        fids = [frechet_distance(truth, networks.fid.features(pictures)) for pictures in both]
        quality = replace(quality, fid=fids[0], fid_reference=fids[1], fid_by=networks.fid.name)
    return quality


def _worst_lpips(lpips: Lpips, images: Pictures, reference: Pictures) -> float:
    """LPIPS of the worst picture."""
    return max(
        lpips(*(torch.from_numpy(as_float(x).transpose(2, 0, 1)[None].astype(np.float32)) for x in pair))
        for pair in zip(images, reference, strict=True)
    )


@dataclass(frozen=True)
class Gate:
    """A check that a side's pictures have to pass, so that its speed is reported.

    Attributes:
        of_each_picture: it works on any number of pictures, and so is applied to those of timed runs too.
        judge: (a side's quality, its dtype, the quality of eager PyTorch in that dtype or None if it did not run) ->
            the limits that are exceeded; empty if it passes.
        required_settings: settings of the run that it cannot work without.
        min_pictures: how many it needs.
        required_case: field -> the value that a case must have.
        networks: metric -> how the name of its network must begin.
    """

    name: str
    summary: str
    of_each_picture: bool
    judge: Callable[[Quality, str, Quality | None], list[str]]
    required_settings: tuple[str, ...] = ()
    min_pictures: int = 1
    required_case: Mapping[str, Any] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, case: Case, networks: MetricNetworks) -> str:
        """Why it cannot be applied to a case; empty if it can. For checks before anything is measured."""
        for name, value in self.required_case.items():
            if getattr(case, name) != value:
                return f"{name} is {getattr(case, name)!r}, and it judges {value!r}"
        for name, network in self.networks.items():
            given = getattr(networks, name)
            if given is None:
                return f"{name} is not measured; leave --metric out"
            if not given.name.startswith(network):
                return f"{name} would be by {given.name}, and it judges {network}'s"
        return ""


def _like_eager(quality: Quality, dtype: str, eager: Quality | None) -> list[str]:
    """The limits of `latentrt verify`. In half precision they are lowered to a margin below what eager PyTorch in that
    dtype reaches itself."""
    limits = LIMITS["pipeline"][DTYPES[dtype]]
    least, min_ssim = limits.psnr, limits.ssim or 0.0
    # If eager PyTorch's own pictures were nonsense, any picture would pass.
    if dtype != "float32" and eager is not None and eager.psnr >= _MIN_EAGER_PSNR:
        least, min_ssim = min(least, eager.psnr - _PSNR_MARGIN), min(min_ssim, eager.ssim - _SSIM_MARGIN)
    failures = []
    if not quality.psnr >= least:  # so that nan fails
        failures.append(f"PSNR {quality.psnr:.1f} dB, at least {least:.1f}")
    if not quality.ssim >= min_ssim:
        failures.append(f"SSIM {quality.ssim:.4f}, at least {min_ssim:.4f}")
    return failures


_MLPERF = {
    "clip": ("CLIP score", 31.68631873, 31.81331801, "CLIP ViT-B/32"),
    "fid": ("FID", 23.01085758, 23.95007626, "Inception-v3"),
}
_MLPERF_PICTURES = 5000


def _mlperf(quality: Quality, dtype: str, eager: Quality | None) -> list[str]:
    """MLPerf inference's accuracy limits of stable-diffusion-xl, over its 5,000 captions and its networks."""
    failures = []
    if quality.pictures < _MLPERF_PICTURES:
        failures.append(f"cannot be judged: {quality.pictures} pictures, MLPerf has {_MLPERF_PICTURES}")
    for metric, (name, low, high, network) in _MLPERF.items():
        value, by = getattr(quality, metric), getattr(quality, f"{metric}_by")
        if value is None:
            failures.append(f"cannot be judged: {name} was not measured")
        elif not by.startswith(network):
            failures.append(f"cannot be judged: {name} is by {by}, MLPerf's by {network}")
        elif not low <= value <= high:
            failures.append(f"{name} {value:.3f}, {low:.3f} to {high:.3f}")
    return failures


_ROWS = (
    Gate(
        "eager",
        "the same picture as eager PyTorch (diffusers' where it is), by PSNR and SSIM",
        True,
        _like_eager,
    ),
    Gate(
        "mlperf",
        "MLPerf's CLIP score and FID over its 5,000 captions; needs --prompts, --clip, --inception and --truth",
        False,
        _mlperf,
        required_settings=("clip", "inception", "truth"),
        min_pictures=_MLPERF_PICTURES,
        required_case={**MLPERF, "refiner": None, "size": (1024, 1024)},
        networks={metric: network for metric, (*_, network) in _MLPERF.items()},
    ),
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
