"""Metrics of referring image segmentation, computed from pixel counts of each expression.

Papers report two averages as "IoU"; every protocol of this package gives both:
mIoU is the mean over expressions of the intersection over union (CRIS, ETRIS, DETRIS). oIoU, also
called cIoU, is the sum of all intersections over the sum of all unions (LAVT and others), so large
objects weigh more.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import attrgetter

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcris.data.masks import mask_box
from dcris.types import MaskArray

Floats = NDArray[np.float64]

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
_BOUNDARY = 0.02
"""Width of a boundary relative to the diagonal of the image."""
CURVE_THRESHOLDS = tuple(step / 20 for step in range(1, 20))
"""Probability thresholds of the threshold curve: 0.05, 0.10, ... 0.95."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Overlap of a predicted mask with the true mask, in pixels."""

    intersection: int
    union: int
    target: bool = True
    """Whether the expression has a target. Always true in protocols without absent targets."""
    none: bool = False
    """Whether the prediction says that there is none, by the protocol's rule."""
    group: int = 0
    """Number of the reference, for metrics that first average over the expressions of one."""
    boundary_intersection: int = 0
    """Pixels in the boundaries of both masks; counted only for `BIOU`."""
    boundary_union: int = 0
    """Pixels in the boundary of either mask."""

    @property
    def iou(self) -> float:
        """Intersection over union in 0..1: 0 if both masks are empty, but 1 for a right "none"."""
        if self.none and not self.target:
            return 1.0
        return self.intersection / self.union if self.union else 0.0


