"""Pictures of masks: for the report, and for a person who wants to see what was segmented.

Everything stays uint8 or bool, and work is kept to the mask's surroundings, so that a photograph of 100 megapixels needs
little memory beside its own copy.
"""

import math
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from dcris.types import MaskArray

T = TypeVar("T", bound=np.generic)

Colour = tuple[int, int, int]
"""Red, green and blue, 0..255."""

COLOURS: tuple[Colour, ...] = (
    (255, 122, 0),  # orange
    (0, 114, 255),  # blue
    (0, 200, 110),  # green
    (235, 0, 150),  # magenta
    (255, 215, 0),  # yellow
    (130, 60, 255),  # violet
    (0, 215, 235),  # cyan
    (200, 0, 40),  # crimson
)
"""For several phrases on one picture: `COLOURS[k % len(COLOURS)]`. Neighbours differ for colour-blind eyes too."""

PREDICTION_COLOUR, TRUTH_COLOUR = COLOURS[:2]
"""Where a model's answer stands beside what was right."""

PNG_UP_TO = 200
"""Longer side of pictures that are kept as PNG: smaller ones are drawn scenes, which JPEG would smear."""

_ALPHA = 0.45  # of the tint: the object under it stays recognisable
_CASING: Colour = (255, 255, 255)  # around the contour, which would vanish on a background of its own colour
_BAND = 256  # rows tinted at a time
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_SQUARE = cv2.getStructuringElement(cv2.MORPH_RECT, (3, 3))


def overlay(image: NDArray[np.uint8], mask: MaskArray, colour: Colour = COLOURS[0]) -> NDArray[np.uint8]:
    """`image` [H, W, 3] uint8 with `mask` [H, W] bool shown on it: a tint inside, a contour just outside. A new array.

    The contour is `contour_width` pixels of `colour` with a white line around it that is half as wide, so that even an object
    of a few pixels is seen. All other pixels stay as they are. Raises ValueError where the shapes or types do not fit.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if mask.shape != image.shape[:2] or mask.dtype != np.bool_:
        raise ValueError(
            f"the mask must be bool {list(image.shape[:2])} as its image, not {mask.dtype} {list(mask.shape)}"
        )
    result = image.copy()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return result
    height, width = mask.shape
    line = contour_width(height, width)
    casing = (line + 1) // 2
    reach = line + casing
    window = (
        slice(max(0, int(rows[0]) - reach), min(height, int(rows[-1]) + reach + 1)),
        slice(max(0, int(columns[0]) - reach), min(width, int(columns[-1]) + reach + 1)),
    )
    target, inside = result[window], mask[window]

    # A blend with one colour depends on the pixel's value alone, so a table of 256 values per channel holds it.
    values = np.arange(256, dtype=np.float32)[:, None]
    table = np.rint(values * (1 - _ALPHA) + np.array(colour, np.float32) * _ALPHA).astype(np.uint8)[None]
    for top in range(0, len(target), _BAND):
        band = target[top : top + _BAND]
        np.copyto(band, cv2.LUT(band, table), where=inside[top : top + _BAND, :, None])

    filled = inside.astype(np.uint8)
    with_line = _grow(filled, line)
    with_casing = _grow(with_line, casing)
    _paint(target, with_casing, with_line, _CASING)
    _paint(target, with_line, filled, colour)
    return result


def contour_width(height: int, width: int) -> int:
    """Pixels across of the contour that `overlay` draws: about 1/170 of the picture's side, and at least one."""
    return max(1, round(math.sqrt(height * width) / 170))


