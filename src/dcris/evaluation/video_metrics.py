"""J, F and J&F of video segmentation, as the DAVIS challenges define them.

J is the intersection over union of a frame. F is the F-measure of its contours: precision is the
share of the prediction's contour that is near the truth's, recall the reverse. Both are averaged
over the frames of an object or expression, and then over these. J&F is the mean of the two.

Source: F. Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation, CVPR 2016; davis2017/metrics.py, utils.py and evaluation.py of davis2017-evaluation.
MeViS has the same functions in tools/metrics.py.

Shape letters: H W pixels of a frame, T frames, P predicted objects, O true objects.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from dcris.data.masks import mask_box
from dcris.evaluation.metrics import Floats, overlap
from dcris.types import MaskArray

Labels = NDArray[np.uint8]
"""[H, W]: the number of the object of each pixel, 0 for the background."""

_TOLERANCE = 0.008
"""Distance at which contours match, relative to the diagonal of the frame."""

_RECALLED = 0.5
"""A frame is recalled if its J (or F) is greater."""


@dataclass(frozen=True, slots=True, eq=False)
class Contour:
    """The contour of a mask, which is computed once and compared with any number of others."""

    pixels: MaskArray
    """[H, W], see `contour_pixels`."""
    length: int
    """Number of its pixels."""
    window: tuple[slice, slice]
    """Rows and columns that contain all pixels near it."""
    near: MaskArray
    """[h, w], the pixels of the window that are near it."""

    @classmethod
    def of(cls, mask: MaskArray) -> "Contour":
        """Compute the contour of a mask [H, W] bool, and what is near it."""
        height, width = mask.shape
        pixels, nothing = np.zeros_like(mask), slice(0)
        box = mask_box(mask)
        if box is None:
            return cls(pixels, 0, (nothing, nothing), np.zeros((0, 0), bool))

        def window(margin: int) -> tuple[slice, slice]:
            left, top, columns, rows = box
            return (
                slice(max(0, top - margin), min(height, top + rows + margin)),
                slice(max(0, left - margin), min(width, left + columns + margin)),
            )

        # Nothing outside is near a contour, so small objects take little time.
        around, reach = window(1), tolerance((height, width))
        pixels[around] = contour_pixels(mask[around])
        reached = window(1 + reach)
        near = cv2.dilate(pixels[reached].view(np.uint8), _disk(reach))
        return cls(pixels, int(np.count_nonzero(pixels)), reached, near.view(np.bool_))

    def matched(self, other: "Contour") -> int:
        """Return how many of its pixels are near another contour."""
        return int(np.count_nonzero(self.pixels[other.window] & other.near))


def tolerance(size: tuple[int, int]) -> int:
    """Return the distance in pixels up to which contours match in frames of `size` (H, W)."""
    height, width = size
    return math.ceil(_TOLERANCE * math.sqrt(height * height + width * width))


def contour_pixels(mask: MaskArray) -> MaskArray:
    """Return the pixels [H, W] bool on the contour of a mask [H, W] bool.

    They differ from the pixel right of, below or right below them, so that they are on both sides
    of the edge, half a pixel towards the origin. The border of the frame is not an edge: a mask
    that covers the frame has no contour. (_seg2bmap of the authors.)
    """
    found = np.zeros_like(mask)
    found[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    found[:-1] |= mask[:-1] != mask[1:]
    found[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return found


@lru_cache(maxsize=16)
def _disk(radius: int) -> NDArray[np.uint8]:
    """Return a disk of 0 and 1, [2 radius + 1, 2 radius + 1]."""
    away = np.arange(-radius, radius + 1)
    return (away[:, None] ** 2 + away**2 <= radius * radius).astype(np.uint8)


def region_similarity(prediction: MaskArray, truth: MaskArray) -> float:
    """Return J of a frame, in 0..1: intersection over union of two masks [H, W] bool, and 1 if both
    are empty.

    Raises:
        ValueError: their shapes differ.
    """
    counted = overlap(prediction, truth)
    return counted.intersection / counted.union if counted.union else 1.0


def contour_accuracy(prediction: Contour, truth: Contour) -> float:
    """Return F of a frame, in 0..1.

    It is 0 if one mask alone has a contour, and 1 if none has: also for an empty and a full mask.
    """
    if not prediction.length or not truth.length:
        return float(prediction.length == truth.length)
    precision = prediction.matched(truth) / prediction.length
    recall = truth.matched(prediction) / truth.length
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def compare_masks(prediction: MaskArray, truth: MaskArray) -> Floats:
    """Return J and F of a frame, [2], of two masks [H, W] bool.

    Raises:
        ValueError: their shapes differ.
    """
    return np.array([region_similarity(prediction, truth), contour_accuracy(Contour.of(prediction), Contour.of(truth))])


def compare_labels(prediction: Labels, truth: Labels, objects: tuple[int, int]) -> Floats:
    """Return J and F of each predicted with each true object in a frame, [P, O, 2].

    Args:
        prediction, truth: labels of one shape.
        objects: (P, O), the greatest labels that count; pixels of greater ones are background.

    Raises:
        ValueError: their shapes differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"cannot compare labels of shape {prediction.shape} with those of shape {truth.shape}")
    labels = [np.where(each > most, 0, each) for each, most in zip((prediction, truth), objects, strict=True)]
    predicted, true = (most + 1 for most in objects)
    pairs = labels[0].ravel().astype(np.int64) * true + labels[1].ravel()
    shared = np.bincount(pairs, minlength=predicted * true).reshape(predicted, true)
    sizes = shared.sum(axis=1), shared.sum(axis=0)
    union = sizes[0][:, None] + sizes[1] - shared
    similarity = np.where(union > 0, shared / np.maximum(union, 1), 1.0)[1:, 1:]
    nothing = Contour.of(np.zeros(truth.shape, bool))
    edges, true_edges = (
        [Contour.of(each == label) if pixels[label] else nothing for label in range(1, len(pixels))]
        for each, pixels in zip(labels, sizes, strict=True)
    )
    accuracy = [[contour_accuracy(edge, other) for other in true_edges] for edge in edges]
    return np.stack([similarity, np.array(accuracy).reshape(objects)], axis=-1)


