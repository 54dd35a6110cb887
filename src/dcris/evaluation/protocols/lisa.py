"""The protocol of LISA."""

from dataclasses import dataclass, replace

import numpy as np

from dcris.evaluation.metrics import CIOU, MIOU, Overlap
from dcris.evaluation.protocols.refer import Refer
from dcris.types import Expression, Reference

_GIOU = replace(
    MIOU,
    key="giou",
    title="gIoU",
    value=lambda overlaps: np.where(overlaps.union == 0, 1.0, overlaps.intersection / (overlaps.union + 1e-5)),
    description="Intersection over union, averaged over the expressions; 1 where neither mask has a pixel.",
)


@dataclass(frozen=True)
class Lisa(Refer):
    """Protocol of LISA, GSVA and others for RefCOCO and ReasonSeg: masks as those of models on SAM,
    gIoU and cIoU without the pixels of ignored regions.

    Two empty masks have IoU 1. Source: validate in train_ds.py, ValDataset in utils/dataset.py and
    intersectionAndUnionGPU in utils/utils.py of LISA.
    """

    name = "lisa"
    metrics = (_GIOU, CIOU)
    sums_polygons = True

    @property
    def empty_is_wrong(self) -> bool:  # noqa: D102
        return False

    def judge(  # noqa: D102
        self,
        counted: Overlap,
        truth_pixels: int,
        query: tuple[Reference, Expression],
        present: float | None,
        score: float | None,
    ) -> Overlap:
        reference, expression = query
        return replace(counted, target=bool(reference.targets(expression)), none=counted.union == 0)
