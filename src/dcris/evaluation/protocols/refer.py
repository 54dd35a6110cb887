"""The protocol of models built on SAM."""

from dataclasses import dataclass

from dcris.data.transforms import ResizePad, Transform
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix


@dataclass(frozen=True)
class Refer(Protocol):
    """Protocol of models built on SAM: padded images, logits above 0 at the image's own size.

    Logits are interpolated bilinearly to the square, cropped to the image in it, and interpolated
    bilinearly to the image's size.
    """

    threshold: float = 0.5
    name = "refer"
    transform = ResizePad
    interpolate_logits = True

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        assert isinstance(transform, ResizePad)
        rows, columns = (
            resize_matrix(inner, length, "bilinear", align_corners=False)
            @ resize_matrix(cells, transform.side, "bilinear", align_corners=False)[:inner]
            for cells, inner, length in zip(grid, transform.inner, transform.size, strict=True)
        )
        return rows, columns
