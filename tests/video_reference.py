"""J and F of DAVIS, computed slowly from their definitions: the package's must equal them.

Nothing here is shared with the package, and no library draws, dilates or matches.
"""

import math
from itertools import permutations
from typing import Any

import numpy as np

Mask = np.ndarray[Any, Any]


def slow_j(prediction: Mask, truth: Mask) -> float:
    """Intersection over union, pixel by pixel; 1 for two empty masks."""
    shared = both = 0
    for one, other in zip(prediction.ravel().tolist(), truth.ravel().tolist(), strict=True):
        shared += one and other
        both += one or other
    return shared / both if both else 1.0


def slow_contour(mask: Mask) -> list[tuple[int, int]]:
    """Pixels that differ from a neighbour right, below or right below them in the frame."""
    rows = mask.tolist()
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(rows[b][a] != rows[y][x] for b, a in neighbours if b < height and a < width):
                found.append((y, x))
    return found


def slow_f(prediction: Mask, truth: Mask) -> float:
    """The F-measure of contours, from all distances between their pixels."""
    limit = math.ceil(0.008 * math.hypot(*truth.shape)) ** 2
    ours, theirs = slow_contour(prediction), slow_contour(truth)
    if not ours or not theirs:
        return 1.0 if not ours and not theirs else 0.0
    there = np.array(theirs)
    away = [((there - pixel) ** 2).sum(axis=1) for pixel in np.array(ours)]
    precision = sum(each.min() <= limit for each in away) / len(ours)
    recall = sum(each <= limit for each in np.min(away, axis=0)) / len(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def slow_clip(predictions: Mask, truths: Mask) -> tuple[float, float]:
    """J and F of masks [T, H, W], each the mean over the frames."""
    pairs = list(zip(predictions, truths, strict=True))
    return sum(slow_j(*pair) for pair in pairs) / len(pairs), sum(slow_f(*pair) for pair in pairs) / len(pairs)


def slow_match(gains: Mask) -> float:
    """The greatest sum of gains [P, O] of different rows for the columns: all ways are tried."""
    rows, columns = gains.shape
    return max(sum(gains[row, column] for column, row in enumerate(way)) for way in permutations(range(rows), columns))


def made_masks(random: np.random.Generator, size: tuple[int, int], frames: int) -> Mask:
    """Masks [T, H, W]: ellipses, rectangles, noise, empty, full, one pixel, the border."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    masks = []
    for _ in range(frames):
        kind = random.integers(8)
        mask = np.zeros(size, bool)
        if kind < 3:
            middle, axes = random.random(2) * size, 1 + random.random(2) * size / 2
            mask = ((y - middle[0]) / axes[0]) ** 2 + ((x - middle[1]) / axes[1]) ** 2 <= 1
        elif kind == 3:
            top, left = random.integers(height), random.integers(width)
            mask[top : top + random.integers(1, height + 1), left : left + random.integers(1, width + 1)] = True
        elif kind == 4:
            mask = random.random(size) < random.random()
        elif kind == 5:
            mask[:] = random.random() < 0.5
        elif kind == 6:
            mask[random.integers(height), random.integers(width)] = True
        else:
            mask[[0, -1]] = mask[:, [0, -1]] = True
        masks.append(mask)
    return np.stack(masks)
