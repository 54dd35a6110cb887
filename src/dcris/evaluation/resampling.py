"""Resampling along one axis, written as a matrix.

Every interpolation in evaluation is linear and separable: first the rows, then the columns, each a
product with a sparse matrix. Successive resizes multiply into one matrix. So a logit grid becomes a
map of the image's size by two small products, for any chain of resizes, on any device.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sampling_matrix(
    positions: Floats, length: int, kernel: Literal["bilinear", "bicubic"], edge: Literal["clamp", "zero"] = "clamp"
) -> Floats:
    """Return the matrix that samples a line of pixels at given positions.

    Args:
        positions: [n], where 0 is the centre of the first pixel.
        length: pixels of the line.
        kernel: "bicubic" is Keys' kernel with a = -0.75, as in torch and OpenCV.
        edge: value beyond the ends: the end pixel's ("clamp", as in torch's interpolation) or 0
            ("zero", as in OpenCV's warp with a zero border).

    Returns:
        [n, length].
    """
    reach = 1 if kernel == "bilinear" else 2
    first = np.floor(positions).astype(np.int64) - reach + 1
    matrix = np.zeros((len(positions), length))
    lines = np.arange(len(positions))
    for offset in range(2 * reach):
        pixel = first + offset
        weight = _weight(np.abs(positions - pixel), kernel)
        if edge == "zero":
            weight = np.where((pixel >= 0) & (pixel < length), weight, 0)
        np.add.at(matrix, (lines, pixel.clip(0, length - 1)), weight)
    return matrix


def _weight(distance: Floats, kernel: str) -> Floats:
    """Return the kernel's value at a distance in pixels."""
    if kernel == "bilinear":
        return (1 - distance).clip(0)
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def resize_matrix(source: int, target: int, kernel: Literal["bilinear", "bicubic"], align_corners: bool) -> Floats:
    """Return the matrix [target, source] of torch's interpolation."""
    index = np.arange(target)
    if align_corners:
        positions = index * ((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        positions = (index + 0.5) * (source / target) - 0.5
        if kernel == "bilinear":
            positions = positions.clip(0)
    return sampling_matrix(positions.astype(np.float64), source, kernel)


def nearest(source: int, target: int) -> NDArray[np.int64]:
    """Return [target]: the source pixels that Pillow's nearest-neighbour resizing takes.

    Pillow accumulates steps. Where a centre falls between two pixels (640 to 480), its rounding
    errors decide, so they are reproduced here.
    """
    step = source / target
    steps = np.full(target, step)
    steps[0] /= 2
    return np.floor(np.cumsum(steps)).astype(np.int64).clip(0, source - 1)
