"""Draw masks on images, resize images for display, and encode them as PNG or JPEG.

Arrays stay uint8 or bool, and only the surroundings of a mask are processed, so that an image of
100 megapixels needs little memory besides its own copy.
"""

import math
from collections.abc import Iterator
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
    (85, 85, 0),  # olive
    (255, 210, 170),  # peach
    (0, 255, 0),  # lime
    (40, 85, 128),  # slate
    (255, 170, 255),  # pink
    (128, 40, 85),  # maroon
    (128, 170, 0),  # moss
    (255, 85, 255),  # fuchsia
    (128, 170, 255),  # sky
    (40, 128, 85),  # pine
    (128, 40, 170),  # purple
    (255, 128, 128),  # salmon
)
"""Colours for several masks on one image: `COLOURS[k % len(COLOURS)]`.

Any two are far apart in CIELAB. Neighbours among the first eight differ also with colour blindness.
"""

PREDICTION_COLOUR, TRUTH_COLOUR = COLOURS[:2]
"""Colours of a predicted mask and of the true mask."""

PNG_UP_TO = 200
"""Longest side of images that are stored as PNG: such small ones are drawn scenes, which JPEG would
blur."""

_ALPHA = 0.45  # of the tint; the object under it stays visible
_WHITE: Colour = (255, 255, 255)
_BLACK: Colour = (0, 0, 0)
_LEGIBLE = 3.0  # contrast that WCAG 2 asks of lines
_BAND = 256  # rows that are painted at once, at least
# The default of cv2 is made for photographs; images with repeated pixels become four times as
# large.
_PNG_SETTINGS = [cv2.IMWRITE_PNG_COMPRESSION, 3]


def overlay(image: NDArray[np.uint8], mask: MaskArray, colour: Colour = COLOURS[0]) -> NDArray[np.uint8]:
    """Return a copy of an image with a mask drawn on it: a tint inside, a contour just outside.

    The contour is `contour_width` pixels of `colour`, with a white or black line around it that is
    half as wide (`contrasting`): it is visible on a background of any colour, and even if the
    object has only a few pixels. All other pixels are unchanged.

    Args:
        image: [H, W, 3] uint8.
        mask: [H, W] bool.
        colour: of the tint and the contour.

    Raises:
        ValueError: shapes or types do not fit.
    """
    result = image.copy()
    draw_mask(result, mask, colour)
    return result


def mask_layer(mask: MaskArray, colour: Colour = COLOURS[0]) -> NDArray[np.uint8]:
    """Return what `draw_mask` draws as an image [H, W, 4] with an alpha channel, for programs that
    lay it over the image themselves."""
    on_black = np.zeros((*mask.shape, 3), np.uint8)
    on_white = np.full((*mask.shape, 3), 255, np.uint8)
    for background in (on_black, on_white):
        draw_mask(background, mask, colour)
    alpha = 255 - (on_white - on_black).min(axis=2, keepdims=True)
    solid = np.minimum(on_black * (255.0 / np.maximum(alpha, 1)), 255)
    return np.dstack((np.rint(solid).astype(np.uint8), alpha))


