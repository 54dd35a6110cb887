"""Trace the outlines of masks, for formats that have polygons only.

The corners are those of pixels, so that COCO's polygons become exactly the same mask again. A hole
is connected with the outline around it by a cut without width, which covers no pixel.
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Ring = list[tuple[int, int]]
"""Corners (x, y) of a closed outline."""

_TURNS = {(1, 0): ((0, 1), (0, -1)), (0, 1): ((-1, 0), (1, 0)), (-1, 0): ((0, -1), (0, 1)), (0, -1): ((1, 0), (-1, 0))}
"""For each direction the turns to the right and to the left. x goes right and y goes down."""

_PAIRS = 1 << 23
"""Corners of an outline times corners before it that are compared to find short cuts, for all
outlines together."""


def mask_polygons(mask: NDArray[Any]) -> list[list[float]]:
    """Return polygons (x, y, x, y, ...) that cover exactly the pixels of a mask [H, W].

    One for each part, whose pixels share a side; an empty mask has none.
    """
    return [_flat(ring) for ring in _parts(mask)]


def mask_polygon(mask: NDArray[Any]) -> list[float]:
    """Return one polygon (x, y, x, y, ...) that covers exactly the pixels of a mask [H, W].

    Its parts are joined by cuts without width; an empty mask has no corners.
    """
    return _flat(join_rings(_parts(mask)))


def join_rings(rings: list[Ring]) -> Ring:
    """Join closed outlines to one by cuts without width, each from the nearest corner before it.

    Many outlines should be sorted by place: only the last corners before each are compared then.
    Any cut is right; a short one looks better, and where borders are drawn it changes few pixels.
    """
    corners = [corner for ring in rings for corner in ring]
    places = np.array(corners, np.int32)
    following = list(range(1, len(corners) + 1))
    end = 0
    for ring in rings:
        start, end = end, end + len(ring)
        following[end - 1] = start
        if start == 0:
            continue
        first = max(0, start - max(1, _PAIRS // len(rings) // len(ring)))
        x, y = np.abs(places[first:start, None] - places[start:end]).transpose(2, 0, 1)
        before, entry = np.unravel_index((x + y).argmin(), x.shape)
        before, entry = first + int(before), start + int(entry)
        # Linked, since lists would be copied for each outline: from `before` to a copy of `entry`,
        # around, and from `entry` to a copy of `before`.
        corners += [corners[entry], corners[before]]
        following += [following[entry], following[before]]
        following[before], following[entry] = len(corners) - 2, len(corners) - 1
    whole, place = Ring(), 0
    for _ in corners:
        whole.append(corners[place])
        place = following[place]
    return whole


def _flat(ring: Ring) -> list[float]:
    return [float(value) for corner in ring for value in corner]


def _parts(mask: NDArray[Any]) -> list[Ring]:
    """Return the outline of each part, joined with those of its holes, from left to right."""
    _, labels = cv2.connectedComponents((mask != 0).astype(np.uint8), connectivity=4)
    members: dict[int, list[Ring]] = {}
    for ring in _rings(mask != 0):
        x, y = ring[0]  # the leftmost corner: the part is at its right, but at the left of a hole
        members.setdefault(int(labels[y, x] or labels[y, x - 1]), []).append(ring)
    return [join_rings(rings) for rings in members.values()]


def _rings(mask: NDArray[np.bool_]) -> list[Ring]:
    """Return the outlines, with the object on their right: clockwise around parts, the other way
    around holes."""
    padded = np.pad(mask, 1)
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for before, after, step in (
        (padded[:-1, 1:-1], padded[1:, 1:-1], (1, 0)),  # the upper side of a pixel, to the right
        (padded[1:-1, :-1], padded[1:-1, 1:], (0, -1)),  # its left side, upwards
    ):
        for sign, found in ((1, after & ~before), (-1, before & ~after)):
            direction = (sign * step[0], sign * step[1])
            for y, x in np.argwhere(found).tolist():
                start = (x, y) if direction in ((1, 0), (0, 1)) else (x + abs(step[0]), y + abs(step[1]))
                edges.setdefault(start, []).append(direction)
    rings = []
    for start in sorted(edges):
        while start in edges:  # nothing is left of it, so only one outline can begin here
            rings.append(_follow(start, edges))
    return rings


def _follow(start: tuple[int, int], edges: dict[tuple[int, int], list[tuple[int, int]]]) -> Ring:
    """Return the outline from `start` until it is closed, and remove its sides from `edges`."""
    place, direction, ring = start, edges[start][0], Ring()
    while place in edges:
        following = edges[place]
        right, left = _TURNS[direction]
        # Where two pixels touch at a corner, the outline stays at its own pixel.
        turn = next(step for step in (right, direction, left) if step in following)
        if turn != direction or not ring:
            ring.append(place)
        following.remove(turn)
        if not following:
            del edges[place]
        place, direction = (place[0] + turn[0], place[1] + turn[1]), turn
        if place == start:
            break
    return ring
