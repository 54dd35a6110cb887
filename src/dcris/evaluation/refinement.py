"""Sharper edges of predicted masks without training: the image guides the probabilities.

The guided filter of He, Sun and Tang, "Guided Image Filtering", TPAMI 2013 (ECCV 2010), with a
colour guide. In each window, the probabilities are approximated by a linear function of the colour,
so that their edges move to edges of the image nearby. The coefficients are computed at a bounded
resolution, as in He and Sun, "Fast Guided Filter", arXiv:1505.00996, 2015.

Shape letters: H W pixels of the image, h w pixels of the working resolution.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from dcris.errors import DcrisError

Floats = NDArray[np.float64]

RADIUS = 2.0
"""Radius of the windows in cells of the logit grid."""

EPSILON = 1e-4
"""Regularisation (the paper's epsilon) for colours in 0..1: windows with less variance are
averaged."""

_PIXELS_PER_CELL = 4
"""Limit on the working resolution, so that its cost and memory do not depend on the image's size.
"""

_BAND = 1 << 18
"""Pixels of the image that are computed at a time."""


def refine_guided(probabilities: NDArray[np.float32], image: NDArray[np.uint8], cells: int) -> NDArray[np.float32]:
    """Filter probabilities so that their edges follow those of the image.

    Args:
        probabilities: [H, W] in 0..1; overwritten, because those of a large image take half a
            gigabyte.
        image: [H, W, 3] uint8 RGB.
        cells: of the logit grid along the longer side of the image.

    Returns:
        The same array with the filtered probabilities, in 0..1.

    Raises:
        DcrisError: the image has another size than the probabilities.
    """
    height, width = probabilities.shape
    if image.shape[:2] != (height, width):
        raise DcrisError(
            f"the image is {image.shape[1]} x {image.shape[0]} pixels and its probabilities are for {width} x {height}; "
            "it has changed since it was encoded"
        )
    longer = max(height, width)
    scale = min(1.0, _PIXELS_PER_CELL * cells / longer)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    coefficients = _coefficients(
        cv2.resize(probabilities, size, interpolation=cv2.INTER_AREA).astype(np.float64),
        cv2.resize(image, size, interpolation=cv2.INTER_AREA) / 255,
        max(1, round(RADIUS * longer * scale / cells)),
    ).astype(np.float32)
    # Bilinear interpolation to the image's rows and columns, band by band.
    positions = ((np.arange(height) + 0.5) * (size[1] / height) - 0.5).clip(0, size[1] - 1)
    above = positions.astype(np.int64)
    below, share = np.minimum(above + 1, size[1] - 1), (positions - above).astype(np.float32)[:, None, None]
    for top in range(0, height, rows := max(1, _BAND // width)):
        band = slice(top, top + rows)
        wanted = (1 - share[band]) * coefficients[above[band]] + share[band] * coefficients[below[band]]
        wanted = cv2.resize(wanted, (width, len(wanted)))
        colours = image[band] / np.float32(255)
        refined = np.einsum("hwc,hwc->hw", wanted[..., :3], colours) + wanted[..., 3]
        np.clip(refined, 0, 1, out=probabilities[band])
    return probabilities


def _coefficients(probabilities: Floats, guide: Floats, radius: int) -> Floats:
    """Return the averaged coefficients of the paper's equations 19 to 21, [h, w, 4]: a, then b.

    Args:
        probabilities: [h, w], the paper's p.
        guide: [h, w, 3], the paper's I.
        radius: of the square windows, in pixels. They are cut at the border of the image.
    """

    def window_sum(values: Floats) -> Floats:
        size = (2 * radius + 1, 2 * radius + 1)
        return np.asarray(cv2.boxFilter(values, -1, size, normalize=False, borderType=cv2.BORDER_CONSTANT))

    pixels = window_sum(np.ones_like(probabilities))

    def mean(values: Floats) -> Floats:
        return window_sum(values) / pixels.reshape(*pixels.shape, *[1] * (values.ndim - 2))

    p, mean_p, mean_guide = probabilities[..., None], mean(probabilities), mean(guide)
    covariance = mean(guide * p) - mean_guide * mean_p[..., None]
    # The rows of the symmetric matrix of variances, [h, w, 3] each, and Cramer's rule.
    red, green, blue = (
        mean(guide * guide[..., c, None]) - mean_guide * mean_guide[..., c, None] + EPSILON * np.eye(3)[c]
        for c in range(3)
    )
    minors = np.cross(green, blue), np.cross(blue, red), np.cross(red, green)
    slope = np.stack([(covariance * minor).sum(-1) for minor in minors], -1) / (red * minors[0]).sum(-1, keepdims=True)
    return mean(np.dstack((slope, mean_p - (slope * mean_guide).sum(-1))))
