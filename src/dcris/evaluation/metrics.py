"""Scores of referring image segmentation, from additive counts of pixels.

The field reports two averages under the one name "IoU"; both are always given here:
mIoU is the mean of each expression's IoU (CRIS, ETRIS, DETRIS); oIoU, also called cIoU, is the sum of all intersections over
the sum of all unions (LAVT's family), in which large objects weigh more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcris.types import MaskArray

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
CURVE_THRESHOLDS = tuple(step / 20 for step in range(1, 20))
"""0.05, 0.10, ... 0.95: where a curve over the threshold is taken."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How one predicted mask and the truth overlap, in pixels."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union in 0..1; 0 where both masks are empty, as an empty prediction never scores."""
        return self.intersection / self.union if self.union else 0.0


def overlap(prediction: MaskArray, truth: MaskArray) -> Overlap:
    """Count the pixels that two [H, W] bool masks share and cover. Raises ValueError where their shapes differ."""
    if prediction.shape != truth.shape:
        raise ValueError(f"a mask of {prediction.shape} pixels cannot be compared with one of {truth.shape}")
    intersection = int(np.count_nonzero(prediction & truth))
    return Overlap(intersection, int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth)) - intersection)


def overlap_curve(probabilities: Tensor, truth: Tensor, threshold: float) -> tuple[Overlap, ...]:
    """The overlap of the mask `probabilities` > t with `truth`, both [H, W], for `threshold` and each of CURVE_THRESHOLDS.

    Counted where the tensors are, in one pass: a histogram of the probabilities inside and outside the object tells all.
    """
    mask = probabilities > threshold
    steps = len(CURVE_THRESHOLDS) + 1
    bins = (probabilities * steps).ceil_().clamp_(1, steps).to(torch.uint8)  # k for (k - 1) / 20 < p <= k / 20
    bins += truth * (steps + 1)
    counts = torch.bincount(bins.flatten(), minlength=2 * (steps + 1))
    own = torch.stack([(mask & truth).sum(), mask.sum()])
    outside, inside = np.array(counts.tolist()).reshape(2, -1)
    shared, covered = own.tolist()
    size = int(inside.sum())
    curve = [Overlap(shared, covered + size - shared)]
    for step in range(1, steps):
        intersection = int(inside[step + 1 :].sum())
        curve.append(Overlap(intersection, size + int(outside[step + 1 :].sum())))
    return tuple(curve)


def summarise(overlaps: Iterable[Overlap], inclusive: bool = False) -> dict[str, float]:
    """mIoU, oIoU and precision at 0.5 to 0.9, in percent; NaN never: no expressions give zeros.

    Precision at t is the share of expressions whose IoU is greater than t (strictly, as the CRIS family has it; or at least t
    where `inclusive`, as LAVT has it).
    """
    items: Sequence[Overlap] = list(overlaps)
    ious = np.array([item.iou for item in items] or [0.0])
    unions = sum(item.union for item in items)
    scores = {
        "miou": 100 * float(ious.mean()),
        "oiou": 100 * sum(item.intersection for item in items) / unions if unions else 0.0,
    }
    compare = np.greater_equal if inclusive else np.greater
    return scores | {f"prec@{t}": 100 * float(compare(ious, t).mean()) for t in PRECISION_THRESHOLDS}
