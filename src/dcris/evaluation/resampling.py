"""Resampling along one axis, as a matrix.

Every interpolation that evaluation needs is linear in the picture and separable: rows first, then columns, each a product with
a matrix of a few numbers per line. Several of them in a row are one matrix, so a map of logits becomes a picture of the
photograph's size by two small products, on any device, whatever chain of resizes a protocol prescribes.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sampling_matrix(
    positions: Floats, length: int, kernel: Literal["bilinear", "bicubic"], edge: Literal["clamp", "zero"] = "clamp"
) -> Floats:
    """The matrix [n, length] that samples a line of `length` pixels at n positions (0 is the centre of the first pixel).

    bicubic is Keys' kernel with a = -0.75, which torch and OpenCV have in common. Beyond the ends lies the end pixel's value
    (as in torch's interpolation) or zero (as in OpenCV's warp with a border of zero).
    """
    reach = 1 if kernel == "bilinear" else 2
    first = np.floor(positions).astype(np.int64) - reach + 1
    matrix = np.zeros((len(positions), length))
    lines = np.arange(len(positions))
    for tap in range(2 * reach):
        pixel = first + tap
        weight = _weight(np.abs(positions - pixel), kernel)
        if edge == "zero":
            weight = np.where((pixel >= 0) & (pixel < length), weight, 0)
        np.add.at(matrix, (lines, pixel.clip(0, length - 1)), weight)
    return matrix


def _weight(distance: Floats, kernel: str) -> Floats:
    if kernel == "bilinear":
        return (1 - distance).clip(0)
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def resize_matrix(source: int, target: int, kernel: Literal["bilinear", "bicubic"], align_corners: bool) -> Floats:
    """The matrix [target, source] of torch's interpolation of `source` pixels to `target`."""
    index = np.arange(target)
    if align_corners:
        positions = index * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        positions = (index + 0.5) * (source / target) - 0.5
        if kernel == "bilinear":
            positions = positions.clip(0)
    return sampling_matrix(positions.astype(np.float64), source, kernel)


def nearest(source: int, target: int) -> NDArray[np.int64]:
    """For each of `target` pixels the one of `source` that nearest-neighbour resizing takes, as Pillow has it.

    Pillow adds up steps, and where a centre falls between two pixels (640 to 480) its rounding errors decide.
    """
    step = source / target
    steps = np.full(target, step)
    steps[0] /= 2
    return np.floor(np.cumsum(steps)).astype(np.int64).clip(0, source - 1)