def cell(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """`image` [H, W, 3] uint8 brought to at most `size` pixels on its longer side, in its own proportions.

    Larger pictures are averaged down. Smaller ones are repeated a whole number of times, so that the pixels of a generated
    scene stay squares of equal size; one that would not fit twice stays as it is. Raises ValueError for an empty image.
    """
    height, width, repeat = _cell_shape(image.shape[0], image.shape[1], size)
    if repeat:
        return _repeat(image, repeat)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def mask_cell(mask: MaskArray, size: int) -> MaskArray:
    """`mask` [H, W] bool brought to the shape that `cell` gives a picture of its size; the two stay in line.

    A pixel is set where at least half of it was, or where any of it was if nothing of the mask would be left.
    """
    height, width, repeat = _cell_shape(mask.shape[0], mask.shape[1], size)
    if repeat:
        return _repeat(mask, repeat)
    share = cv2.resize(mask.astype(np.uint8) * np.uint8(255), (width, height), interpolation=cv2.INTER_AREA)
    half: MaskArray = share >= 128
    if half.any() or not mask.any():
        return half
    # A far smaller object than a pixel may have been rounded away altogether, so its pixels are looked up one by one.
    rows, columns = np.nonzero(mask)
    half[rows * height // len(mask), columns * width // mask.shape[1]] = True
    return half


def png_bytes(array: NDArray[np.uint8] | MaskArray) -> bytes:
    """A PNG file of a mask [H, W] bool (written as 0 and 255), grey values [H, W] uint8 or an image [H, W, 3] uint8 RGB.

    Raises ValueError for other types or shapes, and for an empty array.
    """
    # cv2's own setting is made for photographs, and swells a picture of repeated pixels to four times its size.
    return _encode(array, ".png", [cv2.IMWRITE_PNG_COMPRESSION, 3])


def jpeg_bytes(image: NDArray[np.uint8], quality: int = 88) -> bytes:
    """A JPEG file of an image [H, W, 3] uint8 RGB, with colours at full resolution: contours are thin and coloured.

    Raises ValueError for other types or shapes, for an empty array, and above 65,535 pixels a side.
    """
    if max(image.shape[:2]) > 65_535:
        raise ValueError(f"JPEG holds at most 65535 pixels a side, not {list(image.shape[:2])}")
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])


def _grow(region: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Grow a region of ones by `pixels` on all sides. Cross and square in turn make an octagon, at a step's cost each."""
    for step in range(pixels):
        region = np.asarray(cv2.dilate(region, _SQUARE if step % 2 else _CROSS), np.uint8)
    return region


def _paint(target: NDArray[np.uint8], outer: NDArray[np.uint8], inner: NDArray[np.uint8], colour: Colour) -> None:
    """Colour the pixels of `target` that are in `outer` and not in `inner`, where inner is a part of outer."""
    np.copyto(target, np.array(colour, np.uint8), where=(outer != inner)[..., None])


def _cell_shape(height: int, width: int, size: int) -> tuple[int, int, int]:
    """Height and width of a picture's cell, and how often pixels are repeated for it; 0 where they are averaged."""
    longer = max(height, width)
    if min(height, width, size) < 1:
        raise ValueError(f"cannot make a cell of {size} pixels from a picture of {height} x {width}")
    if longer <= size:
        repeat = size // longer
        return height * repeat, width * repeat, repeat
    return max(1, round(height * size / longer)), max(1, round(width * size / longer)), 0


def _repeat(array: NDArray[T], times: int) -> NDArray[T]:
    return array.repeat(times, axis=0).repeat(times, axis=1)


def _encode(array: NDArray[np.uint8] | MaskArray, suffix: str, settings: list[int]) -> bytes:
    kind = (array.dtype.type, array.ndim)
    if kind not in ((np.bool_, 2), (np.uint8, 2), (np.uint8, 3)) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(
            f"cannot write {array.dtype} {list(array.shape)} as a picture; give bool [H, W] or uint8 [H, W, 3]"
        )
    if not array.size:
        raise ValueError("cannot write a picture without pixels")
    pixels = array.astype(np.uint8)
    if array.ndim == 3:
        cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR, dst=pixels)
    elif array.dtype == np.bool_:
        pixels *= np.uint8(255)
    done, data = cv2.imencode(suffix, pixels, settings)
    if not done:
        raise ValueError(f"cannot encode a picture of {list(array.shape)} as {suffix[1:].upper()}")
    return bytes(data)
