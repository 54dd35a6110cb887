"""The protocol of CGFormer."""

from dataclasses import dataclass

from dcris.data.transforms import Resize, Transform
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix


@dataclass(frozen=True)
class CgFormer(Protocol):
    """Protocol of CGFormer: bicubic probabilities at the image's own size, threshold 0.5.

    Its masks are those of CRIS, in which a pixel in two polygons is 254 instead of 255, and are cut
    to whole numbers after a division by 255. Source: inference in engine/engine.py and
    utils/dataset.py of CGFormer; tools/data_process.py of CRIS.
    """

    threshold: float = 0.5
    name = "cgformer"
    transform = Resize
    sums_polygons = True

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        rows, columns = (
            resize_matrix(cells, length, "bicubic", align_corners=True)
            for cells, length in zip(grid, transform.size, strict=True)
        )
        return rows, columns
