"""The protocol of the CRIS family."""

from dataclasses import dataclass

import numpy as np

from dcris.data.transforms import Letterbox, Transform
from dcris.evaluation.protocols.base import Protocol
from dcris.evaluation.resampling import Floats, resize_matrix, sampling_matrix


@dataclass(frozen=True)
class Cris(Protocol):
    """Protocol of CRIS, ETRIS, BarLeRIa and DETRIS: IoU on the image's own pixels.

    Sigmoid, bicubic interpolation to the square with corners aligned, and a bicubic warp with zero
    border that undoes the letterbox. The warp samples at exact positions, as OpenCV 5 does. The
    published scores were computed with OpenCV 4, which rounds positions to 1/32 pixel.
    """

    threshold: float = 0.35
    name = "cris"
    transform = Letterbox

    @staticmethod
    def resampling(transform: Transform, grid: tuple[int, int]) -> tuple[Floats, Floats]:  # noqa: D102
        assert isinstance(transform, Letterbox)
        matrix = transform.matrix()
        return _undo_letterbox(matrix, 1, transform, grid[0]), _undo_letterbox(matrix, 0, transform, grid[1])


def _undo_letterbox(matrix: Floats, axis: int, transform: Letterbox, cells: int) -> Floats:
    """Return the interpolation of `cells` logits to the image's rows (axis 1) or columns (0).

    It goes through the square: resize to its side, then sample where `matrix` puts each pixel.
    """
    positions = np.arange(transform.size[1 - axis]) * matrix[axis, axis] + matrix[axis, 2]
    warp = sampling_matrix(positions, transform.side, "bicubic", edge="zero")
    return warp @ resize_matrix(cells, transform.side, "bicubic", align_corners=True)
