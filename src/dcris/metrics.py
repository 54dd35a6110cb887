"""Scores of referring image segmentation, from additive counts of pixels.

The field reports two averages under the one name "IoU"; both are always given here:
mIoU is the mean of each expression's IoU (CRIS, ETRIS, DETRIS); oIoU, also called cIoU, is the sum of all intersections over
the sum of all unions (LAVT's family), in which large objects weigh more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dcris.types import MaskArray

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


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


def summarise(overlaps: Iterable[Overlap]) -> dict[str, float]:
    """mIoU, oIoU and precision at 0.5 to 0.9, in percent; NaN never: no expressions give zeros.

    Precision at t is the share of expressions whose IoU is greater than t (strictly, as the CRIS family has it).
    """
    items: Sequence[Overlap] = list(overlaps)
    ious = np.array([item.iou for item in items] or [0.0])
    unions = sum(item.union for item in items)
    scores = {
        "miou": 100 * float(ious.mean()),
        "oiou": 100 * sum(item.intersection for item in items) / unions if unions else 0.0,
    }
    return scores | {f"prec@{t}": 100 * float((ious > t).mean()) for t in PRECISION_THRESHOLDS}