def draw_mask(image: NDArray[np.uint8], mask: MaskArray, colour: Colour) -> None:
    """Draw a mask on an image in place; see `overlay`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if mask.shape != image.shape[:2] or mask.dtype != np.bool_:
        raise ValueError(
            f"the mask must be bool {list(image.shape[:2])} as its image, not {mask.dtype} {list(mask.shape)}"
        )
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    height, width = mask.shape
    line = contour_width(height, width)
    casing = (line + 1) // 2
    reach = line + casing
    window = (
        slice(max(0, int(rows[0]) - reach), min(height, int(rows[-1]) + reach + 1)),
        slice(max(0, int(columns[0]) - reach), min(width, int(columns[-1]) + reach + 1)),
    )
    target, inside = image[window], mask[window]

    # Blending with one colour depends on the pixel's value only: a table of 256 values per channel.
    values = np.arange(256, dtype=np.float32)[:, None]
    table = np.rint(values * (1 - _ALPHA) + np.array(colour, np.float32) * _ALPHA).astype(np.uint8)[None]
    step = max(_BAND, 4 * reach)
    for top in range(0, len(target), step):
        above = min(top, reach)  # the contour of a band depends on so many rows around it
        bottom = top + step
        band = target[top:bottom]
        np.copyto(band, cv2.LUT(band, table), where=inside[top:bottom, :, None])
        filled = inside[top - above : bottom + reach].view(np.uint8)
        with_line = _grow(filled, line)
        with_casing = _grow(with_line, casing)
        inner = slice(above, above + len(band))
        _paint(band, with_casing[inner], with_line[inner], contrasting(colour))
        _paint(band, with_line[inner], filled[inner], colour)


def overlay_png(image: NDArray[np.uint8], mask: MaskArray, colour: Colour = COLOURS[0]) -> bytes:
    """Return `overlay` as a PNG file, for one copy of the image less than
    `png_bytes(overlay(...))`."""
    shown = overlay(image, mask, colour)
    for top in range(0, len(shown), _BAND):  # in place; `cv2.cvtColor` with dst=src copies the whole
        band = shown[top : top + _BAND]
        band[:] = band[..., ::-1]
    return _compress(shown, ".png", _PNG_SETTINGS)


def contrasting(colour: Colour) -> Colour:
    """Return white if it stands out from a colour (WCAG's contrast of 3), else black."""
    return _WHITE if 1.05 / (_luminance(colour) + 0.05) >= _LEGIBLE else _BLACK


def _luminance(colour: Colour) -> float:
    """Return the relative luminance of an sRGB colour in 0..1, as WCAG 2 defines it."""
    shares = (value / 255 for value in colour)
    linear = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contour_width(height: int, width: int) -> int:
    """Return the width of the contour of `overlay` in pixels: 1/170 of the image's side, at least
    1."""
    return max(1, round(math.sqrt(height * width) / 170))


def cell(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize an image [H, W, 3] uint8 to at most `size` pixels on its longer side; proportions are
    kept.

    Larger images are averaged. In smaller ones each pixel is repeated a whole number of times, so
    that the pixels of a generated scene stay equal squares; an image that does not fit twice is
    unchanged.

    Raises:
        ValueError: the image is empty.
    """
    height, width, repeat = _cell_shape(image.shape[0], image.shape[1], size)
    if repeat:
        return _repeat(image, repeat)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def mask_cell(mask: MaskArray, size: int) -> MaskArray:
    """Resize a mask [H, W] bool to the shape that `cell` gives an image of its size.

    A pixel is set if at least half of its area was, or, if the mask would become empty, if any of
    its area was.
    """
    height, width, repeat = _cell_shape(mask.shape[0], mask.shape[1], size)
    if repeat:
        return _repeat(mask, repeat)
    share = cv2.resize(mask.astype(np.uint8) * np.uint8(255), (width, height), interpolation=cv2.INTER_AREA)
    half: MaskArray = share >= 128
    if half.any() or not mask.any():
        return half
    # An object much smaller than a pixel may round to zero everywhere, so its pixels are set one by
    # one.
    rows, columns = np.nonzero(mask)
    half[rows * height // len(mask), columns * width // mask.shape[1]] = True
    return half


def png_bytes(array: NDArray[np.uint8] | MaskArray) -> bytes:
    """Encode a mask [H, W] bool (as 0 and 255), grey values [H, W] uint8, or an image [H, W, 3] RGB
    or [H, W, 4] RGBA of uint8 as PNG.

    Raises:
        ValueError: another type or shape, or an empty array.
    """
    return _encode(array, ".png", _PNG_SETTINGS)


def jpeg_bytes(image: NDArray[np.uint8], quality: int = 88) -> bytes:
    """Encode an image [H, W, 3] uint8 RGB as JPEG, with colours at full resolution: contours are
    thin and coloured.

    Raises:
        ValueError: another type or shape, an empty array, or more than 65,535 pixels a side.
    """
    if max(image.shape[:2]) > 65_535:
        raise ValueError(f"JPEG holds at most 65535 pixels a side, not {list(image.shape[:2])}")
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return _encode(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling])


def _grow(region: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Grow a region of ones by an octagon of radius `pixels`: a diamond and a square of half the
    radius, one after the other."""
    square = pixels // 2
    for step in _doubling(pixels - square):
        region = np.asarray(cv2.dilate(region, _spread_cross(step)), np.uint8)
    if square:
        side = 2 * square + 1
        region = np.asarray(cv2.dilate(region, np.ones((side, side), np.uint8)), np.uint8)
    return region


def _doubling(radius: int) -> Iterator[int]:
    """Yield distances of `_spread_cross` that add up to a diamond of the radius: each at most the
    sum of those before it."""
    done = 0
    while done < radius:
        step = min(max(1, done), radius - done)
        yield step
        done += step


def _spread_cross(distance: int) -> NDArray[np.uint8]:
    """Five ones: the middle, and four at the distance from it. Zeros cost `cv2.dilate` nothing."""
    kernel = np.zeros((2 * distance + 1, 2 * distance + 1), np.uint8)
    kernel[distance, ::distance] = kernel[::distance, distance] = 1
    return kernel


def _paint(target: NDArray[np.uint8], outer: NDArray[np.uint8], inner: NDArray[np.uint8], colour: Colour) -> None:
    """Set the pixels of `target` in `outer` but not in `inner` (a part of it) to a colour."""
    np.copyto(target, np.array(colour, np.uint8), where=(outer != inner)[..., None])


def _cell_shape(height: int, width: int, size: int) -> tuple[int, int, int]:
    """Return height and width of a cell, and how often pixels are repeated; 0 for averaging."""
    longer = max(height, width)
    if min(height, width, size) < 1:
        raise ValueError(f"cannot make a cell of {size} pixels from an image of {height} x {width}")
    if longer <= size:
        repeat = size // longer
        return height * repeat, width * repeat, repeat
    return max(1, round(height * size / longer)), max(1, round(width * size / longer)), 0


def _repeat(array: NDArray[T], times: int) -> NDArray[T]:
    return array.repeat(times, axis=0).repeat(times, axis=1)


def _encode(array: NDArray[np.uint8] | MaskArray, suffix: str, settings: list[int]) -> bytes:
    kind = (array.dtype.type, array.ndim)
    channels = (3, 4) if suffix == ".png" else (3,)
    if kind not in ((np.bool_, 2), (np.uint8, 2), (np.uint8, 3)) or (
        array.ndim == 3 and array.shape[2] not in channels
    ):
        raise ValueError(
            f"cannot encode {array.dtype} {list(array.shape)} as an image; pass bool [H, W] or uint8 [H, W, 3]"
        )
    if not array.size:
        raise ValueError("cannot encode an image without pixels")
    pixels = array.astype(np.uint8)
    if array.ndim == 3:
        cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if array.shape[2] == 3 else cv2.COLOR_RGBA2BGRA, dst=pixels)
    elif array.dtype == np.bool_:
        pixels *= np.uint8(255)
    return _compress(pixels, suffix, settings)


def _compress(pixels: NDArray[np.uint8], suffix: str, settings: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, pixels, settings)
    if not done:
        raise ValueError(f"cannot encode an image of {list(pixels.shape)} as {suffix[1:].upper()}")
    return bytes(data)
