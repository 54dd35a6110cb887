"""Name the colours of an object's pixels, cautiously: between two colours lie shades without a
name."""

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

_Range = tuple[float, float]

_COLOURS: Mapping[str, tuple[_Range, _Range, _Range]] = {
    "red": ((346, 368), (0.6, 1), (0.35, 1)),
    "orange": ((16, 32), (0.75, 1), (0.65, 1)),
    "brown": ((12, 36), (0.4, 0.85), (0.2, 0.6)),
    "yellow": ((44, 60), (0.5, 1), (0.6, 1)),
    "green": ((75, 165), (0.35, 1), (0.2, 1)),
    "blue": ((195, 242), (0.45, 1), (0.25, 1)),
    "purple": ((260, 296), (0.35, 1), (0.25, 1)),
    "pink": ((320, 350), (0.25, 0.7), (0.7, 1)),
    "white": ((0, 360), (0, 0.12), (0.75, 1)),
    "gray": ((0, 360), (0, 0.12), (0.3, 0.65)),
    "black": ((0, 360), (0, 0.35), (0, 0.2)),
}
"""Hue in degrees (it may exceed 360), saturation and value (HSV) of the pixels that anyone would
call by the name."""

_NEARLY = (12, 0.2, 0.2)
"""How far outside these ranges pixels nearly have the colour."""

_MOST_PIXELS = 1024
_FEWEST_PIXELS = 300
_LEAST_SATURATION = 0.06
"""Mean of a colour photograph. Below, it may be black and white."""
_LEAST_VALUE = 0.25
"""Median of a photograph that is not so dark that red things are black."""


def shows_colours(image: NDArray[np.uint8]) -> bool:
    """Return whether an image [H, W, 3] uint8 RGB is neither black and white nor dark."""
    pixels = image.reshape(-1, 3)
    _, saturation, value = _hsv(pixels[:: 1 + len(pixels) // _MOST_PIXELS])
    return bool(saturation.mean() >= _LEAST_SATURATION and np.median(value) >= _LEAST_VALUE)


def colour_shares(pixels: NDArray[np.uint8]) -> dict[str, tuple[float, float]]:
    """Return by colour the share of pixels that have it, and that have it nearly.

    Args:
        pixels: [N, 3] uint8 RGB. Of many, an even sample is used; of too few, nothing is returned.
    """
    if len(pixels) < _FEWEST_PIXELS:
        return {}
    hsv = _hsv(pixels[:: 1 + len(pixels) // _MOST_PIXELS])
    return {name: (_share(hsv, ranges), _share(hsv, ranges, _NEARLY)) for name, ranges in _COLOURS.items()}


_Hsv = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def _hsv(pixels: NDArray[np.uint8]) -> _Hsv:
    """Return hue in degrees, saturation and value, each [N]."""
    scaled = pixels[None].astype(np.float32) / 255
    hue, saturation, value = cv2.cvtColor(scaled, cv2.COLOR_RGB2HSV)[0].T
    # The saturation of dark pixels is mostly noise.
    return hue, saturation * np.minimum(1, value / 0.2), value


def _share(
    hsv: _Hsv, ranges: tuple[_Range, _Range, _Range], slack: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> float:
    (first, last), *_ = ranges
    within = (hsv[0] - (first - slack[0])) % 360 <= last - first + 2 * slack[0]
    for channel, (low, high), extra in zip(hsv[1:], ranges[1:], slack[1:], strict=True):
        within &= (channel >= low - extra) & (channel <= high + extra)
    return float(within.mean())
