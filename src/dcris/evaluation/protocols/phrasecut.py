"""The protocol of PhraseCut."""

from dataclasses import dataclass

from dcris.data.readers.phrasecut import size_subset
from dcris.evaluation.metrics import CIOU, MIOU, PRECISION_THRESHOLDS, precision
from dcris.evaluation.protocols.cris import Cris


@dataclass(frozen=True)
class PhraseCut(Cris):
    """Protocol of PhraseCut: mean IoU, cumulative IoU and the share of IoU above 0.5 to 0.9 (Pr@),
    also by the data set's subsets, on the image's own pixels.

    The truth is the union of the objects, whose polygons Pillow draws
    (dcris.data.readers.phrasecut). Two empty masks have IoU 0. The authors' code scores masks;
    those of models are made as in `cris`. It averages over the phrases that have a prediction;
    here, a missing one is an error or counts as empty. Source: utils/evaluator.py and utils/iou.py
    of PhraseCutDataset.
    """

    name = "phrasecut"
    metrics = (MIOU, CIOU, *map(precision, PRECISION_THRESHOLDS))

    def size_subset(self, pixels: int, size: tuple[int, int]) -> str | None:  # noqa: D102
        return size_subset(pixels, size)
