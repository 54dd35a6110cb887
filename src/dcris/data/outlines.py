"""Trace the outlines of masks, for formats that have polygons only.

The corners are those of pixels, so that COCO's polygons become exactly the same mask again. A hole
is connected with the outline around it by a cut without width, which covers no pixel.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ring = list[tuple[int, int]]
"""Corners (x, y) of a closed outline."""

_TURNS = {(1, 0): ((0, 1), (0, -1)), (0, 1): ((-1, 0), (1, 0)), (-1, 0): ((0, -1), (0, 1)), (0, -1): ((1, 0), (-1, 0))}
"""For each direction the turns to the right and to the left. x goes right and y goes down."""


def mask_polygons(mask: NDArray[Any]) -> list[list[float]]:
    """Return polygons (x, y, x, y, ...) that cover exactly the pixels of a mask [H, W].

    One for each part, whose pixels share a side; an empty mask has none.
    """
    outer, holes = list[Ring](), list[Ring]()
    for ring in _rings(mask != 0):
        (outer if _area(ring) > 0 else holes).append(ring)
    # The smallest first: the part around a hole is the smallest one that contains it.
    outer.sort(key=_area)
    members: list[list[Ring]] = [[] for _ in outer]
    for hole in holes:
        x, y = min(hole)
        place = next(place for place, ring in enumerate(outer) if _contains(ring, x - 0.5, y + 0.5))
        members[place].append(hole)
    joined = [join_rings([ring, *inside]) for ring, inside in zip(outer, members, strict=True)]
    return [[float(value) for point in ring for value in point] for ring in joined]


def mask_polygon(mask: NDArray[Any]) -> list[float]:
    """Return one polygon (x, y, x, y, ...) that covers exactly the pixels of a mask [H, W].

    Its parts are joined by cuts without width; an empty mask has no corners.
    """
    found = mask_polygons(mask)
    rings = [[(int(x), int(y)) for x, y in zip(flat[::2], flat[1::2], strict=True)] for flat in found]
    return [float(value) for point in join_rings(rings) for value in point] if rings else []


def join_rings(rings: list[Ring]) -> Ring:
    """Join closed outlines to one by cuts without width, each from its nearest corner."""
    whole, *rest = rings
    for ring in rest:
        path, other = np.array(whole), np.array(ring)
        distances = np.abs(path[:, None, :] - other[None, :, :]).sum(axis=2) if path.size * other.size < 1e7 else None
        if distances is None:  # any cut is right; a short one only looks better
            start, entry = 0, 0
        else:
            start, entry = (int(each) for each in np.unravel_index(distances.argmin(), distances.shape))
        whole = [*whole[: start + 1], *ring[entry:], *ring[: entry + 1], *whole[start:]]
    return whole


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


def _area(ring: Ring) -> float:
    """Return the area of an outline, negative if it goes around a hole."""
    x, y = np.array(ring, np.int64).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def _contains(ring: Ring, x: float, y: float) -> bool:
    """Return whether a point that is on no side is inside of an outline."""
    (x0, y0), (x1, y1) = np.array(ring).T, np.roll(np.array(ring), -1, axis=0).T
    upright = (x0 == x1) & (x0 > x) & ((y0 > y) != (y1 > y))
    return bool(upright.sum() % 2)