_FIELDS = attrgetter("intersection", "union", "target", "none", "group", "boundary_intersection", "boundary_union")


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Overlaps of N expressions as arrays, the input of a metric.

    All arrays are [N], or [N, T] for T thresholds.
    """

    intersection: Floats
    """In pixels."""
    union: Floats
    """In pixels."""
    target: NDArray[np.bool_]
    """Whether the expression has a target."""
    none: NDArray[np.bool_]
    """Whether the prediction says that there is none."""
    group: NDArray[np.int64]
    """Number of the reference."""
    boundary_intersection: Floats
    """In pixels."""
    boundary_union: Floats
    """In pixels."""

    @classmethod
    def of(cls, overlaps: Iterable[Overlap | Sequence[Overlap]]) -> "Overlaps":
        """Collect N overlaps into arrays [N], or N sequences of T into arrays [N, T]."""
        rows = [_FIELDS(each) if isinstance(each, Overlap) else [_FIELDS(one) for one in each] for each in overlaps]
        table = np.array(rows, np.int64) if rows else np.zeros((0, 7), np.int64)
        intersection, union, target, none, group, *boundary = np.moveaxis(table, -1, 0)
        return cls(
            intersection.astype(float),
            union.astype(float),
            target.astype(bool),
            none.astype(bool),
            group,
            *(pixels.astype(float) for pixels in boundary),
        )

    @property
    def iou(self) -> Floats:
        """Intersection over union in 0..1: 0 for two empty masks, but 1 for a right "none"."""
        iou = np.asarray(self.intersection / np.maximum(self.union, 1), np.float64)
        return np.where(self.none & ~self.target, 1.0, iou)

    def sum_of_group(self, values: NDArray[np.floating | np.bool_]) -> Floats:
        """Return for each expression the sum of values [N] or [N, T] over its reference."""
        first = self.group.reshape(len(self.group), -1)[:, :1].ravel()
        names, index = np.unique(first, return_inverse=True)
        sums = np.zeros((len(names), *values.shape[1:]))
        np.add.at(sums, index, values)
        return np.asarray(sums[index], np.float64)


@dataclass(frozen=True, slots=True)
class Score:
    """What a result file and a table call a score in percent."""

    key: str
    """Name in result files, such as "miou"."""
    title: str
    """Name in tables and reports, such as "mIoU"."""


@dataclass(frozen=True, slots=True)
class Metric(Score):
    """A score that is the mean of a value over expressions, or a ratio of two sums over them.

    Both are computed from sums over expressions, so that the bootstrap of `analysis` can resample
    images. Greater has to be better.
    """

    value: Callable[[Overlaps], NDArray[np.floating | np.bool_]]
    """Maps overlaps element by element to values in 0..1, or to the numerators of a ratio of
    sums."""
    weight: Callable[[Overlaps], Floats] | None = None
    """Maps overlaps to the denominators of a ratio of sums; None for a mean."""
    description: str = ""
    """Sentence below the score in reports."""

    def score(self, overlaps: Overlaps) -> Floats:
        """Return the score over the first axis of [N, ...] overlaps in percent; NaN where no
        expression counts."""
        values = np.asarray(self.value(overlaps), np.float64)
        weights = np.ones_like(values) if self.weight is None else self.weight(overlaps)
        return in_percent(values.sum(axis=0), weights.sum(axis=0))


def in_percent(values: Floats, weights: Floats) -> Floats:
    """Return ratios of sums in percent; NaN where the weights are 0, so that nothing counts."""
    return np.where(weights > 0, 100 * (values / np.where(weights > 0, weights, 1)), math.nan)


def known(score: float) -> float | None:
    """Return a score, or a difference of two, as result files hold it: None if nothing counts."""
    return None if math.isnan(score) else score


@cache  # equal metrics are those of one definition; see `averages` and `_averaged`
def precision(threshold: float, inclusive: bool = False) -> Metric:
    """Precision at an IoU threshold: the share of expressions whose IoU is greater.

    Args:
        threshold: IoU in 0..1.
        inclusive: also count an IoU equal to the threshold, as LAVT does.
    """
    compare = np.greater_equal if inclusive else np.greater
    description = "Share of the expressions whose IoU is above 0.5." if threshold == 0.5 else ""
    return Metric(
        f"prec@{threshold}",
        f"Prec@{threshold}",
        lambda overlaps: compare(overlaps.iou, threshold),
        description=description,
    )


MIOU = Metric(
    "miou",
    "mIoU",
    lambda overlaps: overlaps.iou,
    description="Intersection over union of the predicted and the true mask, averaged over the expressions.",
)
OIOU = Metric(
    "oiou",
    "oIoU",
    lambda overlaps: overlaps.intersection,
    lambda overlaps: overlaps.union,
    "Sum of all intersections over the sum of all unions: large objects weigh more.",
)
STANDARD_METRICS = (MIOU, OIOU, *map(precision, PRECISION_THRESHOLDS))
"""mIoU, oIoU and strict precision at 0.5 to 0.9, as the CRIS family reports them."""
INCLUSIVE_METRICS = (MIOU, OIOU, *(precision(threshold, inclusive=True) for threshold in PRECISION_THRESHOLDS))
"""The same with precision that counts equality, as LAVT reports them."""

CIOU = replace(OIOU, key="ciou", title="cIoU")
"""oIoU, as gRefCOCO's authors call it."""
GIOU = Metric(
    "giou",
    "gIoU",
    lambda overlaps: overlaps.iou,
    description="Intersection over union, averaged over all expressions. For an absent target it is 1 if the prediction "
    "says none, else 0.",
)
N_ACC = Metric(
    "n_acc",
    "N-acc",
    lambda overlaps: overlaps.none & ~overlaps.target,
    lambda overlaps: (~overlaps.target).astype(float),
    "Share of the expressions without a target for which the prediction says none.",
)
T_ACC = Metric(
    "t_acc",
    "T-acc",
    lambda overlaps: ~overlaps.none & overlaps.target,
    lambda overlaps: overlaps.target.astype(float),
    "Share of the expressions with a target for which the prediction does not say none.",
)


@cache
def of_targets(metric: Metric) -> Metric:
    """Return a metric over the expressions that have a target only."""
    value, weight = metric.value, metric.weight
    return replace(
        metric,
        value=lambda overlaps: value(overlaps) * overlaps.target,
        weight=lambda overlaps: overlaps.target * (np.ones(1) if weight is None else weight(overlaps)),
    )


BIOU = of_targets(
    Metric(
        "biou",
        "bIoU",
        lambda overlaps: overlaps.boundary_intersection / np.maximum(overlaps.boundary_union, 1),
        description="Boundary IoU: intersection over union of the pixels of both masks that are near their contours, averaged "
        "over the expressions that have a target.",
    )
)
"""Mean Boundary IoU; see `boundary`."""


