"""The protocol of CGFormer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dcris.data.transforms import Resize, Transform
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix


@dataclass(frozen=True)
class CgFormer(Protocol):
    """Protocol of CGFormer: bicubic probabilities at the image's own size, threshold 0.5.

    CGFormer's network itself interpolates logits to its input square, bilinearly with corners
    aligned, so that comes first. Its masks are those of CRIS, in which a pixel in two polygons is
    254 instead of 255, and are cut to whole numbers after a division by 255. Source:
    model/segmenter.py, inference in engine/engine.py and utils/dataset.py of CGFormer;
    tools/data_process.py of CRIS.
    """

    threshold: float = 0.5
    name = "cgformer"
    transform = Resize
    sums_polygons = True

    def probabilities(self, logits: Tensor, transforms: Sequence[Transform]) -> Iterator[Tensor]:  # noqa: D102
        for each, transform in zip(logits.float(), transforms, strict=True):
            square = F.interpolate(each[None], (transform.side, transform.side), mode="bilinear", align_corners=True)
            yield from super().probabilities(square, [transform])

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        rows, columns = (
            resize_matrix(cells, length, "bicubic", align_corners=True)
            for cells, length in zip(grid, transform.size, strict=True)
        )
        return rows, columns
