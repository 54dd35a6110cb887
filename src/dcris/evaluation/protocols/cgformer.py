"""The protocol of CGFormer."""

from dataclasses import dataclass

from dcris.data.transforms import Resize, Transform
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix


@dataclass(frozen=True)
class CgFormer(Protocol):
    """Protocol of CGFormer: bicubic probabilities at the image's own size, threshold 0.5."""

    threshold: float = 0.5
    name = "cgformer"
    transform = Resize

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        rows, columns = (
            resize_matrix(cells, length, "bicubic", align_corners=True)
            for cells, length in zip(grid, transform.size, strict=True)
        )
        return rows, columns
