"""The protocol of R-RefCOCO, R-RefCOCO+ and R-RefCOCOg."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dcris.data.transforms import Resize, Transform
from dcris.evaluation.metrics import MIOU, OIOU, PRECISION_THRESHOLDS, Metric, Overlaps, of_targets, precision
from dcris.evaluation.none_rules import ANY_PIXEL, NoneRule
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix

_SIDE = 480


def _share(chosen: NDArray[np.bool_], overlaps: Overlaps) -> Floats:
    """Return the weight of each chosen expression in the mean over the chosen ones of its
    reference; 0 for the others."""
    return np.asarray(chosen / np.maximum(overlaps.sum_of_group(chosen), 1), np.float64)


def _robust_iou(overlaps: Overlaps) -> Floats:
    """Return a reference's rIoU, divided among its expressions with a target.

    The pixels of false positives are those of the union, since the truth is empty.
    """
    shared = overlaps.sum_of_group(overlaps.intersection * overlaps.target)
    covered = overlaps.sum_of_group(overlaps.union)
    return shared / np.maximum(covered, 1) * _share(overlaps.target, overlaps)


_RIOU = Metric(
    "riou",
    "rIoU",
    _robust_iou,
    lambda overlaps: _share(overlaps.target, overlaps),
    "Sum of the intersections of a reference over the sum of its unions and the pixels predicted for its expressions "
    "without a target; averaged over the references.",
)
_MRR = Metric(
    "mrr",
    "mRR",
    lambda overlaps: overlaps.none * _share(~overlaps.target, overlaps),
    lambda overlaps: _share(~overlaps.target, overlaps),
    "Share of a reference's expressions without a target for which the prediction says none; averaged over the references.",
)
_MIOU = replace(
    MIOU,
    value=lambda overlaps: overlaps.iou * _share(overlaps.target, overlaps),
    weight=lambda overlaps: _share(overlaps.target, overlaps),
    description="Intersection over union, averaged over a reference's expressions with a target, then over the references.",
)


@dataclass(frozen=True)
class RRefcoco(Protocol):
    """Protocol of R-RefCOCO (RefSegformer): IoU on the image's own pixels, with references in which
    some expressions have no target.

    Logits are interpolated bilinearly to a square of 480 pixels and then to the image's size, both
    with corners aligned. Expressions without a target are measured on the square. A reference
    without expressions of one kind is left out of the means over this kind. Precision is the share
    of the expressions with a target whose IoU is at least the limit; the authors' code compares the
    limit with a running sum instead. Source: utils/validation.py, dataset/ReferDataset.py and
    model/refsegformer.py of robust-ref-seg.
    """

    threshold: float = 0.5
    none_rule: NoneRule | None = ANY_PIXEL
    name = "rrefcoco"
    transform = Resize
    metrics = (
        _RIOU,
        _MRR,
        _MIOU,
        of_targets(OIOU),
        *(of_targets(precision(limit, inclusive=True)) for limit in PRECISION_THRESHOLDS),
    )
    interpolate_logits = True
    sums_polygons = True

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        to_square = _WithoutTarget.resampling(transform, grid)
        rows, columns = (
            resize_matrix(_SIDE, length, "bilinear", align_corners=True) @ matrix
            for length, matrix in zip(transform.size, to_square, strict=True)
        )
        return rows, columns

    def for_target(self, target: bool) -> Protocol:  # noqa: D102
        return self if target else _WithoutTarget(self.threshold, self.none_rule)


class _WithoutTarget(RRefcoco):
    """The part of the protocol for expressions without a target."""

    canvas = _SIDE

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:
        rows, columns = (resize_matrix(cells, _SIDE, "bilinear", align_corners=True) for cells in grid)
        return rows, columns

    def for_target(self, target: bool) -> Protocol:
        return RRefcoco(self.threshold, self.none_rule).for_target(target)
