"""Judges the pictures of a case's sides: which side they are compared with, how alike they are, and by which gate."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ..errors import BenchmarkError
from .features import MetricNetworks
from .gates import Gate, Quality, likeness, measure_quality
from .side import Images, Pictures, as_bytes, as_float
from .side_run import SideRun

__all__ = ["Judge"]

_MAX_FLOAT_PICTURES = 256
"""More pictures of a side than this are stored and compared as bytes, in a quarter of the memory."""
_REPORT_PICTURES = 16
"""With more than `_MAX_FLOAT_PICTURES`, only so many of a side are stored for the report."""


class Judge:
    """What is known of the pictures of a case.

    Attributes:
        reference: the side whose pictures the others' are compared with; None until a side has finite ones.
    """

    def __init__(
        self, gate: Gate, networks: MetricNetworks, prompts: Sequence[str], eager_sides: Collection[str]
    ) -> None:
        """
        Args:
            prompts: of each picture that a side generates for the gate.
            eager_sides: names of those that run eager PyTorch.
        """
        self.reference: SideRun | None = None
        self._gate = gate
        self._networks = networks
        self._prompts = prompts
        self._eager_sides = eager_sides
        # dtype -> the quality that eager PyTorch reaches in it.
        self._eager_quality: dict[str, Quality] = {}

    @property
    def _many(self) -> bool:
        return len(self._prompts) > _MAX_FLOAT_PICTURES

    def shown(self, images: Pictures) -> Images:
        """Those of a side's pictures that are for the report."""
        count = _REPORT_PICTURES if self._many else len(self._prompts)
        return as_float(images[:count]).astype(np.float32)

    def compact(self, images: Images) -> Pictures:
        """Images in the form in which they are stored: as bytes if there are many.

        Raises:
            BenchmarkError: pictures that are to be bytes are not finite, which bytes would hide.
        """
        if not self._many:
            return images
        if not np.isfinite(images).all():
            raise BenchmarkError("a picture is not finite")
        return np.stack(as_bytes(images))

    def choose_reference(self, sides: Sequence[SideRun]) -> None:
        """Take the reference from `sides`, if there is none yet and one of them has finite pictures.

        Eager PyTorch in float32 is preferred, then other eager PyTorch, then the first side that ran. Also notes the
        quality that eager sides reach.
        """
        # A side that was checked in an earlier group may have few of its pictures left.
        unchecked = [side for side in sides if side.status == "measured" and side.quality is None]
        finite = [side for side in unchecked if side.images is not None and np.isfinite(side.images).all()]
        exact = [side for side in finite if side.job.dtype == "float32"]
        self.reference = self.reference or next(iter([*exact, *finite]), None)
        for side in finite:
            if side.name in self._eager_sides and side.images is not None:
                found = likeness(side.images, self._reference_images())
                self._eager_quality[side.job.dtype] = Quality(len(side.images), *found)

    def failures(self, side: SideRun, images: Images) -> list[str]:
        """Measure the quality of a side's pictures; the limits that they exceed. Of many pictures, only those for the
        report are kept then."""
        # Without a reference this side's pictures are not finite, and fail even beside themselves.
        reference = images if self.reference is None else self._reference_images()
        side.quality = measure_quality(images, reference, self._prompts, self._networks)
        if self._many and side is not self.reference:
            side.images = images[:_REPORT_PICTURES].copy()
        return self._judged(side, side.quality)

    def failures_while_timed(self, side: SideRun, images: Images, batch: int, first: int) -> list[str]:
        """Compare timed pictures with the reference's from number `first` on; the limits that they exceed. A side may
        be right alone and wrong in a batch."""
        found = likeness(self.compact(images), self._reference_images()[first : first + batch])
        worst = side.worst_likeness.get(batch, found)
        side.worst_likeness[batch] = (min(found[0], worst[0]), min(found[1], worst[1]))
        return self._judged(side, Quality(batch, *found)) if self._gate.of_each_picture else []

    def _reference_images(self) -> Pictures:
        if self.reference is None or self.reference.images is None:
            raise AssertionError("there is a reference as soon as a side has finite pictures")
        return self.reference.images

    def _judged(self, side: SideRun, quality: Quality) -> list[str]:
        return self._gate.judge(quality, side.job.dtype, self._eager_quality.get(side.job.dtype))