def boundary(mask: MaskArray) -> MaskArray:
    """Return the pixels of a mask [H, W] bool that are near its contour, [H, W] bool.

    Near is a distance (the greater of the two axes') of at most 2% of the image's diagonal,
    rounded, but at least one pixel; outside the image there is background.

    Source: B. Cheng et al., Boundary IoU, CVPR 2021; mask_to_boundary in
    boundary_iou/utils/boundary_utils.py of boundary-iou-api, in which the IoU of a detection is the
    lesser of mask IoU and Boundary IoU; here it is Boundary IoU itself (equation 2 of the paper).
    """
    height, width = mask.shape
    distance = max(1, round(_BOUNDARY * math.sqrt(height * height + width * width)))
    found, box = np.zeros_like(mask), mask_box(mask)
    if box is None:
        return found
    # Beyond its bounding box a mask has nothing that could be near.
    left, top, across, down = box
    window = slice(top, top + down), slice(left, left + across)
    part = mask[window].astype(np.uint8)
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    inner = cv2.erode(part, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    found[window] = part != inner
    return found


def with_boundary(
    counted: Overlap, prediction: MaskArray, truth: MaskArray, ignored: MaskArray | None = None
) -> Overlap:
    """Return an overlap with the pixels of the boundaries of two masks [H, W] bool.

    The boundaries are those of the whole masks; then pixels of `ignored` are left out.
    """
    ours, theirs = boundary(prediction), boundary(truth)
    if ignored is not None:
        ours, theirs = ours[~ignored], theirs[~ignored]
    shared = int(np.count_nonzero(ours & theirs))
    both = int(np.count_nonzero(ours | theirs))
    return replace(counted, boundary_intersection=shared, boundary_union=both)


def overlap(prediction: MaskArray, truth: MaskArray, ignored: MaskArray | None = None) -> Overlap:
    """Count the pixels in the intersection and the union of two [H, W] bool masks.

    Pixels of `ignored`, [H, W] bool, are left out.

    Raises:
        ValueError: if their shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"cannot compare a mask of shape {prediction.shape} with one of shape {truth.shape}")
    if ignored is not None:
        prediction, truth = prediction[~ignored], truth[~ignored]
    intersection = int(np.count_nonzero(prediction & truth))
    return Overlap(intersection, int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth)) - intersection)


def overlap_curve(
    probabilities: Tensor, truth: Tensor, threshold: float, ignored: Tensor | None = None
) -> tuple[Overlap, ...]:
    """Count the overlap of the mask `probabilities > t` with `truth` for several thresholds t.

    The counts come from one histogram of the probabilities inside and one outside the true object,
    computed on the tensors' device.

    Args:
        probabilities: [H, W] in 0..1.
        truth: [H, W] bool.
        threshold: of the protocol.
        ignored: [H, W] bool, pixels that are left out; None for none.

    Returns:
        The overlap at `threshold`, then at each of CURVE_THRESHOLDS.
    """
    if ignored is not None:
        probabilities, truth = probabilities[~ignored], truth[~ignored]
    mask = probabilities > threshold
    steps = len(CURVE_THRESHOLDS) + 1
    bins = (probabilities * steps).ceil_().clamp_(1, steps).to(torch.uint8)  # k for (k - 1) / 20 < p <= k / 20
    bins += truth * (steps + 1)
    counts = torch.bincount(bins.flatten(), minlength=2 * (steps + 1))
    at_threshold = torch.stack([(mask & truth).sum(), mask.sum()])
    outside, inside = np.array(counts.tolist()).reshape(2, -1)
    shared, predicted = at_threshold.tolist()
    object_size = int(inside.sum())
    curve = [Overlap(shared, predicted + object_size - shared)]
    for step in range(1, steps):
        intersection = int(inside[step + 1 :].sum())
        curve.append(Overlap(intersection, object_size + int(outside[step + 1 :].sum())))
    return tuple(curve)


def summarise(overlaps: Iterable[Overlap], metrics: Sequence[Metric] = STANDARD_METRICS) -> dict[str, float | None]:
    """Return each metric's score in percent by its key; None if no expression counts for it."""
    collected = Overlaps.of(overlaps)
    return {metric.key: known(float(metric.score(collected))) for metric in metrics}