def recall(values: Floats) -> float:
    """Return the share of the frames whose J (or F) is above 0.5, of values [T] in 0..1."""
    return float(np.mean(values > _RECALLED))


def decay(values: Floats) -> float:
    """Return by how much J (or F) falls from the first to the last quarter of the frames, of values
    [T] in 0..1.

    Quarters share the frames at which they meet. The authors store frame numbers in 8 bits, so that
    they compute another decay for more than 256 frames.
    """
    bounds = np.floor(np.linspace(1, len(values), 5) + 0.5 + 1e-10).astype(int) - 1
    return float(values[: bounds[1] + 1].mean() - values[bounds[3] :].mean())


def best_match(gains: Floats) -> NDArray[np.int64]:
    """Return a different row for each column [O] so that the sum of their gains [P, O] is greatest.

    The Hungarian method with potentials: each column in turn takes a row along the cheapest
    alternating path.

    Raises:
        ValueError: there are fewer rows than columns.
    """
    rows, columns = gains.shape
    if rows < columns:
        raise ValueError(f"{columns} columns cannot have different ones of {rows} rows")
    cost = -gains.T
    of_column, of_row = np.zeros(columns), np.zeros(rows)
    taken = np.full(rows, -1)  # by which column
    for column in range(columns):
        best, came_from = np.full(rows, np.inf), np.full(rows, -1)
        visited = np.zeros(rows, bool)
        current, row = column, -1
        while current >= 0:
            reduced = cost[current] - of_column[current] - of_row
            closer = ~visited & (reduced < best)
            best[closer], came_from[closer] = reduced[closer], row
            row = int(np.argmin(np.where(visited, np.inf, best)))
            step = best[row]
            of_column[column] += step
            of_column[taken[visited]] += step
            of_row[visited] -= step
            best[~visited] -= step
            visited[row] = True
            current = int(taken[row])
        while row >= 0:
            before = int(came_from[row])
            taken[row] = taken[before] if before >= 0 else column
            row = before
    found = np.zeros(columns, np.int64)
    found[taken[taken >= 0]] = np.flatnonzero(taken >= 0)
    return found
