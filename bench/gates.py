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
from .features import Judges
from .lpips import Lpips
from .quality import frechet_distance, pictures_for_fid
from .side import Images, Picture, Pictures, as_bytes, as_float

__all__ = ["GATES", "Gate", "Quality", "gate_named", "likeness", "measure_quality"]

_LEAST_DB = 20.0  # of eager PyTorch in half precision; below it there is something wrong with itself
_WORSE_DB = 3.0
"""Twice the squared error of eager PyTorch in the same dtype: what rounding in another order may cost."""
_WORSE_SSIM = 0.02


@dataclass(frozen=True)
class Quality:
    """Of `pictures` pictures, beside the reference's of the same prompts and seeds.

    Attributes:
        psnr: of the worst picture, in dB.
        ssim: of the worst picture.
        lpips: of the worst picture.
        clip: mean CLIP score.
        clip_reference: the same of the reference's pictures.
        fid: to true pictures, if there are enough of them (`pictures_for_fid`).
        fid_reference: the same of the reference's pictures.
        lpips_by, clip_by, fid_by: the networks.
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
    """PSNR in dB and SSIM of the worst picture, by the measures that the limits of `latentrt verify` were set by; equal
    pictures have 200 dB. Where one or the other is not finite it is minus infinity and -1."""
    if images.shape != reference.shape:
        return float("-inf"), -1.0
    worst_psnr, worst_ssim = MAX_PSNR, 1.0
    for mine, theirs in zip(images, reference, strict=True):
        if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
            return float("-inf"), -1.0
        a, b = (torch.from_numpy(as_float(x).transpose(2, 0, 1)[None]) for x in (mine, theirs))
        worst_psnr, worst_ssim = min(worst_psnr, psnr(a, b, peak=1.0)), min(worst_ssim, ssim(a, b))
    return worst_psnr, worst_ssim


def measure_quality(images: Pictures, reference: Pictures, prompts: Sequence[str], judges: Judges) -> Quality:
    """Of pictures [N, H, W, 3] beside the reference's."""
    ratio, similarity = likeness(images, reference)
    found = Quality(len(images), ratio, similarity)
    if ratio == float("-inf"):  # not finite, or of another size
        return found
    mine, theirs = (
        list(cast(Picture, x)) if x.dtype == np.uint8 else as_bytes(cast(Images, x))
        for x in (images, reference)
    )
    if judges.lpips is not None:
        found = replace(found, lpips=_unlikeness(judges.lpips, images, reference), lpips_by=judges.lpips.name)
    if judges.clip is not None:
        scores = [float(judges.clip.scores(pictures, prompts).mean()) for pictures in (mine, theirs)]
        found = replace(found, clip=scores[0], clip_reference=scores[1], clip_by=judges.clip.name)
    truth = judges.truth
    if judges.fid is not None and truth is not None and len(images) >= pictures_for_fid(len(truth.mean)):
        fids = [frechet_distance(truth, judges.fid.see(pictures)) for pictures in (mine, theirs)]
        found = replace(found, fid=fids[0], fid_reference=fids[1], fid_by=judges.fid.name)
    return found


def _unlikeness(lpips: Lpips, images: Pictures, reference: Pictures) -> float:
    """LPIPS of the worst picture."""
    return max(
        lpips(*(torch.from_numpy(as_float(x).transpose(2, 0, 1)[None].astype(np.float32)) for x in pair))
        for pair in zip(images, reference, strict=True)
    )


@dataclass(frozen=True)
class Gate:
    """What a speed has to pass.

    Attributes:
        of_each_picture: it judges any pictures beside the reference's, and so those of timed runs too.
        needs: settings without which it cannot judge.
        least_pictures: that it judges.
        asked: what a case has to ask for.
        networks: metric -> how the name of the network begins that has to judge it.
        judge: (a side's quality, its dtype, the quality of eager PyTorch in that dtype where it ran) -> what is
            beyond its limit, empty where it passes.
    """

    name: str
    summary: str
    of_each_picture: bool
    judge: Callable[[Quality, str, Quality | None], list[str]]
    needs: tuple[str, ...] = ()
    least_pictures: int = 1
    asked: Mapping[str, Any] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)

    def refuses(self, case: Case, judges: Judges) -> str:
        """Why it could not judge a case; empty where it can. Asked before anything is measured."""
        for name, value in self.asked.items():
            if getattr(case, name) != value:
                return f"{name} is {getattr(case, name)!r}, and it judges {value!r}"
        for name, network in self.networks.items():
            judge = getattr(judges, name)
            if judge is None:
                return f"{name} is not measured; leave --metric out"
            if not judge.name.startswith(network):
                return f"{name} would be by {judge.name}, and it judges {network}'s"
        return ""


def _like_eager(quality: Quality, dtype: str, eager: Quality | None) -> list[str]:
    """The limits of `latentrt verify`; in half precision, or what eager PyTorch in that dtype reaches itself."""
    limits = LIMITS["pipeline"][DTYPES[dtype]]
    least, similar = limits.psnr, limits.ssim or 0.0
    # Beside nonsense anything passes.
    if dtype != "float32" and eager is not None and eager.psnr >= _LEAST_DB:
        least, similar = min(least, eager.psnr - _WORSE_DB), min(similar, eager.ssim - _WORSE_SSIM)
    failures = []
    if not quality.psnr >= least:  # so that nan fails
        failures.append(f"PSNR {quality.psnr:.1f} dB, at least {least:.1f}")
    if not quality.ssim >= similar:
        failures.append(f"SSIM {quality.ssim:.4f}, at least {similar:.4f}")
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
        needs=("clip", "inception", "truth"),
        least_pictures=_MLPERF_PICTURES,
        asked={**MLPERF, "refiner": None, "size": (1024, 1024)},
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
