"""The protocol of gRefCOCO."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcris.data.masks import decode_mask
from dcris.data.transforms import Resize, Transform
from dcris.evaluation.metrics import CIOU, GIOU, N_ACC, T_ACC, of_targets, precision
from dcris.evaluation.none_rules import HEAD, NoneRule
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix
from dcris.types import MaskArray, Segmentation

_SIDE = 480


@dataclass(frozen=True)
class Grefcoco(Protocol):
    """Protocol of gRefCOCO (ReLA): masks are compared on a square of 480 pixels.

    The truth's polygons are scaled to the square before they become pixels; masks in other forms
    are resized by nearest neighbour. Where a target is wrongly said to be absent, the intersection
    is 0 and the union that with the predicted mask. Precision counts the expressions that have a
    target. Source: gres_model/evaluation/refer_evaluation.py, gres_model/GRES.py and
    gres_model/data/dataset_mappers/refcoco_mapper.py of ReLA.
    """

    threshold: float = 0.5
    none_rule: NoneRule | None = HEAD
    name = "grefcoco"
    transform = Resize
    metrics = (GIOU, CIOU, N_ACC, T_ACC, *(of_targets(precision(limit, inclusive=True)) for limit in (0.7, 0.8, 0.9)))
    interpolate_logits = True
    canvas = _SIDE
    blanks = False

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        rows, columns = (resize_matrix(cells, _SIDE, "bilinear", align_corners=False) for cells in grid)
        return rows, columns

    def rasterise(self, segmentations: Sequence[Segmentation], size: tuple[int, int]) -> MaskArray:  # noqa: D102
        square = np.zeros((_SIDE, _SIDE), bool)
        for segmentation in segmentations:
            if isinstance(segmentation, list):
                square |= decode_mask(_scaled(segmentation, size), square.shape).astype(bool)
            else:
                square |= self.to_canvas(decode_mask(segmentation, size).astype(bool))
        return square


def _scaled(polygons: list[list[float]], size: tuple[int, int]) -> Segmentation:
    """Scale polygons from an image of `size` (H, W) to the square.

    A corner may lie outside the image, but no further than masks of the square may have it: in a
    very long image, it would be moved by more pixels than can be drawn.
    """
    steps = np.array([_SIDE / size[1], _SIDE / size[0]])
    return [(np.reshape(polygon, (-1, 2)) * steps).clip(-_SIDE, 2 * _SIDE).ravel().tolist() for polygon in polygons]
